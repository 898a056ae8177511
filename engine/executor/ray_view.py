"""Who is in the Ray cluster: `python -m engine.executor.ray_view --address IP:PORT [--every SECONDS]`.

It runs as a child: of the node supervisor, which may not import Ray, and of an engine that looks whether a cluster lets
in strangers. It asks the control store directly: no driver, no job, 0.3 s. The token comes from RAY_AUTH_TOKEN_PATH, as
for Ray itself.

One JSON object a line: `{"nodes": [{"id", "ip", "is_alive", "is_head", "gpus", "cpus", "reason"}, ...]}` or
`{"error": "refused" | "unreachable" | "failed", "message": "..."}`. Without `--every` the exit status is 1 on an error.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import sys
from collections.abc import Mapping
from typing import Any

from engine.process import die_with_parent

TIMEOUT_SECONDS = 5.0
_DEAD = 1
"""`GcsNodeInfo.state` of a node that was lost; the entry stays."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="engine.executor.ray_view", description=__doc__)
    parser.add_argument("--address", required=True, help="ip:port of the head's control store")
    parser.add_argument("--every", type=float, default=None, metavar="SECONDS", help="go on until stdin closes")
    parser.add_argument("--parent", type=int, default=None, metavar="PID", help="end when this process does")
    arguments = parser.parse_args()
    if arguments.parent is not None:
        die_with_parent(arguments.parent)
    view = RayView(arguments.address)
    while True:
        line = view.look()
        print(json.dumps(line), flush=True)
        if arguments.every is None:
            return 1 if "error" in line else 0
        # stdin is the supervisor's end of a pipe: it never speaks, and closes when the supervisor is gone.
        if select.select([sys.stdin], [], [], arguments.every)[0]:
            return 0


class RayView:
    """One connection to the control store, made anew after a failure."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._client: Any = None

    def look(self) -> dict[str, Any]:
        """Ask once. Blocks up to a few seconds; never raises for what Ray answers."""
        from ray.exceptions import RayError

        try:
            if self._client is None:
                self._client = self._connect()
            infos = self._client.get_all_node_info(timeout=TIMEOUT_SECONDS)
        except (RayError, OSError, RuntimeError, ValueError) as error:
            self._client = None
            return describe_error(type(error).__name__, str(error))
        return {"nodes": sorted((_node(info) for info in infos.values()), key=lambda node: str(node["ip"]))}

    def _connect(self) -> Any:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        return GcsClient(address=self._address)


def describe_error(kind: str, message: str) -> dict[str, Any]:
    """Name what Ray raised: a refused token is final, an unreachable head may come."""
    text = " ".join(message.split())
    if kind == "AuthenticationError" or "InvalidAuthToken" in text:
        return {"error": "refused", "message": "the head refused this node's Ray token"}
    if "Failed to connect" in text or "Timed out" in text or kind in ("RpcError", "GetTimeoutError"):
        return {"error": "unreachable", "message": text[:300]}
    return {"error": "failed", "message": f"{kind}: {text}"[:300]}


def _node(info: Any) -> dict[str, Any]:
    resources: Mapping[str, float] = dict(info.resources_total)
    return {
        "id": info.node_id.hex(),
        "ip": info.node_manager_address,
        "is_alive": info.state != _DEAD,
        "is_head": bool(info.is_head_node),
        "gpus": int(resources.get("GPU", 0)),
        "cpus": int(resources.get("CPU", 0)),
        "reason": " ".join(str(info.death_info.reason_message).split())[:300] if info.state == _DEAD else "",
    }


if __name__ == "__main__":
    # Ray's C++ logs to stderr at will; what matters is on stdout.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    sys.exit(main())
