"""Health of one node, asked on its control socket: `python -m launcher.probe head|worker|ready|status|watch`.

`head`: every declared node has joined. `worker`: this node is in the cluster. `ready`: `head`, and the API answers
`GET /health`. Exit status 0 or 1, one line that says why. `status` and `watch` print the node's report as JSON.
Imports only what starts in a few milliseconds: Docker runs it every few seconds. Changes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from launcher.supervise.control import NoAnswer, ask, watch
from launcher.supervise.health import ask_health
from launcher.supervise.node_records import between_runs

RUN_FOLDER = "/tmp/hlaunch"


def main() -> int:
    parser = argparse.ArgumentParser(prog="launcher.probe", description=__doc__)
    parser.add_argument("question", choices=("head", "worker", "ready", "status", "watch"))
    parser.add_argument("--folder", type=Path, default=Path(RUN_FOLDER), help="the node's run folder")
    parser.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="watch: wait for the node to start")
    arguments = parser.parse_args()
    try:
        if arguments.question == "watch":
            for report in watch(arguments.folder, arguments.wait):
                print(json.dumps(report), flush=True)
            return 0
        report = ask(arguments.folder)
    except NoAnswer as error:
        if arguments.question == "status" and (known := between_runs(arguments.folder)):
            print(json.dumps(known))
            return 0
        print(error.message, file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 0
    if arguments.question == "status":
        print(json.dumps(report))
        return 0
    problem = judge(report, arguments.question)
    print(problem or f"{report.get('role')} {report.get('node')}: {report.get('state')}")
    return 1 if problem else 0


def judge(report: dict[str, Any], question: str) -> str:
    """Say why the answer is no; empty for yes."""
    state, role = report.get("state"), report.get("role")
    if report.get("cause"):
        return str(report["cause"])
    if question == "worker":
        return "" if state == "ready" else f"{role}: {state}"
    if role != "head":
        return f"this node is a {role}"
    absent = [str(node.get("name")) for node in report.get("nodes", []) if not node.get("is_alive")]
    if absent:
        return f"not in the cluster: {', '.join(absent)}"
    # Degraded with every node here: one of several engines starts again, and the others serve.
    if state not in ("ready", "degraded"):
        return f"{role}: {state}"
    return health(str(report.get("url", ""))) if question == "ready" and report.get("url") else ""


def health(url: str) -> str:
    """Ask the API's `/health`; empty when it says 200."""
    found = ask_health(url)
    if found.problem:
        return f"{url}/health: {found.problem}"
    return "" if found.is_serving else f"{url}/health answered {found.status}"


if __name__ == "__main__":
    sys.exit(main())
