"""The GPU's code split over ranks, on CPUs: tokens are those of one rank, however the model is split.

Ranks are threads, devices their hosts: kernels by their twins, sums and hand-overs through the shared memory that real
ranks have. What only GPUs can show is in tests/gpu/test_multi_gpu.py.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from engine.comm.ends import create_group, create_link
from engine.comm.group import SharedGroup
from engine.comm.link import RingReceiver, RingSender
from engine.config import CacheConfig, SchedulerConfig, load_model_config
from engine.config import resolve_model_folder as find_model
from engine.core.plan import ExecutionPlan, StepResult
from engine.core.sampling_params import SamplingParams
from engine.engine_core import EngineCore, open_model
from engine.engine_core import place as place_engine
from engine.executor.base import ExecutorError
from engine.executor.multinode import MultiNodeExecutor
from engine.executor.multiproc_fit import fit_ranks
from engine.memory import fit_engine
from engine.models.checkpoint import Checkpoint
from engine.placement import Device, HostSpec, ParallelSizes, Placement, RankSpec, place
from engine.usage import EngineUsage
from engine.worker.worker import groups_of_stage
from tests.worker import gpu_twins
from tests.worker.test_gpu_runner import GREEDY, MAX_TOKENS, MIXED, OVERLAPPED, TINY, gpu_core, requests_of, run, twins

assert twins  # the fixture, used by all tests here
BLOCK_SIZE, NUM_BLOCKS = 16, 256
MANY = SchedulerConfig(max_num_seqs=20, max_num_batched_tokens=512)


class ThreadRanks:
    """An executor whose ranks are threads: every plan goes to all of them, one answers."""

    def __init__(self, placement: Placement, make_runner: Callable[[RankSpec], Any]) -> None:
        self._plans: list[SimpleQueue[Any]] = [SimpleQueue() for _ in placement.ranks]
        self._results: SimpleQueue[StepResult | Exception] = SimpleQueue()
        self._in_flight: deque[ExecutionPlan] = deque()
        self._sampled: list[tuple[int, int]] = []
        self._answers = placement.stage(0, placement.pipeline_parallel_size - 1)[0].rank
        self.runners: dict[int, Any] = {}
        self._threads = [
            threading.Thread(target=self._run, args=(rank, make_runner), daemon=True) for rank in placement.ranks
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def submit(self, plan: ExecutionPlan) -> None:
        sampled, self._sampled = self._sampled, []
        for queue in self._plans:
            queue.put((plan, sampled))
        self._in_flight.append(plan)

    def collect(self) -> StepResult:
        result = self._results.get(timeout=60)
        if isinstance(result, Exception):
            raise result
        self._in_flight.popleft()
        self._sampled += zip(result.rows, result.token_ids, strict=True)
        return result

    def on_failure(self, callback: Callable[[ExecutorError], None]) -> None:
        pass

    def usage(self) -> EngineUsage:
        return EngineUsage()

    def stop(self) -> None:
        for queue in self._plans:
            queue.put(None)
        for thread in self._threads:
            thread.join(30)

    def _run(self, rank: RankSpec, make_runner: Callable[[RankSpec], Any]) -> None:
        try:
            runner = self.runners[rank.rank] = make_runner(rank)
            while (got := self._plans[rank.rank].get()) is not None:
                plan, sampled = got
                runner.append_tokens(sampled)
                result = runner.launch(plan).wait()
                if rank.rank == self._answers:
                    self._results.put(result)
        except Exception as error:  # noqa: BLE001 - the thread's border
            self._results.put(error)
        finally:
            if rank.rank in self.runners:
                model = self.runners.pop(rank.rank)._model
                for link in (model.group, model.receiver, model.sender):
                    if link is not None:
                        link.close()


def ranks_core(
    sizes: ParallelSizes, scheduler: SchedulerConfig, *, num_blocks: int = NUM_BLOCKS, has_exchange: bool = True
) -> EngineCore:
    """An engine whose ranks are GPU runners over the twins."""
    from engine.models.gpt_oss_gpu_weights import load_gpt_oss_gpu
    from engine.worker.gpu_runner import GpuModelRunner

    folder = find_model("tiny-oss")
    assert folder is not None
    model = load_model_config(folder)
    placement = place(model, sizes, [HostSpec("here", tuple(Device(f"cpu:{i}") for i in range(sizes.world)))])
    groups, links = _wire(placement)

    def make_runner(rank: RankSpec) -> Any:
        stage = placement.stage(0, rank.pp_rank)
        with torch.inference_mode():
            weights = load_gpt_oss_gpu(
                model, Checkpoint.open(folder), torch.device("cpu"), num_positions=256, num_threads=1, seed=0,
                progress=lambda *_: None, rank=rank, stage=stage,
            )  # fmt: skip
            if rank.rank in groups:
                rows = tuple(other.vocab[1] - other.vocab[0] for other in stage)
                group = SharedGroup(groups[rank.rank], timeout_seconds=60)
                weights.group = gpu_twins.TwinGroup(group, rows, has_exchange=has_exchange)
            before, after = links.get((rank.rank, "before")), links.get((rank.rank, "after"))
            weights.receiver = RingReceiver(before, timeout_seconds=60) if before else None
            weights.sender = RingSender(after, timeout_seconds=60) if after else None
            kv_groups = groups_of_stage(model, rank)
            shape = (num_blocks * BLOCK_SIZE, 2, rank.kv_heads[1] - rank.kv_heads[0], model.head_dim)
            slots = range(max(len(group.layers) for group in kv_groups))
            return GpuModelRunner(
                weights, kv_groups, [torch.zeros(shape, dtype=torch.bfloat16) for _ in slots],
                num_rows=scheduler.max_num_seqs, block_size=BLOCK_SIZE, max_model_len=256, is_eager=True,
            )  # fmt: skip

    config = replace(TINY, scheduler=scheduler, cache=CacheConfig(num_blocks=num_blocks, block_size=BLOCK_SIZE))
    memory = fit_engine(config, model, 256, budget_bytes=1 << 40, weight_bytes=0, kv_dtype="bfloat16", is_gpu=True)
    executor = ThreadRanks(placement, make_runner)
    facts: Any = None
    return EngineCore(config, model, executor, memory, 256, facts, sizes.pipeline)


def _wire(placement: Placement) -> tuple[dict[int, Any], dict[tuple[int, str], Any]]:
    groups: dict[int, Any] = {}
    links: dict[tuple[int, str], Any] = {}
    for members in placement.tp_groups:
        if len(members) > 1:
            groups |= zip(members, create_group(len(members)), strict=True)
    for members in placement.pp_groups:
        for before, after in zip(members, members[1:], strict=False):
            links[before, "after"], links[after, "before"] = create_link()
    return groups, links


def answers(core: EngineCore, requests: Sequence[Any]) -> dict[str, list[int]]:
    try:
        return run(core, list(requests))
    finally:
        core.stop()


def num_equal(got: dict[str, list[int]], wanted: dict[str, list[int]]) -> int:
    assert got.keys() == wanted.keys()
    return sum(got[name] == wanted[name] for name in wanted)


def of_core(core: EngineCore, count: int) -> dict[str, list[int]]:
    """Answer requests of which none cuts by top-p and the like, then as many of which some do."""
    max_tokens = MAX_TOKENS if count <= 8 else 4
    plain = requests_of([GREEDY] * count, seed=2, max_tokens=max_tokens)
    mixed = requests_of([*MIXED, *[GREEDY] * (count - 8)], max_tokens=max_tokens)
    try:
        return {f"plain {name}": ids for name, ids in run(core, plain).items()} | run(core, mixed)
    finally:
        if isinstance(core.executor, ThreadRanks):
            core.stop()


@cache
def of_one_rank(count: int) -> dict[str, list[int]]:
    """The same by one rank, once for all tests."""
    if count <= 8:
        return of_core(gpu_core(OVERLAPPED), count)
    return of_core(gpu_core(MANY, num_blocks=600), count)


SPLITS = {
    "tp2": ParallelSizes(1, 1, 2),
    "ep2": ParallelSizes(1, 1, 2, True),
    "pp2": ParallelSizes(1, 2, 1),
    "tp2 pp2": ParallelSizes(1, 2, 2),
}


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS.keys())
def test_a_split_model_says_what_one_rank_says(sizes: ParallelSizes) -> None:
    # Batches of one size with and without rows that cut by top-k or top-p take different graphs on the last stage.
    wanted, got = of_one_rank(8), of_core(ranks_core(sizes, OVERLAPPED), 8)
    if sizes.tensor == 1:
        assert got == wanted  # stages hand float32 on: the bits of one rank
    else:
        # A sum in bfloat16 parts turns a near-tie now and then.
        assert num_equal(got, wanted) >= len(wanted) - 2


@pytest.mark.parametrize(
    ("sizes", "has_exchange"),
    [(SPLITS["tp2"], True), (SPLITS["tp2"], False), (SPLITS["pp2"], True)],
    ids=["tp2", "tp2, sums by NCCL alone", "pp2"],
)
def test_large_batches_take_the_large_step_on_every_rank(sizes: ParallelSizes, has_exchange: bool) -> None:
    # Where no row cuts, ranks compare their best tokens; where one does, they look at all logits.
    core = ranks_core(sizes, MANY, num_blocks=600, has_exchange=has_exchange)
    wanted, got = of_one_rank(20), of_core(core, 20)
    assert num_equal(got, wanted) >= (len(wanted) if sizes.tensor == 1 else len(wanted) - 3)


def test_a_starved_pipeline_of_gpus_preempts_and_says_the_same() -> None:
    requests = requests_of([GREEDY, SamplingParams(temperature=1.0)] * 3, max_tokens=24)
    wanted = run(gpu_core(OVERLAPPED), requests)
    core = ranks_core(SPLITS["pp2"], OVERLAPPED, num_blocks=28)
    assert answers(core, requests) == wanted
    assert core.stats().num_preemptions > 0


def test_ranks_in_processes_answer_from_a_thread() -> None:
    """The executor, its processes and wires are those of real GPU ranks."""
    sizes = SPLITS["pp2"]
    config = replace(
        TINY, tensor_parallel_size=sizes.tensor, pipeline_parallel_size=sizes.pipeline, cpu_threads=1,
        scheduler=OVERLAPPED, cache=CacheConfig(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE),
    )  # fmt: skip
    model = open_model(config)[1]
    command = (sys.executable, "-m", "tests.worker.gpu_twin_rank")
    placement = place_engine(config, model)
    executor = MultiNodeExecutor(config, placement, command=command)
    try:
        loaded = executor.wait_loaded()
        memory = fit_ranks(config, model, placement, executor.ranks, loaded, 256)
        executor.allocate_kv(memory.num_blocks)
        executor.warm_up()
        facts: Any = None
        core = EngineCore(config, model, executor, memory, 256, facts, sizes.pipeline)
        got = run(core, requests_of(MIXED))
    finally:
        executor.stop()
    wanted = of_one_rank(8)
    assert got == {name: wanted[name] for name in got}
