"""What ranks do, hold and draw, as metrics: one sample per rank, with where it is as labels.

Knows: names and labels. Refuses to know: how anything was measured (`engine.usage` says what each figure is).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from engine.usage import EngineUsage, NodeTraffic, RankUsage

_Read = Callable[[RankUsage], float]
_LABELS = ("model_name", "engine", "rank", "node", "device")
_COUNTERS: tuple[tuple[str, str, _Read], ...] = (
    ("hlaunch_rank_idle_seconds", "Time between steps, and with none to do.", lambda rank: rank.idle_seconds),
    ("hlaunch_rank_computing_seconds", "Time in steps, without waiting.", lambda rank: rank.computing_seconds),
    ("hlaunch_rank_waiting_seconds", "Time in steps waiting for other ranks.", lambda rank: rank.waiting_seconds),
)
_GAUGES: tuple[tuple[str, str, _Read], ...] = (
    ("hlaunch_rank_state_seconds", "How long a rank has been in its state.", lambda rank: rank.seconds),
    ("hlaunch_rank_memory_bytes", "Memory in use: a GPU's, or a CPU rank's process's.", lambda rank: rank.memory_bytes),
    ("hlaunch_rank_power_watts", "What a rank's GPU draws.", lambda rank: rank.watts),
)
_TRAFFIC: tuple[tuple[str, str, Callable[[NodeTraffic], float]], ...] = (
    ("hlaunch_node_rdma_clock_seconds", "When a node's RDMA bytes were read, by its clock.", lambda node: node.seconds),
    ("hlaunch_node_rdma_sent_bytes", "Bytes that a node's RDMA ports have sent.", lambda node: node.sent_bytes),
    ("hlaunch_node_rdma_received_bytes", "Bytes that they have received.", lambda node: node.received_bytes),
)
_CAN_BE_UNKNOWN = ("hlaunch_rank_memory_bytes", "hlaunch_rank_power_watts")


def collect_ranks(model_name: str, usages: Sequence[EngineUsage]) -> Iterator[Metric]:
    """Describe the ranks of engines, which come in the order of their data-parallel ranks."""
    ranks = [
        ((model_name, str(engine), str(rank.rank), rank.node, rank.device), rank)
        for engine, usage in enumerate(usages)
        for rank in usage.ranks
    ]
    states = GaugeMetricFamily("hlaunch_rank_state", "1 for what a rank does.", labels=[*_LABELS, "state"])
    for labels, rank in ranks:
        states.add_metric([*labels, rank.state], 1)
    yield states
    for kind, wanted in ((CounterMetricFamily, _COUNTERS), (GaugeMetricFamily, _GAUGES)):
        for name, text, read in wanted:
            family = kind(name, text, labels=_LABELS)
            for labels, rank in ranks:
                if (value := read(rank)) or name not in _CAN_BE_UNKNOWN:
                    family.add_metric(labels, value)
            yield family
    yield from _collect_traffic(usages)


def _collect_traffic(usages: Sequence[EngineUsage]) -> Iterator[Metric]:
    """A node may be of several engines, and its ports are its own: the latest of what they say counts."""
    latest: dict[str, NodeTraffic] = {}
    for usage in usages:
        for node in usage.traffic:
            if node.node not in latest or node.seconds > latest[node.node].seconds:
                latest[node.node] = node
    for name, text, read in _TRAFFIC:
        family = CounterMetricFamily(name, text, labels=["node"])
        for node in latest.values():
            family.add_metric([node.node], read(node))
        yield family
