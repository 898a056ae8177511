"""The seam between the loop and the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from engine.core.plan import ExecutionPlan, StepResult
from engine.usage import EngineUsage

Progress = Callable[[float, str], None]


class ExecutorError(Exception):
    """A rank failed or did not answer. `message` is one line for people."""


class Executor(Protocol):
    """Runs plans in submit order. `submit` may return before the plan ran; `collect` blocks for the oldest result."""

    @property
    def num_in_flight(self) -> int: ...

    def submit(self, plan: ExecutionPlan) -> None: ...

    def collect(self) -> StepResult: ...

    def on_failure(self, callback: Callable[[ExecutorError], None]) -> None:
        """Have `callback` called, from any thread, when a rank fails while nobody collects."""
        ...

    def usage(self) -> EngineUsage:
        """Tell what each rank does and holds at this moment; from any thread, until `stop`."""
        ...

    def stop(self) -> None: ...
