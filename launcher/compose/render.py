"""ClusterPlan -> compose files: one folder per node, the same bytes for the same plan.

Knows: how one node becomes one service with GPU, RDMA, limits, secrets, health and lifecycle. Refuses to know: YAML's
quoting (`yaml_text`), what an option means to the engine, Docker's daemon. Pure: no clock, no file, no network.

One service per node: a Ray driver must share shared memory and session folder with its raylet. Secrets never stand in
a file: they come from Compose `secrets:` or from `${NAME:?run: export NAME=…}`, which Compose refuses to leave unset.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from launcher import __version__
from launcher.compose.labels import LABEL
from launcher.compose.readme import node_readme
from launcher.compose.specs import (
    CONTAINER,
    engine_config,
    is_secret,
    needs_model_folder,
    node_environment,
    node_spec,
)
from launcher.compose.yaml_text import Block, Interpolated, Value, dump
from launcher.errors import UsageError
from launcher.plan.cluster_plan import ClusterPlan, NodePlan
from launcher.registry.cluster import Cluster, Container

COMPOSE_FILE = "docker-compose.yml"
ENV_FILE = "node.env"
ENV_EXAMPLE = ".env.example"
README = "README.md"
SERVICE = "node"
NOFILE = 1048576
"""Open files: sockets of Ray, NCCL and clients."""
_HEADER = (
    "# rendered by hlaunch from the registry - do not edit; change the registry and run: hlaunch render\n"
    "# start: docker compose up -d     stop: docker compose down     (settings: .env.example)\n"
)
_GRACE_BEYOND_DRAIN_SECONDS = 10
_START_PERIOD_SECONDS = 120
"""The least time a node may take before a failing health check counts; large models read for minutes."""
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_PROJECT_NAME = re.compile(r"[^a-z0-9_-]+", re.ASCII)


def render(plan: ClusterPlan) -> dict[str, bytes]:
    """Render every node's folder: relative path -> bytes, in path order.

    Raises: UsageError or PreflightError for a value that no compose file may hold.
    """
    files: dict[str, bytes] = {}
    for node in plan.nodes:
        folder = node_folder(plan, node)
        files[f"{folder}/{COMPOSE_FILE}"] = compose_text(plan, node)
        files[f"{folder}/{ENV_EXAMPLE}"] = env_example(plan, node).encode("ascii")
        files[f"{folder}/{README}"] = node_readme(plan, node).encode("utf-8")
    return dict(sorted(files.items()))


def compose_text(plan: ClusterPlan, node: NodePlan) -> bytes:
    """Render one node's compose file."""
    return (_HEADER + dump(compose_document(plan, node))).encode("ascii")


def node_folder(plan: ClusterPlan, node: NodePlan) -> str:
    """Name a node's folder: `head`, `worker`, and with several workers `worker-<name>`."""
    if node.is_head:
        return "head"
    return "worker" if len(plan.workers) == 1 else f"worker-{slug(node.name)}"


def project_name(plan: ClusterPlan) -> str:
    """Name the Compose project. Folders may be renamed; the project must not follow them."""
    return f"hl-{slug(plan.name)}"


def project_of(plan: ClusterPlan, node: NodePlan) -> str:
    """Name one node's project; nodes that share a Docker network may share a host, and must not share a project."""
    is_alone = plan.cluster.container.network == "host"
    return project_name(plan) if is_alone else f"{project_name(plan)}-{slug(node.name)}"


def slug(name: str) -> str:
    """Reduce a name to what Compose projects and folders accept."""
    return _PROJECT_NAME.sub("-", name.lower()).strip("-_") or "unnamed"


def compose_document(plan: ClusterPlan, node: NodePlan) -> dict[str, Value]:
    """Build the compose file of one node as plain values, in the order they are written."""
    container = plan.cluster.container
    document: dict[str, Value] = {
        "name": project_of(plan, node),
        "x-hlaunch": _provenance(plan, node),
        "services": {SERVICE: _service(plan, node)},
        "configs": _configs(plan, node),
    }
    if secrets := _secrets(plan, node):
        document["secrets"] = secrets
    if container.network != "host":
        # Two projects share it, so neither may own it: `hlaunch up` makes it, `hlaunch down` removes it.
        document["networks"] = {"fabric": {"name": container.network, "external": True}}
    return document


def _provenance(plan: ClusterPlan, node: NodePlan) -> dict[str, Value]:
    return {
        "version": __version__,
        "model": plan.name,
        "cluster": plan.cluster.name,
        "node": node.name,
        "role": node.role,
        "platform": plan.cluster.platform,
        "plan": plan.digest,
    }


