"""What the RDMA counters of the nodes saw of a start: the proof that does not depend on anybody's log.

Knows: when to look, and how much movement proves something. Refuses to know: how a host is read
(`launcher.fabric.remote`), what counters count (`launcher.fabric.attest`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from launcher.fabric.attest import Traffic, Transport, carried_by_rdma, traffic_between
from launcher.fabric.facts import NodeFacts
from launcher.fabric.remote import Reach, read_cluster
from launcher.fabric.selection import platform_of
from launcher.fabric.transports import NOT_TOLD, PairTransport, TransportWrong
from launcher.registry.cluster import Cluster
from launcher.sizes import size

LEAST_BYTES = 64 << 10
"""A warm-up between ranks sends more; what subnet managers and pings send is less."""


def read_counters(cluster: Cluster, environ: Mapping[str, str]) -> dict[str, NodeFacts]:
    """Read the hosts whose fabric requires RDMA; empty for any other cluster, and without those that do not answer."""
    nodes = [node for node in cluster.nodes if platform_of(cluster, node) != "cpu"]
    if cluster.fabric.rdma != "required" or len(nodes) < 2:
        return {}
    read = read_cluster(cluster, nodes, Reach.by(environ, local_python=sys.executable))
    return {name: facts for name, facts in read.items() if isinstance(facts, NodeFacts)}


def traffic_of(before: Mapping[str, NodeFacts], after: Mapping[str, NodeFacts]) -> dict[str, tuple[Traffic, ...]]:
    """Compare two looks, by node; nodes without an HCA are left out."""
    found = {name: traffic_between(before[name], after[name]) for name in before if name in after}
    return {name: traffic for name, traffic in found.items() if traffic}


def check_silent_pairs(
    pairs: Sequence[PairTransport], traffic: Mapping[str, Sequence[Traffic]]
) -> tuple[PairTransport, ...]:
    """Let the counters speak for pairs of nodes whose ranks said nothing.

    Raises: TransportWrong when a node's HCAs did not move although its ranks exchanged tensors with another node.
    """
    found = []
    for pair in pairs:
        if pair.transport != NOT_TOLD or not pair.crosses_nodes or any(name not in traffic for name in pair.nodes):
            found.append(pair)
            continue
        idle = [name for name in pair.nodes if not carried_by_rdma(traffic[name], LEAST_BYTES)]
        if idle:
            counted = ", ".join(f"{item.hca} sent {item.sent_bytes} B" for item in traffic[idle[0]])
            raise TransportWrong(
                f"ranks {pair.ranks[0]} ({pair.nodes[0]}) and {pair.ranks[1]} ({pair.nodes[1]}) do not use RDMA: "
                f"the counters of {idle[0]} did not move ({counted}), and the fabric says rdma: required",
                hint="hlaunch doctor; NCCL_NET=IB forbids the fallback",
            )
        found.append(PairTransport(pair.ranks, pair.nodes, str(Transport.RDMA), ("by its counters",)))
    return tuple(found)


def traffic_lines(traffic: Mapping[str, Sequence[Traffic]]) -> list[str]:
    """One line per HCA that carried something or counted an error."""
    lines = []
    for name, items in traffic.items():
        for item in items:
            errors = ", ".join(f"{kind} {count}" for kind, count in item.errors.items())
            if item.sent_bytes or item.received_bytes or errors:
                moved = f"sent {size(item.sent_bytes)}, received {size(item.received_bytes)}"
                lines.append(f"{name} {item.hca}: {moved}" + (f"; errors: {errors}" if errors else ""))
    return lines
