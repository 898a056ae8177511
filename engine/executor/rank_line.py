"""What a rank does at this moment, as it is passed on between a node's host, the engine core and people.

Knows: a rank's line of the board, what keeps its process from running, the words for both. Refuses to know: how they
are read (`rank_host`), whom to blame for what (`multinode`).
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.comm.board import Activity, RankState
from engine.placement import RankSpec
from engine.usage import RankUsage

STOPPED = ", stopped by a signal"
TRACED = ", stopped by a debugger"
BLOCKED = ", in an uninterruptible wait"
KERNEL_STATES = {"T": STOPPED, "t": TRACED, "D": BLOCKED}
"""By the letter in /proc/PID/stat: what follows in a sentence on what a rank does."""
_WORDS = {Activity.IDLE: "idle", Activity.COMPUTES: "computing", Activity.WAITS: "waiting"}


@dataclass(frozen=True, slots=True)
class RankLine:
    """What a rank does at this moment, and what keeps its process from running, for how long, if anything does."""

    spec: RankSpec
    state: RankState
    kernel: str = ""
    kernel_seconds: float = 0.0

    def usage(self) -> RankUsage:
        """Say it in words for people."""
        spec, state = self.spec, self.state
        doing = _WORDS[state.activity] if state.phase == "serve" else state.phase
        return RankUsage(
            spec.rank,
            spec.node,
            spec.device,
            self.kernel.removeprefix(", ") or doing,
            self.kernel_seconds if self.kernel else state.seconds,
            state.idle_seconds,
            state.computing_seconds,
            state.waiting_seconds,
            state.memory_bytes,
            state.watts,
        )
