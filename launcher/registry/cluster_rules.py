"""Rules inside one cluster: its nodes, addresses, ports and variables, each finding at the text to blame.

Knows: what a declared cluster must be to work at all. Refuses to know: models (`launcher.registry.placement_rules`),
what the hosts really have (`launcher.fabric`).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from launcher.errors import Issue, Severity
from launcher.registry.cluster import RDMA_FIELDS, Cluster, RaySettings
from launcher.registry.contradictions import contradictions
from launcher.registry.types import DeclaredCluster, Mark, Setting
from launcher.registry.values import holds_secret

EPHEMERAL_PORTS = (32768, 60999)
"""Linux gives these to outgoing connections: a server there fails to bind now and then."""
RAY_CLIENT_PORT = 10001
"""Ray's client server starts here and cannot be switched off."""

_NODE_RDMA = ("hcas", "gid-index")


@dataclass(frozen=True, slots=True)
class _Found:
    severity: Severity
    code: str
    path: tuple[str, ...]
    message: str
    hint: str
    is_key: bool = False


def cluster_issues(declared: DeclaredCluster, source: str) -> list[Issue]:
    """Return every broken rule of one cluster."""
    found = [
        *_heads(declared.cluster),
        *_node_names(declared.cluster),
        *_addresses(declared.cluster),
        *_unused(declared),
        *_ports(declared),
        *_container(declared),
        *_variables(declared),
    ]
    return [_issue(item, declared, source) for item in found]


def ray_ports(ray: RaySettings) -> dict[str, int]:
    """The single ports of Ray: key below `ray` -> port. The client server's is fixed by Ray."""
    return {
        "port": ray.port,
        "node-manager-port": ray.node_manager_port,
        "object-manager-port": ray.object_manager_port,
        "runtime-env-agent-port": ray.runtime_env_agent_port,
        "dashboard-agent-grpc-port": ray.dashboard_agent_grpc_port,
        "metrics-export-port": ray.metrics_export_port,
        "dashboard-agent-listen-port": ray.dashboard_agent_listen_port,
        "dashboard-port": ray.dashboard_port,
    }


def _issue(found: _Found, declared: DeclaredCluster, source: str) -> Issue:
    mark: Mark = declared.find(*found.path, is_key=found.is_key)
    path = ".".join(("clusters", declared.name, *found.path))
    return Issue(found.severity, found.code, source, mark.line, mark.column, path, found.message, found.hint)


def _heads(cluster: Cluster) -> Iterator[_Found]:
    heads = [index for index, node in enumerate(cluster.nodes) if node.role == "head"]
    if not heads:
        yield _Found("error", "head-count", ("nodes",), "no node has the role head", "add role: head to one", True)
    for index in heads[1:]:
        message = f"a second head: {cluster.nodes[heads[0]].name} is one already"
        yield _Found("error", "head-count", ("nodes", str(index), "role"), message, "write role: worker")


def _node_names(cluster: Cluster) -> Iterator[_Found]:
    seen: set[str] = set()
    for index, node in enumerate(cluster.nodes):
        if node.name.casefold() in seen:
            message = f"another node of the cluster is called {node.name}, in some case"
            yield _Found("error", "name-clash", ("nodes", str(index), "name"), message, "rename one")
        seen.add(node.name.casefold())


def _addresses(cluster: Cluster) -> Iterator[_Found]:
    subnet = ipaddress.ip_network(cluster.fabric.subnet) if cluster.fabric.subnet else None
    owners: dict[str, str] = {}
    for index, node in enumerate(cluster.nodes):
        path = ("nodes", str(index), "ip")
        address = ipaddress.ip_address(node.ip)
        if node.ip in owners:
            message = f"{node.ip} is already the address of {owners[node.ip]}"
            yield _Found("error", "node-ip-subnet", path, message, "each node has its own address")
        elif address.is_unspecified or address.is_multicast:
            yield _Found(
                "error", "node-ip-subnet", path, f"{node.ip} is no host's address", "write the node's fabric address"
            )
        elif address.is_loopback and cluster.ray is not None:
            message = f"Ray tells other nodes where this one is, and {node.ip} is each node itself: none ever joins"
            yield _Found("error", "node-ip-subnet", path, message, "write the host's own address, or remove ray")
        elif subnet is not None and address not in subnet:
            message = f"{node.ip} is outside fabric.subnet {subnet}"
            yield _Found("error", "node-ip-subnet", path, message, "correct the address or the subnet")
        owners.setdefault(node.ip, node.name)