def _service(plan: ClusterPlan, node: NodePlan) -> dict[str, Value]:
    cluster = plan.cluster
    container = cluster.container
    service: dict[str, Value] = {
        "image": container.image,
        "pull_policy": "missing",
        "command": ["python", "-m", "launcher.node", node.role, "--plan", CONTAINER.node_file],
        # Secrets are files of mode 0600: the container runs as whoever owns them on the host.
        "user": Interpolated("${HLAUNCH_UID:-1000}:${HLAUNCH_GID:-1000}"),
        "environment": service_environment(node, cluster),
        # `raw` keeps quotes, `#` and `$` as they stand, like `docker run --env-file`.
        "env_file": [{"path": f"./{ENV_FILE}", "required": False, "format": "raw"}],
    }
    service |= _network(node, container)
    service |= _isolation(container)
    service |= _devices(node, cluster)
    service |= {
        "ulimits": {
            "memlock": -1,
            "nofile": {"soft": NOFILE, "hard": NOFILE},
            "stack": 67108864,
        },
        "configs": [
            {"source": "node", "target": CONTAINER.node_file},
            *([{"source": "engine", "target": CONTAINER.engine_file}] if node.is_head else []),
        ],
    }
    if secrets := _secrets(plan, node):
        service["secrets"] = list(secrets)
    if needs_model_folder(plan) and (node.is_head or node.ranks):
        service["volumes"] = [_model_volume()]
    service |= {"labels": _labels(plan, node), "healthcheck": _healthcheck(plan, node.role)}
    # A failure that repeats must not loop for ever: three restarts, then it stays down with its cause in the log.
    service |= {
        "restart": "on-failure:3",
        "stop_grace_period": f"{_seconds(node.config.server.drain_timeout_seconds) + _GRACE_BEYOND_DRAIN_SECONDS}s",
        "logging": {"driver": "json-file", "options": {"max-file": "5", "max-size": "50m"}},
    }
    return service


def service_environment(node: NodePlan, cluster: Cluster) -> dict[str, Value]:
    """Return all variables of a node's container, in name order; a secret is a reference to the host's.

    Raises: as `node_environment`; UsageError for what cannot be a variable.
    """
    chosen: dict[str, Value] = {}
    for name, value in node_environment(node).items():
        if not _VARIABLE_NAME.fullmatch(name):
            raise UsageError(f"{node.name}: {name!r} is not a variable name", hint="use letters, digits and '_'")
        if "\0" in value:
            raise UsageError(f"{node.name}: {name} holds a NUL byte, which no environment can", hint="remove it")
        chosen[name] = Interpolated(f"${{{name}:?run: export {name}=...}}") if is_secret(name, value) else value
    fixed: dict[str, Value] = {"HF_HOME": CONTAINER.model_root, "HF_HUB_OFFLINE": "1", "HLAUNCH_NODE_IP": node.node.ip}
    if cluster.ray is not None:
        fixed |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": CONTAINER.token_file}
        chosen.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if _has_gpu(node, cluster):
        chosen.setdefault("NVIDIA_DRIVER_CAPABILITIES", "compute,utility")
    return dict(sorted((chosen | fixed).items()))


def _network(node: NodePlan, container: Container) -> dict[str, Value]:
    if container.network == "host":
        return {"network_mode": "host"}
    key = "ipv6_address" if ":" in node.node.ip else "ipv4_address"
    return {"networks": {"fabric": {key: node.node.ip}}}


def _isolation(container: Container) -> dict[str, Value]:
    chosen: dict[str, Value] = {"init": True, "ipc": container.ipc}
    if container.ipc != "host":
        # With the host's /dev/shm the size would be inert.
        chosen["shm_size"] = _megabytes(container.shm_bytes)
    return chosen | {"cap_add": ["IPC_LOCK", "SYS_NICE"], "security_opt": ["no-new-privileges:true"]}


