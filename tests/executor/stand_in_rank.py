"""A rank without a model: made-up tokens, and faults on order. STAND_IN_FAULT is `rank:kind:step`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

from engine.core.plan import ExecutionPlan, StepResult
from engine.executor.multiproc_rank import Rank, main
from engine.usage import DeviceUsage


class StandInWorker:
    weight_bytes = 1000
    device_name = "stand-in"
    kv_dtype_name = "float32"
    dtype_name = "float32"

    def __init__(self, rank: Rank) -> None:
        place, kind, step = os.environ.get("STAND_IN_FAULT", "-1:none:0").split(":")
        self._fault = kind if int(place) == rank.spec.rank else "none"
        self._fault_step = int(step)
        self._seconds = float(os.environ.get("STAND_IN_SECONDS", "0.0005"))
        self._line = rank.line

    def load(self, progress: Callable[[float, str], None]) -> None:
        progress(0.5, "half of it")
        if self._fault == "no load":
            raise ValueError("the weights are of another model\nand more")
        if self._fault == "silent load":
            time.sleep(60)

    def available_memory(self) -> int:
        return 1 << 30

    def allocate_kv(self, num_blocks: int) -> None:
        if self._fault == "no memory":
            raise MemoryError(f"{num_blocks} blocks")

    def warm_up(self) -> None:
        pass

    def usage(self) -> DeviceUsage:
        return DeviceUsage(3 << 20, 70.0)

    def append_tokens(self, pairs: Sequence[tuple[int, int]]) -> None:
        pass

    def execute(self, plan: ExecutionPlan) -> StepResult:
        if plan.step_id == self._fault_step:
            if self._fault == "raise":
                raise RuntimeError("a kernel went wrong")
            if self._fault == "exit":
                os._exit(7)
            if self._fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self._fault == "unnamed signal":
                os.kill(os.getpid(), signal.SIGRTMIN + 6)
            if self._fault == "hang":
                time.sleep(60)
            if self._fault == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
        if self._fault in ("hang", "stop") and plan.step_id == self._fault_step:
            raise AssertionError("a hung rank went on")
        time.sleep(self._seconds)
        rows = [row for row, samples in zip(plan.rows, plan.samples, strict=True) if samples]
        return StepResult(plan.step_id, rows, [100 + row for row in rows], [0] * len(rows))


if __name__ == "__main__":
    sys.exit(main(make_worker=StandInWorker))
