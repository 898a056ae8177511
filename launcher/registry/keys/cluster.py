"""A cluster as the registry writes it: nodes, the fabric between them, Ray, the container.

Knows: names, ranges and defaults; the defaults are those of `launcher.registry.cluster`. Refuses to know: NCCL's names
for any of it (`launcher.fabric`), rules between keys.
"""

from __future__ import annotations

from launcher.registry.cluster import Cluster, Container, Fabric, Node, RaySettings
from launcher.registry.keys.spec import KeySpec, Kind

PLATFORMS = ("generic", "hopper", "gb10", "blackwell", "cpu")
IPC_MODES = ("private", "host")
GPU_MODES = ("reservation", "gpus", "cdi", "none")
IMAGE = r"[A-Za-z0-9][A-Za-z0-9._/:@+-]*"
IMAGE_HINT = "write registry/name:tag, best with @sha256:…"
NODE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
INTERFACE = r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,14}"
HCA = r"[A-Za-z0-9_]+(:[0-9]{1,3})?"

_FABRIC, _RAY, _CONTAINER = Fabric(), RaySettings(), Container()


def _port(name: str, meaning: str, default: int) -> KeySpec:
    return KeySpec(f"ray.{name}", Kind.INTEGER, meaning, default=default, low=1024, high=65535)


CLUSTER_KEYS: tuple[KeySpec, ...] = (
    KeySpec(
        "platform",
        Kind.CHOICE,
        "What the nodes are: picks overrides, presets and variables; auto asks each node",
        default=Cluster("", ()).platform,
        choices=("auto", *PLATFORMS),
    ),
    KeySpec(
        "fabric.rdma",
        Kind.CHOICE,
        "Whether ranks must talk over RDMA: required fails without it, preferred warns, off uses TCP",
        automatic="off; preferred where hcas, gid-index, tc, sl, timeout or merge-nics stand",
        choices=("required", "preferred", "off"),
    ),
    KeySpec(
        "fabric.hcas",
        Kind.TEXTS,
        "RDMA devices of every node, for nodes that name none; auto takes the active ones inside the subnet",
        automatic="auto",
        pattern=HCA,
        pattern_hint="write names as in /sys/class/infiniband: [mlx5_0, mlx5_1], or auto",
    ),
    KeySpec(
        "fabric.gid-index",
        Kind.CHOICE,
        "GID of RoCE: auto leaves it to NCCL, auto-pin resolves it on each node at start",
        default=str(_FABRIC.gid_index),
        choices=("auto", "auto-pin"),
        pattern_hint="a number belongs to one node: nodes: [{…, gid-index: 3}]",
    ),
    KeySpec("fabric.subnet", Kind.SUBNET, "Network of the nodes' addresses", automatic="unchecked"),
    KeySpec(
        "fabric.mtu",
        Kind.INTEGER,
        "Expected MTU of the fabric",
        automatic="unchecked",
        unit="bytes",
        low=576,
        high=65535,
    ),
    KeySpec(
        "fabric.tc",
        Kind.INTEGER,
        "InfiniBand traffic class: DSCP * 4 + ECN (106 is DSCP 26, priority 3)",
        automatic="NCCL's",
        low=0,
        high=255,
    ),
    KeySpec(
        "fabric.sl", Kind.INTEGER, "InfiniBand service level, VLAN priority on RoCE", automatic="NCCL's", low=0, high=15
    ),
    KeySpec(
        "fabric.timeout",
        Kind.INTEGER,
        "InfiniBand acknowledge timeout t: 4.096 us * 2^t, seven times, before an error (20: 30 s; 23: 4 min)",
        automatic="NCCL's, 20",
        low=1,
        high=31,
    ),
    KeySpec("fabric.merge-nics", Kind.BOOLEAN, "Use the ports of one cable as one NIC", automatic="NCCL's, true"),
    _port("port", "Ray's control store, on the head", _RAY.port),
    _port("node-manager-port", "Ray's node manager, on every node", _RAY.node_manager_port),
    _port("object-manager-port", "Ray's object manager, on every node", _RAY.object_manager_port),
    _port("runtime-env-agent-port", "Ray's runtime-environment agent, on every node", _RAY.runtime_env_agent_port),
    _port("dashboard-agent-grpc-port", "Ray's dashboard agent (gRPC), on every node", _RAY.dashboard_agent_grpc_port),
    _port("metrics-export-port", "Ray's metrics, on every node", _RAY.metrics_export_port),
    _port(
        "dashboard-agent-listen-port", "Ray's dashboard agent (HTTP), on every node", _RAY.dashboard_agent_listen_port
    ),
    KeySpec("ray.dashboard-host", Kind.ADDRESS, "Address of Ray's dashboard, on the head", default=_RAY.dashboard_host),
    _port("dashboard-port", "Port of Ray's dashboard, on the head", _RAY.dashboard_port),
    KeySpec(
        "ray.worker-ports",
        Kind.PORT_RANGE,
        "First and last port of Ray's workers, both included",
        default=_RAY.worker_ports,
        low=1024,
        high=65535,
    ),
    KeySpec(
        "ray.object-store-memory",
        Kind.SIZE,
        "Ray's shared object store, per node",
        default=_RAY.object_store_bytes,
        unit="bytes",
        low=80 << 20,
        high=1 << 44,
    ),
    KeySpec(
        "container.image",
        Kind.TEXT,
        "Image of every node",
        default=_CONTAINER.image,
        pattern=IMAGE,
        pattern_hint=IMAGE_HINT,
    ),
    KeySpec(
        "container.ipc",
        Kind.CHOICE,
        "Shared memory: the container's own, or the host's",
        default=_CONTAINER.ipc,
        choices=IPC_MODES,
    ),
    KeySpec(
        "container.shm-size",
        Kind.SIZE,
        "Size of the container's own /dev/shm",
        default=_CONTAINER.shm_bytes,
        unit="bytes",
        low=64 << 20,
        high=1 << 42,
    ),
    KeySpec(
        "container.gpu-mode",
        Kind.CHOICE,
        "How GPUs reach the container: one way only",
        default=_CONTAINER.gpu_mode,
        choices=GPU_MODES,
    ),
    KeySpec(
        "container.network",
        Kind.TEXT,
        "host, or a network to create (for nodes on one machine)",
        default=_CONTAINER.network,
        pattern=r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}",
        pattern_hint="write host, or a name of letters, digits, '_', '.', '-'",
    ),
    KeySpec("env", Kind.VARIABLES, "Environment variables of every node", automatic="none"),
)
"""`clusters.<name>` without its nodes. A cluster with a `ray` block, even an empty one, runs Ray."""

