"""What the ranks of an engine do, hold and draw, and what their nodes carry over RDMA: for /metrics and `hlaunch top`.

Knows: values and how often they are taken. Refuses to know: how each is measured, what is done with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

USAGE_INTERVAL_SECONDS = 1.0
SILENT_SECONDS = 3.0
"""Figures that are older are no more than the last that was heard."""


@dataclass(frozen=True, slots=True)
class DeviceUsage:
    """Memory in use, in bytes, and power in watts; 0 where it is unknown."""

    memory_bytes: int = 0
    watts: float = 0.0


@dataclass(frozen=True, slots=True)
class RankUsage:
    """One rank: `state` for the last `seconds`; how long it has idled, computed and waited for others since it serves.

    `memory_bytes` and `watts` are its device's where that is a GPU, and its process's memory on a CPU.
    """

    rank: int
    node: str
    device: str
    state: str
    seconds: float
    idle_seconds: float
    computing_seconds: float
    waiting_seconds: float
    memory_bytes: int = 0
    watts: float = 0.0

    def aged(self, seconds: float) -> RankUsage:
        """Say the same after that long without a word: it may do anything by now."""
        return replace(self, state="silent", seconds=seconds) if seconds > SILENT_SECONDS else self


@dataclass(frozen=True, slots=True)
class NodeTraffic:
    """Bytes that a node has sent and received over RDMA since it was started, by its own clock at `seconds`."""

    node: str
    seconds: float
    sent_bytes: int
    received_bytes: int


@dataclass(frozen=True, slots=True)
class EngineUsage:
    """All ranks of one engine, in order, and its nodes with RDMA where it has several. Empty: nobody knows."""

    ranks: list[RankUsage] = field(default_factory=list)
    traffic: list[NodeTraffic] = field(default_factory=list)

    def aged(self, seconds: float) -> EngineUsage:
        """Say the same after that long without a word."""
        return replace(self, ranks=[rank.aged(seconds) for rank in self.ranks])
