"""An engine core on the two nodes of a RayPair, and what it must say."""

from __future__ import annotations

import random

from ray_nodes import ADDRESSES, ONE, RayPair

from engine.config import BUNDLED_MODELS, CacheConfig, EngineConfig, NodesConfig, SchedulerConfig, load_model_config
from engine.core.request import EngineRequest
from engine.core.sampling_params import SamplingParams
from engine.engine_core import EngineCore
from engine.placement import Device, HostSpec, ParallelSizes, place

MODEL = load_model_config(BUNDLED_MODELS["tiny-oss"])
ALONE = EngineConfig(
    model="tiny-oss",
    max_model_len=256,
    cpu_threads=1,
    scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64),
    cache=CacheConfig(num_blocks=128),
)


def on_ray(
    pair: RayPair, sizes: ParallelSizes, *, executor: str = "ray", placement_seconds: float = 20.0
) -> EngineConfig:
    """Split the model over both nodes: a stage on each, or its tensor group in halves."""
    per_node = sizes.world // 2
    devices = tuple(Device(f"cpu:{slot}") for slot in range(per_node))
    placement = place(MODEL, sizes, [HostSpec("one", devices), HostSpec("two", devices)])
    assert placement.nodes == ("one", "two")
    return EngineConfig(
        model="tiny-oss",
        max_model_len=ALONE.max_model_len,
        cpu_threads=1,
        scheduler=ALONE.scheduler,
        cache=ALONE.cache,
        placement=placement.to_json(),
        executor=executor,  # type: ignore[arg-type]
        node_address=ONE,
        step_timeout_seconds=20.0,
        nodes=NodesConfig(
            names=("one", "two"),
            addresses=(ADDRESSES["one"], ADDRESSES["two"]),
            head_host=ONE,
            ray_address=pair.address,
            placement_timeout_seconds=placement_seconds,
        ),
    )


def requests(num_tokens: int = 16) -> list[EngineRequest]:
    source = random.Random(7)
    made = []
    for index in range(6):
        prompt = [source.randrange(MODEL.vocab_size) for _ in range(source.randrange(3, 90))]
        params = SamplingParams(temperature=0.0 if index % 3 else 0.8)
        made.append(EngineRequest(f"r{index}", prompt, params, max_tokens=num_tokens, seed=source.randrange(2**60)))
    return made


def run(core: EngineCore, items: list[EngineRequest]) -> dict[str, list[int]]:
    """Run requests to their ends; greedy and seeded ones."""
    tokens: dict[str, list[int]] = {item.request_id: [] for item in items}
    for item in items:
        assert core.add(item) is None
    while core.has_work:
        for output in core.step():
            assert output.error is None, output.error
            tokens[output.request_id] += output.new_token_ids
    return tokens
