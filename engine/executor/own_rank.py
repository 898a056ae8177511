"""The one rank of this process, seen as the ranks of other processes are.

Knows: when it computes, what its device holds. Refuses to know: plans, tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.comm.board import BoardLine, read_board
from engine.comm.segment import LINE
from engine.executor.rank_line import RankLine
from engine.executor.steps_under_way import StepsUnderWay
from engine.placement import RankSpec
from engine.process import Repeating
from engine.usage import USAGE_INTERVAL_SECONDS, DeviceUsage, EngineUsage


class OwnRank:
    """Its executor says when steps begin and end. `usage` may be asked from any thread, and never waits for the device:
    `measure` is called from one of its own, from the first question until `stop`.
    """

    def __init__(self, spec: RankSpec, measure: Callable[[], DeviceUsage]) -> None:
        self._spec = spec
        self._measure = measure
        self._memory = bytearray(LINE)
        self._line = BoardLine(self._memory, 0)
        self._line.phase("serve")
        self._steps = StepsUnderWay(self._line)
        self._meter: Repeating | None = None

    def begin(self, step_id: int) -> None:
        """A step is about to be launched."""
        self._steps.begin(step_id)

    def end(self) -> None:
        """The oldest step is over."""
        self._steps.end()

    @contextmanager
    def computing(self, step_id: int) -> Iterator[None]:
        """Run a step within."""
        self.begin(step_id)
        try:
            yield
        finally:
            self.end()

    def usage(self) -> EngineUsage:
        """Tell what it does and holds at this moment."""
        if self._meter is None:
            self._meter = Repeating(self._note, USAGE_INTERVAL_SECONDS, "usage")
        return EngineUsage([RankLine(self._spec, read_board(self._memory, [self._spec.rank])[0]).usage()])

    def stop(self) -> None:
        """Measure no more."""
        if self._meter is not None:
            self._meter.stop()

    def _note(self) -> None:
        measured = self._measure()
        self._line.holds(measured.memory_bytes, measured.watts)
