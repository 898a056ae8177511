"""The answers of a rank whose device runs ahead: a thread waits for each step, so that the next may be launched.

Knows: steps under way, in order, and where results go. Refuses to know: devices; a step says itself when it is over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

from engine.core.plan import StepResult


class PendingStep(Protocol):
    """A step under way."""

    def wait(self) -> StepResult:
        """Block until it is over, and give its result."""
        ...


class Answers:
    """`give` is called with each launched step, in order; `answer` with each result, from a thread.

    What goes wrong on the device comes to light while waiting: `fail` is called with it, once, and no answer follows.
    """

    def __init__(self, answer: Callable[[StepResult], None], fail: Callable[[Exception], None]) -> None:
        self._answer, self._fail = answer, fail
        self._steps: SimpleQueue[PendingStep] = SimpleQueue()
        threading.Thread(target=self._run, name="answers", daemon=True).start()

    def give(self, step: PendingStep) -> None:
        """Have a step's result answered once it is there."""
        self._steps.put(step)

    def _run(self) -> None:
        try:
            while True:
                self._answer(self._steps.get().wait())
        except Exception as error:  # noqa: BLE001 - the thread's border: the process reports it and ends
            self._fail(error)
