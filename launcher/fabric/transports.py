"""The transport in use per pair of ranks of a launch, and whether it is the declared fabric's.

Pure. Knows: which pairs of ranks a placement connects, the logs of nodes, what a fabric promises. Refuses to know:
where logs are, what is done about a broken promise. A pair about which no log says anything stays in the list, as not
told: silence is not a transport.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engine.placement import Placement
from launcher.errors import HlaunchError
from launcher.exit_codes import ExitCode
from launcher.fabric import selection
from launcher.fabric.attest import Edge, Transport, edges_of, slowest
from launcher.registry.cluster import Cluster

NOT_TOLD = "not told"
ENVIRONMENT_FIX = "NCCL_DEBUG=INFO and NCCL_DEBUG_SUBSYS=INIT let NCCL say it"


class TransportWrong(HlaunchError):
    """A pair of ranks does not use the fabric that was declared."""

    exit_code = ExitCode.TRANSPORT


@dataclass(frozen=True, slots=True)
class PairTransport:
    """One connected pair, lower rank first, with the nodes of both. `ways` are the log's own words.

    `addresses` are the local ones of TCP connections, as the kernel has them.
    """

    ranks: tuple[int, int]
    nodes: tuple[str, str]
    transport: str
    ways: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()

    @property
    def crosses_nodes(self) -> bool:
        return self.nodes[0] != self.nodes[1]

    def to_data(self) -> dict[str, Any]:
        return asdict(self)


def read_pairs(data: object) -> tuple[PairTransport, ...]:
    """Read what `to_data` wrote, of a record that an older version may have left. Raises: TypeError, ValueError."""
    if not isinstance(data, list):
        raise TypeError("a list of pairs")
    return tuple(
        PairTransport(
            (int(item["ranks"][0]), int(item["ranks"][1])),
            (str(item["nodes"][0]), str(item["nodes"][1])),
            str(item["transport"]),
            tuple(map(str, item["ways"])),
            tuple(map(str, item["addresses"])),
        )
        for item in data
    )


def connected_pairs(placement: Placement) -> list[tuple[int, int]]:
    """List the pairs that a placement connects: ranks of a stage, and each rank with its next one in the pipeline."""
    found: set[tuple[int, int]] = set()
    for group in placement.tp_groups:
        found |= {(low, high) for low in group for high in group if low < high}
    for engine in range(placement.data_parallel_size):
        for stage in range(placement.pipeline_parallel_size - 1):
            before, after = placement.stage(engine, stage), placement.stage(engine, stage + 1)
            found |= {(one.rank, other.rank) for one, other in zip(before, after, strict=True)}
    return sorted(found)


def transports_of(placement: Placement, logs: Iterable[Iterable[str]]) -> tuple[PairTransport, ...]:
    """Find the transport of every connected pair in the logs, one per node; pairs beyond the placement come after.

    A ring connects neighbours only, so of an NCCL group of more than two not every pair has lines: the pairs that have
    none are left out as soon as each of the two ranks has one with another rank of the group.
    """
    edges: dict[tuple[int, int], list[Edge]] = {}
    for lines in logs:
        for edge in edges_of(lines):
            pair = (min(edge.source, edge.target), max(edge.source, edge.target))
            if not _is_between_hosts_of_gpus(placement, pair, edge):
                edges.setdefault(pair, []).append(edge)
    expected = connected_pairs(placement)
    told = {rank for pair in edges for rank in pair}
    group_of = {rank: group for group in placement.tp_groups for rank in group}
    found = []
    for pair in [*expected, *sorted(set(edges) - set(expected))]:
        if max(pair) >= len(placement.ranks):
            continue
        known = edges.get(pair, [])
        is_ring = len(group_of.get(pair[0], ())) > 2 and group_of.get(pair[0]) == group_of.get(pair[1])
        if not known and is_ring and told.issuperset(pair):
            continue
        one, other = (placement.ranks[rank].node for rank in pair)
        found.append(
            PairTransport(
                pair,
                (one, other),
                str(slowest(edge.transport for edge in known)) if known else NOT_TOLD,
                tuple(dict.fromkeys(edge.way for edge in known)),
                tuple(dict.fromkeys(address for edge in known for address in edge.addresses)),
            )
        )
    return tuple(found)


def _is_between_hosts_of_gpus(placement: Placement, pair: tuple[int, int], edge: Edge) -> bool:
    """Whether an edge carries only what two GPU ranks need to find each other; their tensors go by NCCL."""
    if max(pair) >= len(placement.ranks) or not edge.way.startswith(("NET/Gloo", "SHM/group", "SHM/ring")):
        return False
    return all(placement.ranks[rank].backend == "cuda" for rank in pair)


def problems(pairs: Sequence[PairTransport], cluster: Cluster) -> list[str]:
    """Say which pairs do not use the declared fabric, one sentence each with the evidence; empty: as declared.

    Gloo carries what CPU ranks exchange and is always TCP: it must keep to the fabric's addresses. NCCL must use RDMA
    where it is required, and must not where it is off.
    """
    nodes = {node.name: node for node in cluster.nodes}
    found = []
    for pair in pairs:
        is_gloo = any(way.startswith("NET/Gloo") for way in pair.ways)
        who = f"ranks {pair.ranks[0]} ({pair.nodes[0]}) and {pair.ranks[1]} ({pair.nodes[1]})"
        evidence = f"{pair.transport} ({', '.join(pair.ways)})"
        platforms = {selection.platform_of(cluster, nodes[name]) for name in pair.nodes if name in nodes}
        if pair.crosses_nodes and is_gloo:
            found += _astray(pair, who, cluster)
        elif pair.crosses_nodes and pair.transport in (Transport.SOCKET, Transport.UNKNOWN):
            if cluster.fabric.rdma == "required":
                found.append(f"{who} use {evidence}, and the fabric says rdma: required")
        elif pair.transport in (Transport.RDMA, Transport.RDMA_GDR):
            if cluster.fabric.rdma == "off":
                found.append(f"{who} use {evidence}, and the fabric says rdma: off")
            elif pair.transport == Transport.RDMA_GDR and "gb10" in platforms:
                found.append(f"{who} use {evidence}, which does not work on GB10")
    return found


def _astray(pair: PairTransport, who: str, cluster: Cluster) -> list[str]:
    """Name addresses of a pair that are neither a node's own nor in the fabric's subnet."""
    known = {node.ip for node in cluster.nodes}
    subnet = cluster.fabric.subnet
    lost = [
        address
        for address in pair.addresses
        if address not in known and not (subnet is not None and selection.in_subnet(address, subnet))
    ]
    if not lost:
        return []
    declared = subnet or ", ".join(sorted(known))
    return [f"{who} talk over {', '.join(lost)}, and the fabric is {declared}"]


def check(pairs: Sequence[PairTransport], cluster: Cluster) -> None:
    """Hold what is in use against what is declared. Raises: TransportWrong with the first cause, more as details."""
    found = problems(pairs, cluster)
    if found:
        fix = f"hlaunch doctor --cluster {cluster.name}; NCCL_NET=IB forbids the fallback"
        if "talk over" in found[0]:
            fix = "set 'ip' and 'ifname' of each node in the registry; hlaunch env --explain GLOO_SOCKET_IFNAME"
        raise TransportWrong(found[0], details=found[1:], hint=fix)


def silence(pairs: Sequence[PairTransport], cluster: Cluster) -> str:
    """Say that pairs between nodes told nothing although RDMA is required; empty when nothing is missing."""
    quiet = [pair for pair in pairs if pair.transport == NOT_TOLD and pair.crosses_nodes]
    if not quiet or cluster.fabric.rdma != "required":
        return ""
    of_which = "1 pair of ranks says nothing of its"
    if len(quiet) > 1:
        of_which = f"{len(quiet)} pairs of ranks say nothing of their"
    return f"{of_which} transport: {ENVIRONMENT_FIX}"


def summary(pairs: Sequence[PairTransport]) -> list[str]:
    """Put pairs with the same nodes and transport into one line: `one - two: TCP (10.0.0.1), 4 pairs`."""
    groups: dict[tuple[tuple[str, str], str, tuple[str, ...]], list[PairTransport]] = {}
    for pair in pairs:
        groups.setdefault((pair.nodes, pair.transport, _detail(pair)), []).append(pair)
    lines = []
    for (nodes, transport, detail), members in groups.items():
        where = nodes[0] if nodes[0] == nodes[1] else f"{nodes[0]} - {nodes[1]}"
        ranks = ", ".join(f"{pair.ranks[0]}-{pair.ranks[1]}" for pair in members[:6])
        detail_text = f" ({', '.join(detail)})" if detail else ""
        more = f" and {len(members) - 6} more" if len(members) > 6 else ""
        lines.append(f"{where}: {transport}{detail_text}, ranks {ranks}{more}")
    return lines


def _detail(pair: PairTransport) -> tuple[str, ...]:
    """Shorten the log's words: the kinds of ways without channel and device numbers."""
    kinds = [way.split("/")[1] if way.startswith("NET/") else "/".join(way.split("/")[:2]) for way in pair.ways]
    return tuple(dict.fromkeys([*kinds, *pair.addresses]))
