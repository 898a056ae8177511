"""The one rank of this process, seen as the ranks of other processes are.

Knows: when it computes, what its device holds. Refuses to know: plans, tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.comm.board import BoardLine, read_board
from engine.comm.segment import LINE
from engine.executor.rank_line import RankLine
from engine.placement import RankSpec
from engine.usage import DeviceUsage, EngineUsage


class OwnRank:
    """`begin` and `end` say when it computes; `usage` may be asked from any thread, and measures."""

    def __init__(self, spec: RankSpec, measure: Callable[[], DeviceUsage]) -> None:
        self._spec = spec
        self._measure = measure
        self._memory = bytearray(LINE)
        self._line = BoardLine(self._memory, 0)
        self._line.phase("serve")

    def begin(self, step_id: int) -> None:
        self._line.begins(step_id)

    def end(self) -> None:
        self._line.rests()

    @contextmanager
    def computing(self, step_id: int) -> Iterator[None]:
        self.begin(step_id)
        try:
            yield
        finally:
            self.end()

    def usage(self) -> EngineUsage:
        measured = self._measure()
        self._line.holds(measured.memory_bytes, measured.watts)
        return EngineUsage([RankLine(self._spec, read_board(self._memory, [self._spec.rank])[0]).usage()])
