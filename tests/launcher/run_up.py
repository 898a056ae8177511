"""`hlaunch up` with another program in the engine's place: everything but argv is the product's own code."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from launcher.commands import Invocation
from launcher.commands.up import _plan, launch
from launcher.console import Console
from launcher.errors import HlaunchError

STAND_IN = Path(__file__).with_name("stand_in_engine.py")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode")
    parser.add_argument("--name", default="tiny-oss")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--detach", action="store_true")
    parser.add_argument("--replace", action="store_true")
    parser.add_argument("--grandchild", action="store_true")
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    console = Console(environ=os.environ, is_plain=options.plain)
    try:
        plan = _plan(Invocation(console, dict(os.environ), Path.cwd()), options.name, options.set, options.port)
        port = str(plan.config.server.port)
        extra = ("--grandchild",) if options.grandchild else ()
        argv = (sys.executable, str(STAND_IN), options.mode, "--port", port, *extra, "--status-fd", "N")
        plan = replace(plan, argv=argv)
        return launch(console, plan, is_detached=options.detach, is_replacing=options.replace)
    except HlaunchError as error:
        console.failure(error)
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
