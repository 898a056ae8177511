"""The TCP ports that a node of a launch listens on, for firewalls and people. Refuses to know: who listens now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.addresses import is_loopback
from launcher.errors import PreflightError
from launcher.registry.cluster import Cluster, Node, RaySettings


@dataclass(frozen=True, slots=True)
class Port:
    """A TCP port, or an inclusive range of them, that a node listens on.

    `address` is what it binds; `reached_from`: `clients`, `cluster` (the other nodes), or `host` (this node only).
    """

    name: str
    first: int
    last: int
    address: str
    reached_from: Literal["clients", "cluster", "host"]

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def node_ports(cluster: Cluster, node: Node, host: str, port: int) -> tuple[Port, ...]:
    """List a node's ports by name. The head serves the API on `host`:`port`; Ray listens on every address."""
    return tuple(sorted(_ports(cluster.ray, node, host, port), key=lambda item: item.name))


def _ports(ray: RaySettings | None, node: Node, host: str, port: int) -> Iterator[Port]:
    is_head = node.role == "head"
    if is_head:
        yield Port("api", port, port, host, "host" if is_loopback(host) else "clients")
    if ray is None:
        return
    everywhere = "0.0.0.0"
    if is_head:
        yield Port("ray", ray.port, ray.port, everywhere, "cluster")
        yield Port("ray-dashboard", ray.dashboard_port, ray.dashboard_port, ray.dashboard_host, "host")
    for name, number in (
        ("ray-node-manager", ray.node_manager_port),
        ("ray-object-manager", ray.object_manager_port),
        ("ray-runtime-env-agent", ray.runtime_env_agent_port),
        ("ray-dashboard-agent-grpc", ray.dashboard_agent_grpc_port),
        ("ray-dashboard-agent", ray.dashboard_agent_listen_port),
        ("ray-metrics", ray.metrics_export_port),
    ):
        yield Port(name, number, number, everywhere, "cluster")
    yield Port("ray-workers", *ray.worker_ports, everywhere, "cluster")


def port_clashes(node: str, ports: Sequence[Port]) -> list[PreflightError]:
    """Report ports of one node that overlap."""
    found = []
    for i, one in enumerate(ports):
        for other in ports[i + 1 :]:
            if one.first <= other.last and other.first <= one.last:
                message = f"{node}: ports {one.name} {one} and {other.name} {other} overlap"
                found.append(PreflightError(message, hint="give each its own, outside the cluster's ray.worker-ports"))
    return found
