"""Host cost of one step of the scheduler: `plan` plus `advance`, with a worker that answers at once.

Steady decode: all rows run, block crossings spread over the steps as in real traffic (block size 16, a sliding and a
full group). Besides it, the cost of a long prefix hit. Run: python bench/scheduler.py [--json] [--steps N]
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections import deque
from dataclasses import asdict, dataclass

from engine.config import SchedulerConfig
from engine.core.plan import ExecutionPlan, StepResult
from engine.core.request import EngineRequest
from engine.core.sampling_params import SamplingParams
from engine.core.scheduler import Scheduler

BLOCK_SIZE = 16
WINDOWS = (128, None)
ROW_COUNTS = (1, 16, 64, 256)
STOP_IDS = (1, 2, 3)
TOKEN = 7


@dataclass(frozen=True, slots=True)
class Figure:
    """Microseconds per step (`plan` + `advance`)."""

    rows: int
    loop: str
    prefix_caching: bool
    median_us: float
    p99_us: float
    plan_median_us: float
    advance_median_us: float


def answer(plan: ExecutionPlan) -> StepResult:
    """The result of a plan, as a worker would send it; not part of what is timed."""
    rows = [row for row, samples in zip(plan.rows, plan.samples, strict=True) if samples]
    return StepResult(plan.step_id, rows, [TOKEN] * len(rows), [0] * len(rows))


def measure(rows: int, depth: int, prefix_caching: bool, steps: int) -> Figure:
    """Time steady decode of `rows` requests with `depth` plans in flight."""
    prompt_len = 512
    config = SchedulerConfig(
        max_num_seqs=rows,
        max_num_batched_tokens=8192,
        enable_prefix_caching=prefix_caching,
        max_queue=rows,
    )
    max_tokens = steps + 200
    blocks_each = len(WINDOWS) * ((prompt_len + max_tokens) // BLOCK_SIZE + 2)
    scheduler = Scheduler(
        config,
        num_blocks=rows * blocks_each + rows + 1000,
        block_size=BLOCK_SIZE,
        group_windows=WINDOWS,
        max_model_len=prompt_len + max_tokens + BLOCK_SIZE,
        hash_seed=b"bench",
    )
    for i in range(rows):
        # Lengths differ, so that block crossings spread over the steps; prompts differ from the first block on.
        prompt = [i + 10] * (prompt_len - i % BLOCK_SIZE)
        params = SamplingParams(max_tokens=max_tokens)
        scheduler.add(EngineRequest(f"request-{i}", prompt, params, max_tokens, seed=i, stop_token_ids=STOP_IDS))
    in_flight: deque[StepResult] = deque()
    clock = time.perf_counter_ns
    plan_ns: list[int] = []
    advance_ns: list[int] = []
    warm_up = 2 + rows * prompt_len // config.max_num_batched_tokens + 20
    gc.collect()
    gc.freeze()
    for step in range(warm_up + steps):
        begin = clock()
        plan = scheduler.plan(0.0)
        planned = clock()
        if plan is None:
            raise RuntimeError("nothing was planned in steady decode")
        in_flight.append(answer(plan))
        if step >= warm_up:
            if len(plan.rows) != rows or plan.admits:
                raise RuntimeError("not in steady decode yet")
            plan_ns.append(planned - begin)
        if len(in_flight) == depth:
            result = in_flight.popleft()
            begin = clock()
            outputs = scheduler.advance(result)
            if step >= warm_up:
                advance_ns.append(clock() - begin)
            del outputs
    total = sorted(a + b for a, b in zip(plan_ns, advance_ns, strict=True))
    return Figure(
        rows=rows,
        loop="plain" if depth == 1 else "overlapped",
        prefix_caching=prefix_caching,
        median_us=total[len(total) // 2] / 1e3,
        p99_us=total[len(total) * 99 // 100] / 1e3,
        plan_median_us=sorted(plan_ns)[len(plan_ns) // 2] / 1e3,
        advance_median_us=sorted(advance_ns)[len(advance_ns) // 2] / 1e3,
    )


def measure_prefix_hit(num_blocks: int) -> float:
    """Milliseconds to admit a prompt whose first `num_blocks` blocks per group are cached: hashing, lookup, sharing."""
    num_tokens = num_blocks * BLOCK_SIZE + 1
    scheduler = Scheduler(
        SchedulerConfig(max_num_batched_tokens=num_tokens),
        num_blocks=4 * num_blocks + 100,
        block_size=BLOCK_SIZE,
        group_windows=WINDOWS,
        max_model_len=num_tokens + 2,
        hash_seed=b"bench",
    )
    durations = []
    for i in range(8):
        params = SamplingParams(max_tokens=1)
        scheduler.add(EngineRequest(f"request-{i}", list(range(num_tokens)), params, 1, seed=0))
        begin = time.perf_counter_ns()
        plan = scheduler.plan(0.0)
        durations.append(time.perf_counter_ns() - begin)
        if plan is None or plan.num_scheduled != ([num_tokens] if i == 0 else [1]):
            raise RuntimeError("the prefix was not found")
        scheduler.advance(answer(plan))
    return sorted(durations[1:])[len(durations) // 2 - 1] / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--steps", type=int, default=1000, help="timed steps per figure")
    arguments = parser.parse_args()
    figures = [
        measure(rows, depth, prefix_caching, arguments.steps)
        for prefix_caching in (False, True)
        for depth in (1, 2)
        for rows in ROW_COUNTS
    ]
    if arguments.json:
        report = {
            "bench": "scheduler",
            "python": platform.python_version(),
            "machine": platform.machine(),
            "figures": [asdict(figure) for figure in figures],
            "prefix_hit_1000_blocks_ms": measure_prefix_hit(1000),
        }
        print(json.dumps(report, indent=2))
        return
    print("rows  loop        prefix cache   median us   p99 us   plan us   advance us")
    for figure in figures:
        cache = "on" if figure.prefix_caching else "off"
        print(
            f"{figure.rows:4d}  {figure.loop:10s}  {cache:12s}  {figure.median_us:9.1f}  {figure.p99_us:7.1f}"
            f"  {figure.plan_median_us:8.1f}  {figure.advance_median_us:11.1f}"
        )
    print(f"prefix hit of 1,000 blocks: {measure_prefix_hit(1000):.2f} ms")


if __name__ == "__main__":
    main()
