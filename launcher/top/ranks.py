"""Ranks of a server: samples → what each does and holds → shares of time between two readings → rows.

Knows: hlaunch's own `hlaunch_rank_…` and `hlaunch_node_…`, which no other server has. Refuses to know: terminals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from launcher.top.exposition import Sample, natural

_VALUES: Mapping[str, str] = {
    "seconds": "hlaunch_rank_state_seconds",
    "idle": "hlaunch_rank_idle_seconds_total",
    "computing": "hlaunch_rank_computing_seconds_total",
    "waiting": "hlaunch_rank_waiting_seconds_total",
    "memory_bytes": "hlaunch_rank_memory_bytes",
    "watts": "hlaunch_rank_power_watts",
}
_SPENT = ("idle", "computing", "waiting")
_TRAFFIC: Mapping[str, str] = {
    "clock": "hlaunch_node_rdma_clock_seconds_total",
    "sent": "hlaunch_node_rdma_sent_bytes_total",
    "received": "hlaunch_node_rdma_received_bytes_total",
}
_MOST = 1e18
"""Beyond any count of bytes or seconds: also what is not finite is."""
Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank as the server describes it; `values` are seconds, bytes and watts, absent where it does not know."""

    engine: str
    rank: str
    node: str
    device: str
    state: str
    values: Mapping[str, float]

    @property
    def key(self) -> Key:
        return self.engine, self.rank


@dataclass(frozen=True, slots=True)
class RankReading:
    """All ranks in their order, and by node the bytes over RDMA, `sent` and `received` until `clock` in seconds."""

    ranks: tuple[Rank, ...] = ()
    traffic: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RankFigures:
    """A rank, and the shares of its time lately, 0 to 1, in which it computed and waited for others."""

    rank: Rank
    computing: float | None = None
    waiting: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The same as plain values; seconds, bytes, watts, shares of the time lately."""
        rank, values = self.rank, self.rank.values
        return {
            "engine": rank.engine or None,
            "rank": rank.rank,
            "node": rank.node or None,
            "device": rank.device or None,
            "state": rank.state or None,
            "state_seconds": rounded(values.get("seconds")),
            "computing_share": rounded(self.computing),
            "waiting_share": rounded(self.waiting),
            "memory_bytes": rounded(values.get("memory_bytes")),
            "power_watts": rounded(values.get("watts")),
        }


@dataclass(frozen=True, slots=True)
class RankPicture:
    """All ranks, and what each node carried over RDMA lately in bytes per second."""

    ranks: tuple[RankFigures, ...] = ()
    traffic: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def read_ranks(samples: Mapping[str, Sequence[Sample]]) -> RankReading:
    """Pick the ranks out of a server's samples; none where it tells of none."""
    values: dict[Key, dict[str, float]] = {}
    for word, name in _VALUES.items():
        for key, sample in _of_ranks(samples, name):
            if 0 <= sample.value < _MOST:
                values.setdefault(key, {})[word] = sample.value
    ranks = {
        key: Rank(
            *key,
            sample.labels.get("node", ""),
            sample.labels.get("device", ""),
            sample.labels.get("state", ""),
            values.get(key, {}),
        )
        for key, sample in _of_ranks(samples, "hlaunch_rank_state")
        if sample.value == 1
    }
    traffic: dict[str, dict[str, float]] = {}
    for word, name in _TRAFFIC.items():
        for sample in samples.get(name, ()):
            if 0 <= sample.value < _MOST and sample.labels.get("node"):
                traffic.setdefault(sample.labels["node"], {})[word] = sample.value
    return RankReading(tuple(sorted(ranks.values(), key=lambda rank: natural(rank.key))), traffic)


def compare(before: RankReading, now: RankReading, last: RankPicture) -> RankPicture:
    """Say what happened between two readings; where they are of the same moment, `last` stands.

    The server measures by its own clock, once a second: that of the two readings would tell of an idle second, and then
    of one that was twice as busy.
    """
    earlier = {rank.key: rank.values for rank in before.ranks}
    shown = {figures.rank.key: figures for figures in last.ranks}
    ranks = []
    for rank in now.ranks:
        spent = _growth(earlier.get(rank.key, {}), rank.values, _SPENT)
        if (total := sum(spent.values())) > 0:
            ranks.append(RankFigures(rank, spent.get("computing", 0.0) / total, spent.get("waiting", 0.0) / total))
        else:
            ranks.append(replace(shown[rank.key], rank=rank) if rank.key in shown else RankFigures(rank))
    traffic: dict[str, Mapping[str, float]] = {}
    for node, counts in now.traffic.items():
        carried = _growth(before.traffic.get(node, {}), counts, tuple(_TRAFFIC))
        if (seconds := carried.pop("clock", 0.0)) > 0:
            traffic[node] = {word: count / seconds for word, count in carried.items()}
        elif node in last.traffic:
            traffic[node] = last.traffic[node]
    return RankPicture(tuple(ranks), traffic)


def _growth(before: Mapping[str, float], now: Mapping[str, float], words: Sequence[str]) -> dict[str, float]:
    """What was added to each count that both know; one that fell belongs to a new process, and says nothing."""
    return {word: max(0.0, now[word] - before[word]) for word in words if word in now and word in before}


def _of_ranks(samples: Mapping[str, Sequence[Sample]], name: str) -> Iterator[tuple[Key, Sample]]:
    for sample in samples.get(name, ()):
        if rank := sample.labels.get("rank"):
            yield (sample.labels.get("engine", ""), rank), sample


def rounded(value: float | None) -> float | None:
    """Cut a figure to what `--json` tells."""
    return None if value is None else round(value, 6)
