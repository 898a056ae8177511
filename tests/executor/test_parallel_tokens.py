"""However a model is split over ranks, it says the same: greedy and seeded tokens equal one rank's, in float32."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from engine.config import CacheConfig, ConfigError, EngineConfig, SchedulerConfig
from engine.core.request import EngineRequest
from engine.core.sampling_params import SamplingParams
from engine.engine_core import EngineCore, open_model
from engine.llm import LLM
from engine.placement import Device, HostSpec, ParallelSizes, PlacementOptions, Shares, place

BASE = EngineConfig(
    model="tiny-oss",
    max_model_len=512,
    cpu_threads=1,
    scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=96),
    cache=CacheConfig(num_blocks=256),
)
OPTIONS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, frequency_penalty=0.5, repetition_penalty=1.2),
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(temperature=0.0, logprobs=2),
)


def requests(seed: int) -> list[EngineRequest]:
    source = random.Random(seed)
    vocab = open_model(BASE)[1].vocab_size
    shared = [source.randrange(vocab) for _ in range(40)]
    made = []
    for index in range(8):
        prompt = (shared if index % 3 == 0 else []) + [source.randrange(vocab) for _ in range(source.randrange(3, 130))]
        made.append(EngineRequest(f"r{index}", prompt, OPTIONS[index % 4], max_tokens=32, seed=source.randrange(2**60)))
    return made


def run(core: EngineCore, items: list[EngineRequest]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {item.request_id: [] for item in items}
    for item in items:
        assert core.add(item) is None
    steps = 0
    while core.has_work:
        for output in core.step():
            assert output.error is None, output.error
            tokens[output.request_id] += output.new_token_ids
        steps += 1
        assert steps < 5000
    core.scheduler.check_integrity()
    assert core.stats().num_used_blocks == 0
    return tokens


@pytest.fixture(scope="module")
def alone() -> dict[str, list[int]]:
    core = EngineCore.start(BASE)
    return run(core, requests(3))


def answers(config: EngineConfig) -> dict[str, list[int]]:
    core = EngineCore.start(config)
    try:
        first = run(core, requests(3))
        # Again, with the prefixes in the cache: where chunks begin must not matter on any rank either.
        assert run(core, requests(3)) == first
        return first
    finally:
        core.stop()


@pytest.mark.parametrize(
    ("tensor", "pipeline", "is_expert_parallel"),
    [
        pytest.param(2, 1, False, id="tp2"),
        pytest.param(4, 1, False, id="tp4, each KV head on two ranks"),
        pytest.param(1, 2, False, id="pp2, stages without the same layers of each group"),
        pytest.param(1, 3, False, id="pp3", marks=pytest.mark.slow),
        pytest.param(2, 2, False, id="tp2 pp2", marks=pytest.mark.slow),
        pytest.param(2, 1, True, id="ep2"),
        pytest.param(8, 1, False, id="tp8", marks=pytest.mark.slow),
        pytest.param(4, 1, True, id="ep4", marks=pytest.mark.slow),
        pytest.param(8, 1, True, id="ep8", marks=pytest.mark.slow),
        pytest.param(2, 3, False, id="tp2 pp3", marks=pytest.mark.slow),
        pytest.param(1, 6, False, id="pp6", marks=pytest.mark.slow),
        pytest.param(2, 2, True, id="ep2 pp2", marks=pytest.mark.slow),
    ],
)
def test_equal_splits(alone: dict[str, list[int]], tensor: int, pipeline: int, is_expert_parallel: bool) -> None:
    config = replace(
        BASE,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        enable_expert_parallel=is_expert_parallel,
    )
    assert answers(config) == alone


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 2)])
def test_splits_over_tcp(alone: dict[str, list[int]], tensor: int, pipeline: int) -> None:
    config = replace(BASE, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, cpu_communicator="gloo")
    assert answers(config) == alone


@pytest.mark.parametrize(
    ("sizes", "shares"),
    [
        # One rank of three has experts' columns and no KV head; nine units of 32 columns as 1 + 3 + 5; few words.
        (
            ParallelSizes(1, 1, 3),
            Shares(kv_heads=(1, 0, 1), mlp_units=(1, 3, 5), vocab=(100, 0, 0)),
        ),
        # The first rank, which adds what all hold alike, has neither heads nor columns; stages of 1 and 5 layers.
        (ParallelSizes(1, 2, 2), Shares(layers=(1, 5), kv_heads=(0, 2), mlp_units=(0, 9))),
        (ParallelSizes(1, 1, 2, True), Shares(experts=(1, 7))),
    ],
    ids=["tp3", "tp2 pp2", "ep2"],
)
def test_uneven_splits(alone: dict[str, list[int]], sizes: ParallelSizes, shares: Shares) -> None:
    model = open_model(BASE)[1]
    if shares.vocab:
        shares = replace(shares, vocab=(100, 0, model.vocab_size - 100))
    host = HostSpec("localhost", tuple(Device(f"cpu:{i}") for i in range(sizes.world)))
    placement = place(model, sizes, [host], PlacementOptions(shares=shares))
    assert answers(replace(BASE, placement=placement.to_json())) == alone


def test_a_starved_pipeline_preempts_and_says_the_same() -> None:
    source = random.Random(5)
    # Short prompts, long answers: all eight are admitted, then outgrow the pool together.
    items = [
        EngineRequest(f"p{i}", [source.randrange(2000) for _ in range(16)], OPTIONS[i % 2], max_tokens=120, seed=1)
        for i in range(8)
    ]
    expected = run(EngineCore.start(BASE), items)
    core = EngineCore.start(replace(BASE, pipeline_parallel_size=2, cache=CacheConfig(num_blocks=64)))
    try:
        assert run(core, items) == expected
        assert core.stats().num_preemptions > 0
    finally:
        core.stop()


def test_the_offline_face_takes_the_sizes() -> None:
    options = SamplingParams(temperature=0.0, max_tokens=12)
    answers_of = []
    for tensor in (1, 2):
        llm = LLM(
            "tiny-oss", device="cpu", cpu_threads=1, kv_blocks=128, max_model_len=256, tensor_parallel_size=tensor
        )
        answers_of.append([result.outputs[0].token_ids for result in llm.generate(["Hello", "What is"], options)])
        llm.close()
    assert answers_of[0] == answers_of[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(BASE, tensor_parallel_size=3), "tp 3: 16 attention heads do not divide by it"),
        (replace(BASE, pipeline_parallel_size=7), "pp 7: the model has 6 layers"),
        (replace(BASE, placement="{}"), "not a placement"),
        (replace(BASE, data_parallel_rank=1), "the placement has 1 engines"),
        (replace(BASE, tensor_parallel_size=2, device="cuda:0"), r"needs cuda:1, and \d GPUs are here"),
    ],
)
def test_what_cannot_be_placed_is_refused_before_anything_starts(config: EngineConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineCore.start(config)


def test_an_engine_across_nodes_is_refused() -> None:
    hosts = [HostSpec(name, (Device("cpu:0"),)) for name in ("a", "b")]
    placement = place(open_model(BASE)[1], ParallelSizes(1, 2, 1), hosts)
    with pytest.raises(ConfigError, match="are on a, b"):
        EngineCore.start(replace(BASE, placement=placement.to_json()))