NODE_KEYS: tuple[KeySpec, ...] = (
    KeySpec(
        "name",
        Kind.TEXT,
        "Name of the node, unique in its cluster",
        is_required=True,
        pattern=NODE_NAME,
        pattern_hint="use up to 63 letters, digits, '.', '_', '-'; start with a letter or digit",
    ),
    KeySpec(
        "role",
        Kind.CHOICE,
        "head serves the API and leads; a cluster has one",
        default="worker",
        choices=("head", "worker"),
    ),
    KeySpec("ip", Kind.ADDRESS, "Address on the fabric: Ray, Gloo and NCCL all use it", is_required=True),
    KeySpec(
        "ssh",
        Kind.TEXT,
        "Destination as plain `ssh` takes it: user@host, or a name of ~/.ssh/config",
        automatic="this host",
        pattern=r"[A-Za-z0-9_][A-Za-z0-9_.@:%\[\]-]{0,253}",
        pattern_hint="write user@host; it cannot start with '-'",
    ),
    KeySpec("gpus", Kind.INTEGER, "GPUs that may be used", default=Node("", "", "").gpus, unit="GPUs", low=0, high=64),
    KeySpec(
        "gpu-memory",
        Kind.SIZE,
        "Memory of each GPU",
        automatic="asked of the node",
        unit="bytes",
        low=1 << 28,
        high=1 << 44,
    ),
    KeySpec(
        "cpus", Kind.INTEGER, "Cores that may be used", automatic="asked of the node", unit="cores", low=1, high=4096
    ),
    KeySpec("memory", Kind.SIZE, "Main memory", automatic="asked of the node", unit="bytes", low=1 << 28, high=1 << 46),
    KeySpec(
        "ifname",
        Kind.TEXT,
        "Network interface that carries `ip`",
        automatic="asked of the node",
        pattern=INTERFACE,
        pattern_hint="write one name as `ip -br link` shows it, at most 15 characters",
    ),
    KeySpec(
        "hcas",
        Kind.TEXTS,
        "RDMA devices of this node",
        automatic="as fabric.hcas says",
        pattern=HCA,
        pattern_hint="write names as in /sys/class/infiniband: [rocep1s0f0, roceP2p1s0f0]",
    ),
    KeySpec(
        "gid-index",
        Kind.INTEGER,
        "GID of this node's RDMA devices, as `show_gids` counts; best left to fabric.gid-index",
        automatic="as fabric.gid-index says",
        low=0,
        high=255,
    ),
    KeySpec("env", Kind.VARIABLES, "Environment variables of this node, over the cluster's", automatic="none"),
)
"""One item of `clusters.<name>.nodes`."""
