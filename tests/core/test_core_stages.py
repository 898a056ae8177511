"""Pipelines: as many plans in flight as stages, each with its own rows, and a first stage that learns tokens late."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
from core_support import VOCAB_SIZE, FakeRow, FakeWorker, Loop, drawn_request, make_request

from engine.config import SchedulerConfig
from engine.core.plan import ExecutionPlan, StepResult
from engine.core.request import RequestOutput, RequestRejected
from engine.core.scheduler import Scheduler

MAX_MODEL_LEN = 48


class FirstStage(FakeWorker):
    """Computes, but does not sample: what was sampled comes with a later plan, and a row that is gone drops it."""

    def take(self, pairs: list[tuple[int, int]]) -> None:
        for row, token in pairs:
            if row in self.rows:
                self.rows[row].append(token)

    def _sample(self, row: int, state: FakeRow, result: StepResult) -> None:
        pass


class Pipeline(Loop):
    """The loop of an engine with stages: fill up to one plan per stage, then take the oldest result."""

    def __init__(self, config: SchedulerConfig, num_stages: int, **sizes: object) -> None:
        super().__init__(config, depth=num_stages, **sizes)  # type: ignore[arg-type]
        windows = self.worker.windows
        self.scheduler = Scheduler(
            config,
            num_blocks=self.worker.num_blocks,
            block_size=self.worker.block_size,
            group_windows=windows,
            max_model_len=self.max_model_len,
            hash_seed=b"test",
            num_stages=num_stages,
        )
        self.first = FirstStage(self.worker.num_blocks, self.worker.block_size, windows, config.max_num_seqs)
        self.first.salts = self.worker.salts
        self.fresh: list[tuple[int, int]] = []
        self.most_in_flight = 0

    def step(self) -> list[RequestOutput]:
        while len(self.in_flight) < self.depth:
            plan = self.scheduler.plan(0.0)
            if plan is None:
                break
            self.check_plan(plan)
            self.plans.append(plan)
            self.first.take(self.fresh)
            self.fresh = []
            self.first.execute(plan)
            self.in_flight.append(self.worker.execute(plan))
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        if not self.in_flight:
            assert not self.scheduler.has_unfinished, "nothing planned, nothing in flight, and requests are left"
            return []
        result = self.in_flight[0]
        self.fresh += zip(result.rows, result.token_ids, strict=True)
        outputs = self.collect()
        self.scheduler.check_integrity()
        return outputs

    def check_plan(self, plan: ExecutionPlan) -> None:
        assert 0 < plan.num_tokens <= self.config.max_num_batched_tokens
        sampled = {(row, self.worker.generations[row]) for result in self.in_flight for row in result.rows}
        admitted = {row.row for row in plan.admits}
        assert all((row, self.worker.generations[row]) not in sampled for row in plan.rows if row not in admitted)


def run_workload(seed: int, num_stages: int) -> Pipeline:
    """As in `test_core_fuzz`: dense, with preemption, shared prefixes and aborts."""
    rng = random.Random(seed)
    windows = rng.choice([(8, None), (None, 8), (None,), (5, None), (3,)])
    block_size = rng.choice([2, 4, 8])
    config = SchedulerConfig(
        max_num_seqs=rng.randint(3, 8),
        max_num_batched_tokens=rng.choice([8, 16, 48]),
        long_prefill_limit=rng.choice([0, 0, 5]),
        policy=rng.choice(["fcfs", "priority"]),
        enable_prefix_caching=rng.random() < 0.8,
        max_queue=1000,
    )
    loop = Pipeline(
        config,
        num_stages,
        num_blocks=len(windows) * (MAX_MODEL_LEN // block_size) + 1 + rng.choice([0, 0, 2, 4]),
        block_size=block_size,
        windows=windows,
        max_model_len=MAX_MODEL_LEN,
    )
    texts = [[rng.randrange(VOCAB_SIZE) for _ in range(24)] for _ in range(2)]
    aborted = []
    for i in range(24):
        request = drawn_request(rng, texts, i)
        with suppress(RequestRejected):
            loop.add(request)
        for _ in range(rng.choice([0, 0, 1, 2])):
            loop.step()
        if rng.random() < 0.1:
            name = rng.choice(list(loop.requests))
            if loop.scheduler.abort(name):
                aborted.append(name)
    loop.run()
    loop.check_idle()
    loop.check_outputs(aborted)
    return loop


@pytest.mark.parametrize("num_stages", [2, 4])
def test_random_workloads(num_stages: int) -> None:
    num_preemptions = num_hits = 0
    for seed in range(60):
        loop = run_workload(seed, num_stages)
        stats = loop.scheduler.stats()
        num_preemptions += stats.num_preemptions
        num_hits += stats.prefix_hits_tokens
        assert loop.most_in_flight > 1
    assert num_preemptions > 60
    assert num_hits > 20 * 60


@pytest.mark.parametrize(("num_rows", "num_stages"), [(8, 2), (8, 4), (7, 3), (2, 4)])
def test_the_pipeline_stays_full_of_even_batches(num_rows: int, num_stages: int) -> None:
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64)
    loop = Pipeline(config, num_stages, num_blocks=200, max_model_len=64)
    for index in range(num_rows):
        loop.add(make_request(f"r{index}", [index] * 3, 40))
    for _ in range(4 * num_stages):
        loop.step()
    share = -(-num_rows // num_stages)
    for _ in range(8 * num_stages):
        loop.step()
        assert len(loop.in_flight) == min(num_stages, num_rows) - 1
        assert len(loop.plans[-1].rows) <= share
    # Over one round of the pipeline every row has had its turn.
    last = [row for plan in loop.plans[-min(num_stages, num_rows) :] for row in plan.rows]
    assert sorted(last) == list(range(num_rows))
    loop.run()
    loop.check_outputs()
