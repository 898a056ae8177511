"""Which step a rank is at, on its line of the board, where its device runs ahead of who launches steps.

Knows: steps begun and not ended, oldest first. Refuses to know: devices, plans.
"""

from __future__ import annotations

import threading
from collections import deque

from engine.comm.board import BoardLine


class StepsUnderWay:
    """`begin` and `end` every step, in order, from any two threads: the line says the oldest that is not over.

    So a step that hangs shows as one that lasts, however many were launched behind it.
    """

    def __init__(self, line: BoardLine) -> None:
        self._line = line
        self._steps: deque[int] = deque()
        self._lock = threading.Lock()

    def begin(self, step_id: int) -> None:
        """A step is about to be launched."""
        with self._lock:
            self._steps.append(step_id)
            if len(self._steps) == 1:
                self._line.begins(step_id)

    def end(self) -> None:
        """The oldest step is over."""
        with self._lock:
            self._steps.popleft()
            if self._steps:
                self._line.begins(self._steps[0])
            else:
                self._line.rests()
