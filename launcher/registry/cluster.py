"""A declared cluster: its nodes, the fabric between them, Ray, the container. Frozen values, all defaults filled in.

Knows: the shape of `clusters.<name>` after resolving. Refuses to know: how it was written, and what any host really has
(`launcher.plan.inventory`, `launcher.fabric`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Node:
    """One host. `ip` is its address on the fabric and drives Ray, Gloo and NCCL alike; units: bytes, counts.

    `ssh` is a destination as plain `ssh` takes it, None for this host. `gpu_memory_bytes`, `cpus` and `memory_bytes` 0:
    ask the host. `hcas` empty and `gid_index` None: as the cluster's fabric says.
    """

    name: str
    role: str
    ip: str
    ssh: str | None = None
    gpus: int = 0
    gpu_memory_bytes: int = 0
    cpus: int = 0
    memory_bytes: int = 0
    ifname: str | None = None
    hcas: tuple[str, ...] = ()
    gid_index: int | None = None
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


RDMA_FIELDS = ("hcas", "gid-index", "tc", "sl", "timeout", "merge-nics")
"""Keys of `fabric` that speak of RDMA alone: where one stands, RDMA is preferred unless `rdma` says otherwise."""


@dataclass(frozen=True, slots=True)
class Fabric:
    """What carries data between nodes. `gid_index`: auto | auto-pin; `hcas` empty: auto.

    `rdma`: required | preferred | off. `mtu` bytes, `timeout` and `traffic_class` as NCCL counts them.
    """

    rdma: str = "off"
    hcas: tuple[str, ...] = ()
    gid_index: int | str = "auto"
    subnet: str | None = None
    mtu: int | None = None
    traffic_class: int | None = None
    service_level: int | None = None
    timeout: int | None = None
    merge_nics: bool | None = None


@dataclass(frozen=True, slots=True)
class RaySettings:
    """Ports are pinned, so that a firewall can be written down. `worker_ports` is inclusive."""

    port: int = 6379
    node_manager_port: int = 6380
    object_manager_port: int = 6381
    runtime_env_agent_port: int = 6382
    dashboard_agent_grpc_port: int = 6383
    metrics_export_port: int = 6384
    dashboard_agent_listen_port: int = 6385
    dashboard_host: str = "127.0.0.1"
    dashboard_port: int = 8265
    worker_ports: tuple[int, int] = (10002, 19999)
    object_store_bytes: int = 2 << 30


@dataclass(frozen=True, slots=True)
class Container:
    """How a node runs in Docker. `gpu_mode`: reservation | gpus | cdi | none; `network`: host, or a name to create.

    `ipc`: private | host.
    """

    image: str = "hlaunch-engine:latest"
    ipc: str = "private"
    shm_bytes: int = 16 << 30
    gpu_mode: str = "reservation"
    network: str = "host"


@dataclass(frozen=True, slots=True)
class Cluster:
    """One cluster, resolved. `platform`: auto | generic | hopper | gb10 | blackwell | cpu. `ray` None: no Ray."""

    name: str
    nodes: tuple[Node, ...]
    platform: str = "auto"
    fabric: Fabric = Fabric()
    ray: RaySettings | None = None
    container: Container = Container()
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def head(self) -> Node:
        """The node with the role `head`; a resolved cluster has exactly one."""
        return next(node for node in self.nodes if node.role == "head")

    @property
    def workers(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if node.role != "head")
