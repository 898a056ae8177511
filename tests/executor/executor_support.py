"""An engine whose ranks have no model, and what must not be left of it."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from engine.config import EngineConfig, SchedulerConfig
from engine.core.request import EngineRequest, RequestOutput
from engine.core.sampling_params import SamplingParams
from engine.core.scheduler import Scheduler
from engine.engine_core import open_model, place
from engine.executor.multinode import MultiNodeExecutor

HERE = Path(__file__).parent
STAND_IN = (sys.executable, str(HERE / "stand_in_rank.py"))
CONFIG = EngineConfig(
    model="tiny-oss",
    max_model_len=512,
    tensor_parallel_size=2,
    step_timeout_seconds=30.0,
    scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=256),
)


def start(num_ranks: int = 2, *, num_stages: int = 1, **options: float) -> MultiNodeExecutor:
    """Start stand-in ranks, ready for plans. Options: step_timeout_seconds, silence_seconds."""
    silence = options.pop("silence_seconds", 30.0)
    config = replace(
        CONFIG,
        tensor_parallel_size=num_ranks,
        pipeline_parallel_size=num_stages,
        **options,  # type: ignore[arg-type]
    )
    os.environ["PYTHONPATH"] = str(HERE.parents[1])
    placement = place(config, open_model(config)[1])
    executor = MultiNodeExecutor(config, placement, command=STAND_IN, silence_seconds=silence)
    try:
        executor.wait_loaded()
        executor.allocate_kv(64)
        executor.warm_up()
    except BaseException:
        executor.stop()
        raise
    return executor


def new_scheduler() -> Scheduler:
    return Scheduler(
        CONFIG.scheduler,
        num_blocks=512,
        block_size=16,
        group_windows=(64, None),
        max_model_len=512,
        hash_seed=b"0" * 16,
    )


def add_requests(scheduler: Scheduler, count: int, max_tokens: int) -> None:
    for index in range(count):
        prompt = [1 + index] * (5 + index)
        scheduler.add(EngineRequest(f"r{index}", prompt, SamplingParams(temperature=0.0), max_tokens, seed=1))


def drive(executor: MultiNodeExecutor, scheduler: Scheduler) -> list[RequestOutput]:
    """Run the overlapped loop until nothing is left to do."""
    outputs = []
    while scheduler.has_unfinished or executor.num_in_flight:
        plan = scheduler.plan(time.monotonic())
        if plan is not None:
            executor.submit(plan)
        if executor.num_in_flight > 1 or plan is None:
            outputs += scheduler.advance(executor.collect())
    return outputs


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def children_of(pid: int) -> list[int]:
    """Process ids of a process's children, whichever of its threads spawned them; one thread's in their order."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            found += map(int, (task / "children").read_text().split())
    return found


def stacks_of(log: str, rank: int) -> str:
    """Cut a rank's stacks out of a log."""
    return log.partition(f"stacks of rank {rank} (pid ")[2].partition("stacks of rank ")[0]


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def leftovers() -> tuple[list[str], int]:
    """What a failed engine may leave: names in /dev/shm, ours or torch's, and descriptors of this process."""
    names = sorted(name for name in os.listdir("/dev/shm") if name.startswith(("hlaunch", "torch")))
    return names, len(os.listdir("/proc/self/fd"))
