"""A declared cluster as inventories: what the registry says of each node, for plans made far from the machines."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from launcher.plan.inventory.values import Gpu, Inventory, Nic, RdmaPort
from launcher.registry.cluster import Cluster, Node
from launcher.sizes import GIB, counted

# (name, memory, capability) of one GPU, where the declaration gives a platform and no size.
PLATFORM_GPUS: Mapping[str, tuple[str, int, tuple[int, int]]] = {
    "hopper": ("NVIDIA H100 80GB HBM3", 80 * GIB, (9, 0)),
    "blackwell": ("NVIDIA B200", 180 * GIB, (10, 0)),
    "gb10": ("NVIDIA GB10", int(119.7 * GIB), (12, 1)),
    "generic": ("NVIDIA GPU", 24 * GIB, (8, 0)),
    "auto": ("NVIDIA GPU", 24 * GIB, (8, 0)),
}
# Cores and memory of a node that declares none: enough to plan CPU ranks; `assumption` says so.
DEFAULT_CORES = 16
DEFAULT_MEMORY = 128 * GIB


def declared_inventories(cluster: Cluster) -> dict[str, Inventory]:
    """Turn a cluster's declaration into one inventory for each node, in declared order.

    What a node leaves open comes from its platform: `source` says `declared`, and a real inventory is better.
    """
    return {node.name: _inventory(cluster, node) for node in cluster.nodes}


def assumption(cluster: Cluster, inventories: Mapping[str, Inventory], backends: Mapping[str, Collection[str]]) -> str:
    """Say in one line what nobody declared of the nodes that ranks use, and what was taken instead; empty if nothing.

    `backends` has the kinds of ranks (`cuda`, `cpu`) by node. A saved or read inventory leaves nothing to assume, and
    what a GB10 has needs no declaration.
    """
    nodes_of: dict[tuple[str, str], list[str]] = {}
    for node in cluster.nodes:
        if inventories[node.name].source == _source(cluster):
            for assumed in _assumed(cluster, node, inventories[node.name], backends.get(node.name, ())):
                nodes_of.setdefault(assumed, []).append(node.name)
    return "; ".join(
        f"{key} of {', '.join(names)} is not declared: {value} assumed" for (key, value), names in nodes_of.items()
    )


def _assumed(cluster: Cluster, node: Node, inventory: Inventory, kinds: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of all that `_inventory` made up and ranks of these kinds need."""
    is_unified = cluster.platform == "gb10"
    if "cuda" in kinds and not node.gpu_memory_bytes and not is_unified:
        yield "gpu-memory", f"{inventory.gpus[0].memory_bytes / GIB:g} GiB"
    if "cpu" in kinds and not node.cpus and not node.gpus:
        yield "cpus", counted(DEFAULT_CORES, "core")
    if "cpu" in kinds and not node.memory_bytes and not is_unified:
        yield "memory", f"{DEFAULT_MEMORY // GIB} GiB"


def _source(cluster: Cluster) -> str:
    return f"declared in cluster {cluster.name}"


def _inventory(cluster: Cluster, node: Node) -> Inventory:
    name, memory, capability = PLATFORM_GPUS.get(cluster.platform, PLATFORM_GPUS["generic"])
    is_unified = cluster.platform == "gb10"
    size = node.gpu_memory_bytes or memory
    host_memory = node.memory_bytes or (size if is_unified else DEFAULT_MEMORY)
    gpus = tuple(Gpu(index, name, size, size, capability, is_unified=is_unified) for index in range(node.gpus))
    hcas = node.hcas or cluster.fabric.hcas
    uses_rdma = cluster.fabric.rdma != "off"
    ports = tuple(RdmaPort(hca, 1, "ACTIVE", netdev=node.ifname or "") for hca in hcas) if uses_rdma else ()
    nics = (Nic(node.ifname, "up", addresses=(node.ip,), mtu=cluster.fabric.mtu or 0),) if node.ifname else ()
    return Inventory(
        node=node.name,
        cpu_name="CPU",
        cpu_cores=node.cpus or DEFAULT_CORES,
        numa_nodes=1,
        memory_total_bytes=host_memory,
        memory_available_bytes=host_memory,
        gpus=gpus,
        nics=nics,
        rdma_ports=ports,
        source=_source(cluster),
    )
