"""What each rank is doing and holds, for whoever must tell a rank that hangs from one that waits for it, or shows both.

Knows: one line of memory per rank, shared between processes, written by that rank alone, without locks. Refuses to
know: deadlines, blame beyond the order in which to suspect. A line is stored at once and read until two looks agree:
nobody holds the other up.
"""

from __future__ import annotations

import enum
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.comm.segment import LINE, Segment

_STATE = struct.Struct("<BB2xIqdddd")
_HELD = struct.Struct("<Qd")
Buffer = bytearray | memoryview
_LOOKS = 8
"""A writer that is stopped in the middle of a line shows the same half of it twice; one that runs is soon past it."""


class Activity(enum.IntEnum):
    IDLE = 0
    COMPUTES = 1
    WAITS = 2


PHASES = ("spawn", "import", "rendezvous", "load", "kv", "warmup", "serve")


@dataclass(frozen=True, slots=True)
class RankState:
    """One rank's line: its phase, what it does and for how long, in which step, how often it has met others in it.

    `idle_seconds`, `computing_seconds` and `waiting_seconds` (for other ranks) count since it serves. `memory_bytes` it
    holds, and `watts` its device draws, were measured about a second ago; 0 where that is unknown.
    """

    rank: int
    phase: str
    activity: Activity
    step_id: int
    num_meetings: int
    seconds: float
    idle_seconds: float = 0.0
    computing_seconds: float = 0.0
    waiting_seconds: float = 0.0
    memory_bytes: int = 0
    watts: float = 0.0

    def __str__(self) -> str:
        doing = {Activity.IDLE: "idle", Activity.COMPUTES: "computing", Activity.WAITS: "waiting for other ranks"}
        step = f" in step {self.step_id}" if self.activity is not Activity.IDLE else ""
        return f"{doing[self.activity]}{step} for {self.seconds:.1f} s"


class Notes(Protocol):
    """Told by a group of every meeting with others, of waiting in it, and of going on."""

    def meets(self) -> None: ...

    def waits(self) -> None: ...

    def computes(self) -> None: ...


class NoBoard:
    """Nobody looks."""

    def meets(self) -> None:
        pass

    def waits(self) -> None:
        pass

    def computes(self) -> None:
        pass


class BoardLine:
    """A rank's own line, the one at `index` of the board's memory."""

    def __init__(self, memory: Buffer, index: int) -> None:
        self._memory = memory
        self._at = LINE * index
        self._phase = 0
        self._activity = Activity.IDLE
        self._since = time.monotonic()
        self._spent = [0.0, 0.0, 0.0]
        self._step_id = 0
        self._num_meetings = 0

    def phase(self, phase: str) -> None:
        """Enter a phase of `PHASES`. Time counts anew from the first moment in which it serves."""
        self._phase = PHASES.index(phase)
        if phase == "serve":
            self._spent, self._since = [0.0, 0.0, 0.0], time.monotonic()
        self._write(Activity.IDLE if phase == "serve" else Activity.COMPUTES)

    def begins(self, step_id: int) -> None:
        self._step_id = step_id
        self._num_meetings = 0
        self._write(Activity.COMPUTES)

    def meets(self) -> None:
        # Also where nobody is waited for: ranks of a group count alike, so the one that is behind has the lower number.
        self._num_meetings += 1

    def waits(self) -> None:
        self._write(Activity.WAITS)

    def computes(self) -> None:
        self._write(Activity.COMPUTES)

    def rests(self) -> None:
        self._write(Activity.IDLE)

    def holds(self, memory_bytes: int, watts: float) -> None:
        """Note what was measured; from any thread."""
        begin = self._at + _STATE.size
        self._memory[begin : begin + _HELD.size] = _HELD.pack(memory_bytes, watts)

    def _write(self, activity: Activity) -> None:
        now = time.monotonic()
        self._spent[self._activity] += now - self._since
        self._activity, self._since = activity, now
        # Not `pack_into`, which zeroes the place before it writes there.
        self._memory[self._at : self._at + _STATE.size] = _STATE.pack(
            self._phase, activity, self._num_meetings, self._step_id, now, *self._spent
        )


def create_board(num_ranks: int) -> Segment:
    """Make the memory of a board."""
    return Segment.create("hlaunch-board", LINE * num_ranks)


def read_board(memory: Buffer, ranks: Sequence[int]) -> list[RankState]:
    """Read all lines, which are those of `ranks`."""
    states = []
    for index, rank in enumerate(ranks):
        line, now = _read_line(memory, LINE * index), time.monotonic()
        phase, activity, meetings, step_id, since, *by_activity = _STATE.unpack_from(line)
        seconds = max(0.0, now - since) if since else 0.0
        by_activity[activity] += seconds
        idle, computing, waiting = by_activity
        doing = (PHASES[phase], Activity(activity), step_id, meetings, seconds)
        held, watts = _HELD.unpack_from(line, _STATE.size)
        states.append(RankState(rank, *doing, idle, computing, waiting, held, watts))
    return states


def _read_line(memory: Buffer, at: int) -> bytes:
    line = bytes(memory[at : at + LINE])
    for _ in range(_LOOKS):
        again = bytes(memory[at : at + LINE])
        if again == line:
            break
        line = again
    return line


def suspects(states: list[RankState], step_id: int) -> list[RankState]:
    """Tell who holds a step up: who computes, or has not begun it; where all wait, who met the others least often."""
    busy = [state for state in states if state.activity is Activity.COMPUTES]
    if busy:
        return busy
    behind = [state for state in states if state.step_id < step_id]
    if behind:
        return behind
    waiting = [state for state in states if state.activity is Activity.WAITS]
    if not waiting:
        return []
    fewest = min(state.num_meetings for state in waiting)
    return [state for state in waiting if state.num_meetings == fewest]