def _unused(declared: DeclaredCluster) -> Iterator[_Found]:
    """Find what speaks of RDMA where RDMA is off: nothing reads it, and everything goes over TCP."""
    if declared.cluster.fabric.rdma != "off":
        return
    paths: list[tuple[str, ...]] = [("fabric", key) for key in RDMA_FIELDS]
    paths += [("nodes", str(index), key) for index in range(len(declared.cluster.nodes)) for key in _NODE_RDMA]
    for path in paths:
        if path in declared.marks:
            message = "with rdma: off nothing reads this, and the ranks talk over TCP"
            yield _Found("warning", "fabric-unused", path, message, "write rdma: required or preferred, or remove it")


def _ports(declared: DeclaredCluster) -> Iterator[_Found]:
    ray = declared.cluster.ray
    if ray is None:
        return
    first, last = ray.worker_ports
    owners = {RAY_CLIENT_PORT: "Ray's client server"}
    if first <= RAY_CLIENT_PORT <= last:
        message = f"{first}-{last} holds {RAY_CLIENT_PORT}, where Ray's client server listens"
        yield _Found("error", "port-clash", ("ray", "worker-ports"), message, f"start at {RAY_CLIENT_PORT + 1}")
    # Of two that clash, the one that somebody wrote is to blame.
    for key, port in sorted(ray_ports(ray).items(), key=lambda item: ("ray", item[0]) in declared.marks):
        if port in owners:
            yield _Found(
                "error", "port-clash", ("ray", key), f"{port} is already {owners[port]}", "give each its own port"
            )
        elif first <= port <= last:
            message = f"{port} is inside worker-ports {first}-{last}: Ray refuses to start"
            yield _Found("error", "port-clash", ("ray", key), message, "choose a port outside")
        elif EPHEMERAL_PORTS[0] <= port <= EPHEMERAL_PORTS[1]:
            message = f"{port} is in Linux's range for outgoing connections ({'-'.join(map(str, EPHEMERAL_PORTS))})"
            yield _Found("warning", "ephemeral-overlap", ("ray", key), message, "choose a port below 32768")
        owners.setdefault(port, f"ray.{key}")
    if last >= EPHEMERAL_PORTS[0]:
        message = f"{first}-{last} reaches into Linux's range for outgoing connections"
        yield _Found("warning", "ephemeral-overlap", ("ray", "worker-ports"), message, "end at 32767 or below")


def _container(declared: DeclaredCluster) -> Iterator[_Found]:
    cluster = declared.cluster
    if cluster.container.ipc == "host" and ("container", "shm-size") in declared.marks:
        message = "with ipc: host the container has the host's /dev/shm: this size does nothing"
        yield _Found("warning", "shm-inert", ("container", "shm-size"), message, "remove it, or write ipc: private")
    if cluster.container.network != "host" and cluster.fabric.rdma == "required":
        message = f"rdma is required, but the network {cluster.container.network} hides the host's RDMA addresses"
        yield _Found("warning", "rdma-network", ("container", "network"), message, "write network: host")


def _variables(declared: DeclaredCluster) -> Iterator[_Found]:
    fabric = declared.cluster.fabric
    for item in contradictions(fabric, declared.cluster.env):
        if _is_written(declared, item.field):
            yield _contradiction(("env", item.variable), item.field, item.message)
    yield from _secrets(("env",), declared.env)
    for index, node in enumerate(declared.cluster.nodes):
        path = ("nodes", str(index), "env")
        for item in contradictions(fabric, node.env, node):
            if _is_written(declared, item.field):
                yield _contradiction((*path, item.variable), item.field, item.message)
        yield from _secrets(path, declared.node_env.get(node.name, {}))


def _is_written(declared: DeclaredCluster, field: str) -> bool:
    """Whether the file states the field; a default contradicts nobody. A node's fields count when they are set."""
    return not field.startswith("fabric.") or tuple(field.split(".")) in declared.marks


def _contradiction(path: tuple[str, ...], field: str, message: str) -> _Found:
    return _Found("error", "env-contradicts-fabric", path, message, f"remove the variable; {field} sets it")


def _secrets(path: tuple[str, ...], env: Mapping[str, Setting]) -> Iterator[_Found]:
    for name, setting in env.items():
        if setting.value and holds_secret(name, str(setting.value)):
            message = "looks like a secret that stands in the registry"
            yield _Found("warning", "secret-literal", (*path, name), message, f"remove it and export {name} instead")
