"""Which interface and which HCAs of a node belong to the fabric: as declared, else as measured.

Pure. Knows: the node's block, the fabric's fields, the facts of the host when there are any. Refuses to know: what is
wrong with them (`checks_rdma`), how they are written as variables (`environment`).
"""

from __future__ import annotations

import ipaddress

from launcher.fabric.facts import Hca, NodeFacts
from launcher.registry.cluster import Cluster, Node

GPU_PLATFORMS = {
    "gb10": ("GB10",),
    "hopper": ("H100", "H200", "GH200", "H800", "H20"),
    "blackwell": ("B200", "B300", "GB200", "GB300", "B100"),
}


def platform_of(cluster: Cluster, node: Node, facts: NodeFacts | None = None) -> str:
    """Return the preset of a node: as declared, else by its GPU's name; a node without GPUs is `cpu`."""
    if node.gpus == 0 and (facts is None or not facts.gpus or cluster.platform == "cpu"):
        return "cpu"
    if cluster.platform != "auto":
        return cluster.platform
    names = " ".join(gpu.name for gpu in facts.gpus) if facts is not None else ""
    for platform, words in GPU_PLATFORMS.items():
        if any(word in names.split() or f"{word} " in f"{names} " for word in words):
            return platform
    return "generic"


def interface_of(node: Node, facts: NodeFacts | None = None) -> str | None:
    """Return the interface that carries the node's ip; None when only the host could tell."""
    if node.ifname is not None:
        return node.ifname
    netdev = facts.netdev_with(node.ip) if facts is not None else None
    return netdev.name if netdev is not None else None


def in_subnet(address: str, subnet: str | None) -> bool:
    """Say whether an address is inside the fabric; without a declared subnet every address is."""
    if subnet is None:
        return True
    try:
        return ipaddress.ip_address(address) in ipaddress.ip_network(subnet, strict=False)
    except ValueError:
        return False


def hca_names_of(cluster: Cluster, node: Node, facts: NodeFacts | None = None) -> tuple[str, ...]:
    """Return the HCAs of a node: its own list, the fabric's list, else the ACTIVE ones and their twins."""
    declared = node.hcas or cluster.fabric.hcas
    if declared:
        return declared
    if facts is None:
        return ()
    chosen = [hca for hca in facts.hcas if hca.is_active and _carries(hca, node, cluster.fabric.subnet, facts)]
    twins = [twin for hca in chosen for twin in facts.twins(hca) if twin.is_active]
    return tuple(sorted({hca.name for hca in (*chosen, *twins)}))


def hcas_of(cluster: Cluster, node: Node, facts: NodeFacts) -> tuple[Hca, ...]:
    """Return the chosen HCAs that the host really has."""
    found = (facts.hca(name.partition(":")[0]) for name in hca_names_of(cluster, node, facts))
    return tuple(hca for hca in found if hca is not None)


def _carries(hca: Hca, node: Node, subnet: str | None, facts: NodeFacts) -> bool:
    if not hca.is_ethernet:
        return True
    ips = [ip for netdev in facts.netdevs if netdev.name in hca.netdevs for ip in netdev.ips]
    if subnet is not None:
        return any(in_subnet(ip, subnet) for ip in ips)
    return node.ip in ips


def gid_in(hca: Hca, subnet: str | None) -> int | None:
    """Return the index of an HCA's RoCE v2 GID with an address inside `subnet`; None without one."""
    for port in hca.ports:
        for gid in port.gids:
            if gid.is_v2 and gid.ipv4 is not None and in_subnet(gid.ipv4, subnet):
                return gid.index
    return None


def gid_of(hca: Hca, subnet: str | None) -> int | None:
    """Return the index of the GID to use: inside the fabric's subnet, else of a twin's own; None without RoCE v2."""
    index = gid_in(hca, subnet)
    return index if index is not None else gid_in(hca, None)


def pinned_gid(cluster: Cluster, node: Node, facts: NodeFacts) -> int | None:
    """Return the one index that is right for every chosen HCA of a node; None when they differ or have none."""
    found = {gid_of(hca, cluster.fabric.subnet) for hca in hcas_of(cluster, node, facts)}
    return found.pop() if len(found) == 1 else None


def range_covers(cluster: Cluster, node: Node, facts: NodeFacts) -> bool:
    """Say whether every chosen HCA has a RoCE v2 GID inside the fabric's subnet."""
    subnet = cluster.fabric.subnet
    chosen = hcas_of(cluster, node, facts)
    return subnet is not None and bool(chosen) and all(gid_in(hca, subnet) is not None for hca in chosen)
