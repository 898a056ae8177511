"""Dense random workloads: full batches, pools that force preemption, shared prefixes, aborts at any moment.

The stateful test finds short counterexamples; this one keeps every mechanism busy at once, for many seeds.
"""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
from core_support import VOCAB_SIZE, Loop, drawn_request

from engine.config import SchedulerConfig
from engine.core.request import RequestRejected

MAX_MODEL_LEN = 48
NUM_SEEDS = 160


def run_workload(seed: int, depth: int) -> Loop:
    """Run one workload to its end. Everything but `depth` follows from `seed`."""
    rng = random.Random(seed)
    windows = rng.choice([(8, None), (None, 8), (None,), (5, None), (3,), (6, None, 3, None)])
    block_size = rng.choice([2, 4, 8])
    is_chunked = rng.random() < 0.8
    config = SchedulerConfig(
        max_num_seqs=rng.randint(3, 8),
        max_num_batched_tokens=rng.choice([8, 16, 48]) if is_chunked else MAX_MODEL_LEN,
        long_prefill_limit=rng.choice([0, 0, 5]),
        policy=rng.choice(["fcfs", "priority"]),
        enable_prefix_caching=rng.random() < 0.8,
        enable_chunked_prefill=is_chunked,
        max_queue=1000,
    )
    num_blocks = len(windows) * (MAX_MODEL_LEN // block_size) + 1 + rng.choice([0, 0, 2, 4])
    loop = Loop(
        config,
        num_blocks=num_blocks,
        block_size=block_size,
        windows=windows,
        max_model_len=MAX_MODEL_LEN,
        depth=depth,
    )
    texts = [[rng.randrange(VOCAB_SIZE) for _ in range(24)] for _ in range(2)]
    aborted = []
    for i in range(24):
        request = drawn_request(rng, texts, i)
        with suppress(RequestRejected):  # the queue may hold too many tokens already
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


@pytest.mark.parametrize("depth", [1, 2])
def test_random_workloads(depth: int) -> None:
    num_preemptions = num_hits = 0
    for seed in range(NUM_SEEDS):
        stats = run_workload(seed, depth).scheduler.stats()
        num_preemptions += stats.num_preemptions
        num_hits += stats.prefix_hits_tokens
    # The workloads are worth nothing if they avoid what they are for.
    assert num_preemptions > NUM_SEEDS
    assert num_hits > 20 * NUM_SEEDS


def test_equal_inputs_make_equal_plans() -> None:
    for seed in range(20):
        assert run_workload(seed, 2).plans == run_workload(seed, 2).plans
