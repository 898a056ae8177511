"""A request's tokens depend on its prompt and options only: not on neighbours, chunks, prefix hits or preemption."""

from __future__ import annotations

import functools
import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.core.request import EngineRequest
from engine.core.sampling_params import SamplingParams
from engine.engine_core import EngineCore

BASE = EngineConfig(model="tiny-oss", max_model_len=512)
MAX_TOKENS = 24


SHAPES = {
    "plain": (SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=256, async_scheduling=False), 1024),
    "overlapped": (SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=256, async_scheduling=True), 1024),
    "tiny chunks": (SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=9, async_scheduling=True), 1024),
    "no cache": (
        SchedulerConfig(
            max_num_seqs=8, max_num_batched_tokens=256, enable_prefix_caching=False, async_scheduling=False
        ),
        1024,
    ),
    # So small that eight requests cannot run together: preemption and recompute happen in most examples.
    "starved": (SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, async_scheduling=True), 64),
    "starved, plain": (SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, async_scheduling=False), 64),
}


@functools.cache
def core_of(name: str) -> EngineCore:
    scheduler, num_blocks = SHAPES[name]
    return EngineCore.start(replace(BASE, scheduler=scheduler, cache=CacheConfig(num_blocks=num_blocks)))


def run(core: EngineCore, requests: list[EngineRequest], aborted: frozenset[str] = frozenset()) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        assert core.add(request) is None
    steps = 0
    while core.has_work:
        for output in core.step():
            assert output.error is None, output.error
            tokens[output.request_id] += output.new_token_ids
        steps += 1
        if steps == 3:
            for request_id in aborted:
                core.abort(request_id)
        assert steps < 5000
    stats = core.stats()
    assert stats.num_used_blocks == 0
    core.scheduler.check_integrity()
    return tokens


def request(
    name: str, prompt: list[int], params: SamplingParams, seed: int, max_tokens: int = MAX_TOKENS
) -> EngineRequest:
    return EngineRequest(name, prompt, params, max_tokens=max_tokens, seed=seed)


@st.composite
def batches(draw: st.DrawFn) -> list[EngineRequest]:
    source = random.Random(draw(st.integers(0, 2**32)))
    vocab = core_of("plain").model.vocab_size
    shared = [source.randrange(vocab) for _ in range(draw(st.integers(0, 150)))]
    items = []
    for index in range(draw(st.integers(1, 8))):
        own = [source.randrange(vocab) for _ in range(draw(st.integers(1, 60)))]
        prompt = (shared if draw(st.booleans()) else []) + own
        params = draw(
            st.sampled_from(
                [
                    SamplingParams(temperature=0.0),
                    SamplingParams(temperature=0.8, top_p=0.9),
                    SamplingParams(temperature=1.0, top_k=40),
                    SamplingParams(temperature=0.0, frequency_penalty=0.5, repetition_penalty=1.2),
                ]
            )
        )
        items.append(request(f"r{index}", prompt, params, seed=source.randrange(2**60)))
    return items


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(batches())
def test_tokens_do_not_depend_on_the_batch_the_chunks_the_cache_or_preemption(items: list[EngineRequest]) -> None:
    alone = {}
    for item in items:
        core_of("no cache").scheduler.reset_prefix_cache()
        alone |= run(core_of("no cache"), [item])
    assert all(len(tokens) == MAX_TOKENS for tokens in alone.values())
    for name in SHAPES:
        assert run(core_of(name), items) == alone, name


def test_preempted_requests_say_the_same() -> None:
    source = random.Random(5)
    vocab = core_of("plain").model.vocab_size
    # Short prompts, long answers: all eight are admitted, then outgrow the pool together.
    items = [
        request(f"p{i}", [source.randrange(vocab) for _ in range(16)], SamplingParams(temperature=0.0), 1, 120)
        for i in range(8)
    ]
    expected = run(core_of("no cache"), items)
    for name in ("starved", "starved, plain"):
        before = core_of(name).stats().num_preemptions
        assert run(core_of(name), items) == expected
        assert core_of(name).stats().num_preemptions > before


@pytest.mark.parametrize("name", ["plain", "overlapped", "starved"])
def test_aborts_in_the_middle_leave_neighbours_and_the_pool_untouched(name: str) -> None:
    source = random.Random(11)
    vocab = core_of("plain").model.vocab_size
    items = [
        request(
            f"a{i}",
            [source.randrange(vocab) for _ in range(source.randrange(5, 80))],
            SamplingParams(temperature=0.0),
            i,
        )
        for i in range(8)
    ]
    kept = [item for item in items if int(item.request_id[1:]) % 2 == 0]
    gone = frozenset(item.request_id for item in items) - {item.request_id for item in kept}
    expected = run(core_of("no cache"), kept)
    found = run(core_of(name), items, aborted=gone)
    assert {key: found[key] for key in expected} == expected
