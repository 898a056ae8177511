"""The ports that a cluster pins on a node, and those that other nodes must be able to reach.

Pure. Knows: what to open and what to close; the table itself is `launcher.plan.node_ports`. Refuses to know: whether a
port is free (`checks_host`).
"""

from __future__ import annotations

from launcher.plan.joined_nodes import DEFAULT_HEAD_PORT
from launcher.plan.node_ports import Port, node_ports
from launcher.registry.cluster import Cluster, Node

RAY_CLIENT_PORT = 10001
"""Ray's client server starts whenever grpcio is installed, and has no switch."""
CONNECTIONS = (32768, 60999)
"""Linux's ephemeral range: NCCL, Gloo, the ranks' stores and the links between nodes listen where the kernel puts them.
Neither NCCL nor Gloo can be told a port."""


def _ports(cluster: Cluster, node: Node, api_port: int | None) -> list[Port]:
    """List the node's ports; a port of the API only when there is a model."""
    ports = node_ports(cluster, node, "127.0.0.1", api_port or 0)
    return [port for port in ports if api_port is not None or port.name != "api"]


def pinned_ports(cluster: Cluster, node: Node, api_port: int | None = None) -> dict[int, str]:
    """Map each pinned port of a node to its use; ranges of workers are not among them."""
    found = {port.first: port.name for port in _ports(cluster, node, api_port) if port.first == port.last}
    if cluster.ray is not None and node.role == "head":
        found[RAY_CLIENT_PORT] = "ray-client-server"
    return found


def open_ranges(cluster: Cluster, node: Node) -> tuple[tuple[int, int, str], ...]:
    """List the ranges of ports that other nodes must reach on a node, adjoining ones joined: first, last, use."""
    ranges: list[tuple[int, int, str]] = [(*CONNECTIONS, "nccl, gloo, engine")]
    ranges += [
        (port.first, port.last, port.name) for port in _ports(cluster, node, None) if port.reached_from == "cluster"
    ]
    if cluster.ray is None and node.role == "head" and len(cluster.nodes) > 1:
        # Without Ray nodes come to the head by themselves: `up --nnodes`.
        ranges.append((DEFAULT_HEAD_PORT, DEFAULT_HEAD_PORT, "nodes that join"))
    joined: list[tuple[int, int, str]] = []
    for first, last, use in sorted(ranges):
        if joined and first == joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], last, f"{joined[-1][2].partition(' ')[0]} ...")
        else:
            joined.append((first, last, use))
    return tuple(joined)


def closed_ranges(cluster: Cluster, node: Node) -> tuple[tuple[int, int], ...]:
    """List the pinned ranges that nobody but the nodes may reach; Ray listens on every address whatever it is told."""
    if cluster.ray is None:
        return ()
    opened = [(first, last) for first, last, use in open_ranges(cluster, node) if first != CONNECTIONS[0]]
    head_only = [(cluster.ray.dashboard_port,) * 2, (RAY_CLIENT_PORT, RAY_CLIENT_PORT)] if node.role == "head" else []
    return tuple(sorted([*opened, *head_only]))
