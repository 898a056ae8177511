"""What the ranks of an engine do, hold and draw, and what their nodes carry over RDMA: for /metrics and `hlaunch top`.

Knows: values and how often they are taken. Refuses to know: how each is measured, what is done with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

USAGE_INTERVAL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class DeviceUsage:
    """Memory in use, in bytes, and power in watts; 0 where it is unknown."""

    memory_bytes: int = 0
    watts: float = 0.0


@dataclass(frozen=True, slots=True)
class RankUsage:
    """One rank: `state` for the last `seconds`; how long it has idled, computed and waited for others since its start.

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
