"""One rank in this process, and which worker and executor its device takes.

On a CPU, plain: `submit` runs the plan at once; overlapped: one thread runs plans in order, so that the next plan is
made while this one computes (torch releases the interpreter lock inside its kernels). On a GPU `submit` launches and
returns, and `collect` waits: the device runs ahead by itself.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING

from engine.config import EngineConfig, ModelConfig
from engine.core.plan import ExecutionPlan, StepResult
from engine.executor.base import Executor, ExecutorError
from engine.executor.own_rank import OwnRank
from engine.placement import RankSpec
from engine.usage import EngineUsage
from engine.worker.worker import Worker

if TYPE_CHECKING:
    from engine.worker.gpu_runner import PendingStep
    from engine.worker.gpu_worker import GpuWorker


def make_worker(config: EngineConfig, model: ModelConfig, rank: RankSpec) -> Worker | GpuWorker:
    """Make the worker that a rank's device takes. Raises: ConfigError when this machine has no such device."""
    if not rank.device.startswith("cuda"):
        return Worker(config, model, rank)
    from engine.worker.gpu_worker import GpuWorker

    return GpuWorker(config, model, rank)


def make_executor(worker: Worker | GpuWorker, *, overlapped: bool) -> Executor:
    """Make the executor of one warm worker. `overlapped`: plans may be submitted before results are collected."""
    if not isinstance(worker, Worker):
        return InlineGpuExecutor(worker)
    return InlineThreadExecutor(worker) if overlapped else InlineExecutor(worker)


class InlineExecutor:
    """Run plans on a worker in the calling thread."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._rank = OwnRank(worker.spec, worker.usage)
        self._results: deque[StepResult] = deque()

    @property
    def num_in_flight(self) -> int:
        return len(self._results)

    def submit(self, plan: ExecutionPlan) -> None:
        with self._rank.computing(plan.step_id):
            self._results.append(self._worker.execute(plan))

    def collect(self) -> StepResult:
        return self._results.popleft()

    def on_failure(self, callback: Callable[[ExecutorError], None]) -> None:
        """Never: the rank lives and dies with this process."""

    def usage(self) -> EngineUsage:
        """See `Executor.usage`."""
        return self._rank.usage()

    def stop(self) -> None:
        self._rank.stop()
        self._results.clear()


class InlineThreadExecutor:
    """Run plans on a worker in one thread of its own, in submit order."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._rank = OwnRank(worker.spec, worker.usage)
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

    def on_failure(self, callback: Callable[[ExecutorError], None]) -> None:
        """Never: the rank lives and dies with this process."""

    def usage(self) -> EngineUsage:
        """See `Executor.usage`."""
        return self._rank.usage()

    def stop(self) -> None:
        self._rank.stop()
        self._plans.put(None)
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        failure: Exception | None = None
        while (plan := self._plans.get()) is not None:
            try:
                # Plans are deltas: after one that failed, none can run. Each still gets an answer, or `collect` would
                # wait for ever for the plan that was made ahead.
                with self._rank.computing(plan.step_id):
                    self._results.put(failure or self._worker.execute(plan))
            except Exception as error:  # noqa: BLE001 - the thread's border: the loop re-raises it
                failure = error
                self._results.put(error)


class InlineGpuExecutor:
    """Launch plans on a GPU from the calling thread; the device works through them in submit order."""

    def __init__(self, worker: GpuWorker) -> None:
        self._worker = worker
        self._rank = OwnRank(worker.spec, worker.usage)
        self._pending: deque[PendingStep] = deque()

    @property
    def num_in_flight(self) -> int:
        return len(self._pending)

    def submit(self, plan: ExecutionPlan) -> None:
        self._rank.begin(plan.step_id)
        self._pending.append(self._worker.launch(plan))

    def collect(self) -> StepResult:
        try:
            result = self._pending.popleft().wait()
        except RuntimeError as error:
            # An asynchronous fault of the device comes to light here: nothing on it can be trusted afterwards.
            raise ExecutorError(f"the GPU failed: {str(error).splitlines()[0]}") from error
        self._rank.end()
        return result

    def count_experts(self, num_rows: int) -> list[int]:
        """Count the experts that each layer touches in a decode step of the rows last run; for benchmarks."""
        return self._worker.runner.decode.count_experts(num_rows)

    def on_failure(self, callback: Callable[[ExecutorError], None]) -> None:
        """Never: the rank lives and dies with this process."""

    def usage(self) -> EngineUsage:
        """See `Executor.usage`."""
        return self._rank.usage()

    def stop(self) -> None:
        self._rank.stop()
        self._pending.clear()
        self._worker.close()
