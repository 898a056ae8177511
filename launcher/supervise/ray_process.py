"""Ray as a child: its command line with every port pinned, its environment, and why it ended.

Knows: the `ray` CLI of the pinned release. Refuses to know: Ray itself (never imported here), when to start or stop.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from launcher.supervise.node_spec import NodeSpec

_ENDED = re.compile(r"(?:^|\s)(?P<name>[\w.-]+) \[exit code=(?P<code>[^\]]*)\]")
_CAUSES = (
    (re.compile(r"InvalidAuthToken|AuthenticationError"), "the head refused this node's Ray token", True),
    (re.compile(r"The cluster was started with:|Version mismatch"), "Ray or Python differs from the head's", True),
    (re.compile(r"Address already in use|already in use|Failed to bind"), "a port that Ray needs is in use", False),
    (re.compile(r"No module named 'ray"), "Ray is not installed in this environment", True),
    (re.compile(r"Can't find a .*object store|shared memory|/dev/shm.*(full|No space)"), "/dev/shm is too small", True),
)


@dataclass(frozen=True, slots=True)
class RayCause:
    """Why Ray ended. `is_permanent`: starting again cannot help."""

    text: str
    is_permanent: bool = False


def ray_argv(spec: NodeSpec) -> tuple[str, ...]:
    """The command that keeps this node's Ray in the foreground. Raises: ValueError for a node without Ray."""
    ray = spec.ray
    if ray is None:
        raise ValueError("this node has no Ray")
    options = {
        "node-ip-address": spec.ip,
        "node-manager-port": ray.node_manager_port,
        "object-manager-port": ray.object_manager_port,
        "runtime-env-agent-port": ray.runtime_env_agent_port,
        "dashboard-agent-grpc-port": ray.dashboard_agent_grpc_port,
        "dashboard-agent-listen-port": ray.dashboard_agent_listen_port,
        "metrics-export-port": ray.metrics_export_port,
        "min-worker-port": ray.worker_ports[0],
        "max-worker-port": ray.worker_ports[1],
        "object-store-memory": ray.object_store_bytes,
        "num-gpus": spec.gpus,
        "temp-dir": spec.ray_folder,
    }
    if spec.cpus:
        options["num-cpus"] = spec.cpus
    if spec.is_head:
        options |= {"port": ray.port, **_dashboard(ray.dashboard_host, ray.dashboard_port)}
    else:
        options["address"] = spec.head_address
    command = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats")
    role = ("--head",) if spec.is_head else ()
    return (*command, *role, *(f"--{name}={value}" for name, value in options.items()))


def _dashboard(host: str, port: int) -> dict[str, str | int]:
    # Ray's small distribution cannot serve a dashboard and refuses to start when asked to.
    if port and find_spec("aiohttp_cors") is not None:
        return {"include-dashboard": "true", "dashboard-host": host, "dashboard-port": port}
    return {"include-dashboard": "false"}


def ray_environment(spec: NodeSpec, environ: Mapping[str, str]) -> dict[str, str]:
    """What Ray and its view get: ours, with token authentication on and no address that would lead elsewhere."""
    chosen = {name: value for name, value in environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    chosen |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": spec.token_file, "RAY_USAGE_STATS_ENABLED": "0"}
    chosen.setdefault("RAY_worker_niceness", "0")
    chosen["PYTHONUNBUFFERED"] = "1"
    return chosen


def ray_cause(lines: Iterable[str], exit_text: str) -> RayCause:
    """Find the cause of Ray's end in the last lines it wrote; `exit_text` says how the process itself ended."""
    ended = ""
    for line in reversed(list(lines)):
        for pattern, text, is_permanent in _CAUSES:
            if pattern.search(line):
                return RayCause(text, is_permanent)
        found = _ENDED.search(line)
        if found is not None and not ended:
            ended = f"Ray's {found['name']} died (exit code {found['code']})"
    return RayCause(ended or f"Ray {exit_text}")
