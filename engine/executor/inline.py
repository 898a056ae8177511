"""One rank in this process.

Plain: `submit` runs the plan at once. Overlapped: one thread runs plans in order, so that the next plan is made
while this one computes (torch releases the interpreter lock inside its kernels).
"""

from __future__ import annotations

import threading
from collections import deque
from queue import SimpleQueue

from engine.core.plan import ExecutionPlan, StepResult
from engine.executor.base import ExecutorError
from engine.worker.worker import Worker


class InlineExecutor:
    """Run plans on a worker in the calling thread."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._results: deque[StepResult] = deque()

    @property
    def num_in_flight(self) -> int:
        return len(self._results)

    def submit(self, plan: ExecutionPlan) -> None:
        self._results.append(self._worker.execute(plan))

    def collect(self) -> StepResult:
        return self._results.popleft()

    def stop(self) -> None:
        self._results.clear()


class InlineThreadExecutor:
    """Run plans on a worker in one thread of its own, in submit order."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._plans: SimpleQueue[ExecutionPlan | None] = SimpleQueue()
        self._results: SimpleQueue[StepResult | Exception] = SimpleQueue()
        self._num_in_flight = 0
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._thread.start()

    @property
    def num_in_flight(self) -> int:
        return self._num_in_flight

    def submit(self, plan: ExecutionPlan) -> None:
        self._num_in_flight += 1
        self._plans.put(plan)

    def collect(self) -> StepResult:
        result = self._results.get()
        self._num_in_flight -= 1
        if isinstance(result, Exception):
            raise ExecutorError(f"the worker failed: {type(result).__name__}: {result}") from result
        return result

    def stop(self) -> None:
        self._plans.put(None)
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        failure: Exception | None = None
        while (plan := self._plans.get()) is not None:
            try:
                # Plans are deltas: after one that failed, none can run. Each still gets an answer, or `collect` would
                # wait for ever for the plan that was made ahead.
                self._results.put(failure or self._worker.execute(plan))
            except Exception as error:  # noqa: BLE001 - the thread's border: the loop re-raises it
                failure = error
                self._results.put(error)