def _devices(node: NodePlan, cluster: Cluster) -> dict[str, Value]:
    """One GPU mechanism and no other; the RDMA devices only where the plan uses them, or create would fail."""
    chosen: dict[str, Value] = {}
    needs_rdma = cluster.fabric.rdma == "required" and _has_gpu(node, cluster)
    devices: list[Value] = ["/dev/infiniband:/dev/infiniband"] if needs_rdma else []
    mode = cluster.container.gpu_mode if _has_gpu(node, cluster) else "none"
    if mode == "cdi":
        devices.append("nvidia.com/gpu=all")
    elif mode == "gpus":
        chosen["gpus"] = "all"
    elif mode == "reservation":
        request: Value = {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        chosen["deploy"] = {"resources": {"reservations": {"devices": [request]}}}
    if devices:
        chosen["devices"] = devices
    return chosen


def _has_gpu(node: NodePlan, cluster: Cluster) -> bool:
    return cluster.platform != "cpu" and (node.node.gpus > 0 or bool(node.gpus))


def _model_volume() -> Value:
    """The host's folder has one name, the container's another; a missing folder is an error, not a new empty one."""
    return {
        "type": "bind",
        "source": Interpolated("${HLAUNCH_MODEL_DIR:?run: export HLAUNCH_MODEL_DIR=<host folder of the models>}"),
        "target": CONTAINER.model_root,
        "read_only": True,
        "bind": {"create_host_path": False},
    }


def _labels(plan: ClusterPlan, node: NodePlan) -> dict[str, Value]:
    return {
        f"{LABEL}.cluster": plan.cluster.name,
        f"{LABEL}.model": plan.name,
        f"{LABEL}.node": node.name,
        f"{LABEL}.plan": plan.digest,
        f"{LABEL}.role": node.role,
    }


def _healthcheck(plan: ClusterPlan, role: str) -> Value:
    """`ready` on the head asks the API too; on a worker that question could never be answered."""
    probe = "ready" if role == "head" else "worker"
    return {
        "test": ["CMD", "python", "-m", "launcher.probe", probe],
        "interval": "10s",
        "timeout": "5s",
        "retries": 5,
        "start_period": f"{max(_START_PERIOD_SECONDS, _seconds(plan.ready_timeout_seconds))}s",
        "start_interval": "2s",
    }


def _configs(plan: ClusterPlan, node: NodePlan) -> dict[str, Value]:
    configs: dict[str, Value] = {"node": {"content": Block(node_spec(plan, node, CONTAINER).to_json())}}
    if node.is_head:
        configs["engine"] = {"content": Block(engine_config(plan, node, CONTAINER).to_json())}
    return configs


def _secrets(plan: ClusterPlan, node: NodePlan) -> dict[str, Value]:
    secrets: dict[str, Value] = {}
    reference = plan.entry.secret("api-key")
    if node.is_head and reference is not None:
        if reference.kind == "file":
            secrets["api_key"] = {"file": reference.name}
        else:
            secrets["api_key"] = {"environment": api_key_variable(plan)}
    if plan.cluster.ray is not None:
        secrets["ray_token"] = {"file": "./ray_token"}
    return secrets


def api_key_variable(plan: ClusterPlan) -> str:
    """The variable of the host that holds the API key; a literal of the registry travels under our own name."""
    reference = plan.entry.secret("api-key")
    return reference.name if reference is not None and reference.kind == "env" else "HLAUNCH_API_KEY"


def is_hidden_variable(plan: ClusterPlan, name: str) -> bool:
    """Whether a host variable is the one that holds the API key."""
    return name == api_key_variable(plan)


@dataclass(frozen=True, slots=True)
class HostVariable:
    """A variable that the host must export. `default` is what `.env.example` proposes; a secret has none there."""

    description: str
    is_secret: bool = False
    default: str = ""


def host_variables(plan: ClusterPlan, node: NodePlan) -> Mapping[str, HostVariable]:
    """What the host must export before `docker compose up`, by name; secrets included, no values."""
    wanted = {
        "HLAUNCH_UID": HostVariable("user id that owns ray_token and may read the models (id -u)", default="1000"),
        "HLAUNCH_GID": HostVariable("its group (id -g)", default="1000"),
    }
    if needs_model_folder(plan) and (node.is_head or node.ranks):
        wanted["HLAUNCH_MODEL_DIR"] = HostVariable(
            "host folder of the models: a Hugging Face cache, or the checkpoint's own folder"
        )
    reference = plan.entry.secret("api-key")
    if node.is_head and reference is not None and reference.kind != "file":
        wanted[api_key_variable(plan)] = HostVariable(
            "the API key that clients send (secret: export it, do not write it here)", is_secret=True
        )
    for name, value in node_environment(node).items():
        if is_secret(name, value):
            wanted[name] = HostVariable("secret: export it, do not write it here", is_secret=True)
    return wanted


def env_example(plan: ClusterPlan, node: NodePlan) -> str:
    """The `.env` to copy: every variable that the compose file reads, secrets only named."""
    lines = ["# copy to .env (mode 0600) and fill in; hlaunch up does this by itself"]
    for name, variable in host_variables(plan, node).items():
        lines += ["", f"# {variable.description}", f"#{name}=" if variable.is_secret else f"{name}={variable.default}"]
    return "\n".join(lines) + "\n"


def _seconds(seconds: float) -> int:
    return max(1, math.ceil(seconds))


def _megabytes(num_bytes: int) -> str:
    return f"{max(1, num_bytes >> 20)}m"
