"""The detached supervisor's process: `python -m launcher.supervise --root DIR --name NAME --status-fd N --lock-fd M`.

Its environment is the engine's. It ends with the engine's exit code; the last words go to the status pipe and the log.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from launcher.errors import HlaunchError
from launcher.supervise.detached import SPEC_FILE, Relay
from launcher.supervise.instance import InstanceFolder
from launcher.supervise.spec import LaunchSpec
from launcher.supervise.status import Fatal
from launcher.supervise.supervisor import Outcome, Supervisor


def main() -> int:
    parser = argparse.ArgumentParser(prog="launcher.supervise")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--status-fd", type=int, required=True)
    parser.add_argument("--lock-fd", type=int, required=True)
    arguments = parser.parse_args()
    for fd in (arguments.status_fd, arguments.lock_fd):
        # The engine must get neither: the lock would outlive us, the pipe would never end.
        os.set_inheritable(fd, False)
    folder = InstanceFolder(arguments.root, arguments.name)
    relay = Relay(arguments.status_fd)
    try:
        text = (folder.path / SPEC_FILE).read_text(encoding="utf-8")
        (folder.path / SPEC_FILE).unlink()
        spec = LaunchSpec.from_json(text, dict(os.environ))
        outcome = Supervisor(spec, folder, relay, is_detached=True).run()
    except HlaunchError as error:
        outcome = Outcome(error.exit_code, error.message, error.hint)
    except OSError as error:
        outcome = Outcome(1, f"{folder.path}: {error.strerror}")
    if outcome.cause:
        print(f"hlaunch: {outcome.cause}", file=sys.stderr)
        relay.send(Fatal("", "", outcome.cause, outcome.hint, outcome.exit_code))
    relay.close()
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
