"""The GPU rank's own logic, on a CPU: loading, rows, mixed steps, graphs' inputs, sampling; kernels by their twins."""

from __future__ import annotations

import functools
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kernels
from engine.config import CacheConfig, ConfigError, EngineConfig, ModelConfig, SchedulerConfig, load_model_config
from engine.config import resolve_model_folder as find_model
from engine.core.request import EngineRequest
from engine.core.sampling_params import SamplingParams
from engine.engine_core import EngineCore
from engine.engine_core import place as place_engine
from engine.executor.inline import InlineGpuExecutor
from engine.memory import fit, gpu_weight_bytes, kv_cache_groups
from engine.models.checkpoint import Checkpoint, CheckpointError
from engine.models.dummy import write_checkpoint
from engine.usage import DeviceUsage
from tests.worker import gpu_twins

TINY = EngineConfig(model="tiny-oss", max_model_len=256)
GREEDY = SamplingParams(temperature=0.0)
DEVICE = torch.device("cpu")
MAX_TOKENS = 12


@pytest.fixture(autouse=True)
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the twins behind the door; the modules that opened it are imported anew for each test."""
    monkeypatch.setitem(sys.modules, "kernels.gpu", gpu_twins)
    monkeypatch.setattr(kernels, "gpu", gpu_twins, raising=False)
    for name in (
        "engine.models.gpt_oss_gpu",
        "engine.models.gpt_oss_gpu_weights",
        "engine.worker.gpu_decode",
        "engine.worker.gpu_runner",
    ):
        monkeypatch.delitem(sys.modules, name, raising=False)


def load(model: ModelConfig, folder: Path | None, num_positions: int = 256) -> Any:
    from engine.models.gpt_oss_gpu_weights import load_gpt_oss_gpu

    checkpoint = None if folder is None else Checkpoint.open(folder)
    return load_gpt_oss_gpu(
        model, checkpoint, DEVICE, num_positions=num_positions, num_threads=2, seed=0, progress=lambda *_: None
    )


def gpu_core(scheduler: SchedulerConfig, num_blocks: int = 256) -> EngineCore:
    """An engine whose only rank is the GPU runner over the twins."""
    from engine.worker.gpu_runner import GpuModelRunner

    folder = find_model("tiny-oss")
    assert folder is not None
    model, size = load_model_config(folder), 16
    weights = load(model, folder)
    groups = kv_cache_groups(model)
    shape = (num_blocks * size, 2, model.num_kv_heads, model.head_dim)
    runner = GpuModelRunner(
        weights,
        groups,
        [torch.zeros(shape, dtype=torch.bfloat16) for _ in groups[0].layers],
        num_rows=scheduler.max_num_seqs,
        block_size=size,
        max_model_len=256,
        is_eager=True,
    )
    config = replace(TINY, scheduler=scheduler, cache=CacheConfig(num_blocks=num_blocks))
    memory = fit(
        model,
        budget_bytes=1 << 40,
        weight_bytes=weights.num_bytes,
        kv_dtype="bfloat16",
        block_size=size,
        max_model_len=256,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        num_blocks=num_blocks,
    )
    facts: Any = None
    rank = place_engine(config, model).ranks[0]
    worker: Any = SimpleNamespace(spec=rank, launch=runner.launch, runner=runner, usage=DeviceUsage)
    return EngineCore(config, model, InlineGpuExecutor(worker), memory, 256, facts)


def run(core: EngineCore, requests: list[EngineRequest]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        assert core.add(request) is None
    for _ in range(5000):
        if not core.has_work:
            break
        for output in core.step():
            assert output.error is None, output.error
            tokens[output.request_id] += output.new_token_ids
    assert not core.has_work
    assert core.stats().num_used_blocks == 0
    core.scheduler.check_integrity()
    return tokens


def requests_of(params: list[SamplingParams], seed: int = 1, max_tokens: int = MAX_TOKENS) -> list[EngineRequest]:
    source = random.Random(seed)
    shared = [source.randrange(2000) for _ in range(70)]
    return [
        EngineRequest(
            f"r{i}",
            shared[: 40 * (i % 2)] + [source.randrange(2000) for _ in range(1 + 17 * i % 60)],
            p,
            max_tokens,
            seed=i,
        )
        for i, p in enumerate(params)
    ]


OVERLAPPED = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=256, async_scheduling=True)


MIXED = [
    GREEDY,
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(temperature=1.0, top_k=5),
    SamplingParams(temperature=0.0, frequency_penalty=0.5, repetition_penalty=1.2),
    SamplingParams(temperature=1.0, logprobs=2),
    SamplingParams(temperature=0.7, min_p=0.1, logit_bias={5: 3.0}),
    GREEDY,
    SamplingParams(temperature=1.0),
]


@functools.cache
def undisturbed() -> dict[str, list[int]]:
    """The tokens of the mixed requests from a plentiful engine; what others are held against."""
    return run(gpu_core(OVERLAPPED), requests_of(MIXED))


def test_greedy_tokens_are_those_of_the_cpu() -> None:
    requests = requests_of([GREEDY] * 6)
    cpu = EngineCore.start(replace(TINY, cache=CacheConfig(num_blocks=256)))
    wanted = run(cpu, requests)
    got = run(gpu_core(OVERLAPPED), requests)
    # bfloat16 against float32: a near-tie may turn, and everything after it; most of the text may not.
    assert sum(got[name] == wanted[name] for name in wanted) >= len(wanted) - 1


@pytest.mark.parametrize(
    "scheduler",
    [
        replace(OVERLAPPED, async_scheduling=False),
        replace(OVERLAPPED, max_num_batched_tokens=9),
        replace(OVERLAPPED, enable_prefix_caching=False),
    ],
    ids=["plain", "tiny chunks", "no cache"],
)
def test_tokens_do_not_depend_on_how_steps_are_cut(scheduler: SchedulerConfig) -> None:
    wanted = undisturbed()
    got = run(gpu_core(scheduler), requests_of(MIXED))
    assert sum(got[name] == wanted[name] for name in wanted) >= len(wanted) - 1
    assert all(len(tokens) == MAX_TOKENS for tokens in got.values())


def test_preemption_recomputes_the_same_tokens() -> None:
    requests = requests_of([GREEDY] * 8, max_tokens=40)
    core = gpu_core(OVERLAPPED, num_blocks=40)
    got = run(core, requests)
    assert core.stats().num_preemptions > 0
    wanted = run(gpu_core(OVERLAPPED), requests)
    assert sum(got[name] == wanted[name] for name in wanted) >= len(wanted) - 1


def test_a_row_does_not_change_with_its_neighbours() -> None:
    requests, together = requests_of(MIXED), undisturbed()
    core = gpu_core(OVERLAPPED)
    alone = {request.request_id: run(core, [request])[request.request_id] for request in requests}
    assert sum(alone[name] == together[name] for name in alone) >= len(alone) - 1


def test_rows_beyond_the_small_kernels_take_the_large_step() -> None:
    scheduler = SchedulerConfig(max_num_seqs=20, max_num_batched_tokens=512)
    core = gpu_core(scheduler, num_blocks=600)
    got = run(core, requests_of([GREEDY] * 20, max_tokens=6))
    small = gpu_core(OVERLAPPED, num_blocks=600)
    wanted = run(small, requests_of([GREEDY] * 20, max_tokens=6))
    assert sum(got[name] == wanted[name] for name in wanted) >= 18


def test_logits_that_are_not_finite_end_their_request_alone() -> None:
    core = gpu_core(OVERLAPPED)
    runner: Any = core.executor._worker.runner  # type: ignore[attr-defined]
    runner._model.embedding[7] = float("nan")
    bad = EngineRequest("bad", [3, 7, 7], GREEDY, 8, seed=0)
    good = EngineRequest("good", [3, 4, 5], GREEDY, 8, seed=0)
    core.add(bad)
    core.add(good)
    errors, made = {}, {"bad": 0, "good": 0}
    while core.has_work:
        for output in core.step():
            made[output.request_id] += len(output.new_token_ids)
            if output.error:
                errors[output.request_id] = output.error
    assert list(errors) == ["bad"]
    assert made["good"] == 8


def test_the_coldest_temperature_is_greedy() -> None:
    core = gpu_core(OVERLAPPED)
    prompt = [3, 4, 5]
    cold = run(core, [EngineRequest("cold", prompt, SamplingParams(temperature=1e-38), 8, seed=1)])["cold"]
    assert cold == run(core, [EngineRequest("greedy", prompt, GREEDY, 8, seed=1)])["greedy"]


def test_weights_are_counted_as_they_are_held(tmp_path: Path) -> None:
    folder = find_model("tiny-oss")
    assert folder is not None
    model = load_model_config(folder)
    held = load(model, folder).num_bytes
    scales = sum(
        layer.weights.gate_up_scales.nbytes + layer.weights.down_scales.nbytes for layer in load(model, folder).layers
    )
    # The twins keep scales as they are; the kernels hold a padded copy, which the arithmetic counts.
    estimate = gpu_weight_bytes(model, 256)
    assert held <= estimate
    assert estimate - held <= 1.5 * scales


def test_made_up_weights_need_no_files() -> None:
    folder = find_model("tiny-oss")
    assert folder is not None
    model = load_model_config(folder)
    first, second = load(model, None), load(model, None)
    assert torch.equal(first.layers[1].weights.gate_up_blocks, second.layers[1].weights.gate_up_blocks)
    assert int(first.layers[0].weights.gate_up_scales.max()) <= gpu_twins.LARGEST_SCALE
    assert first.lm_head.float().std() > 0


def test_scales_beyond_the_kernels_are_refused(tmp_path: Path) -> None:
    import json

    from safetensors.torch import load_file, save_file

    folder = find_model("tiny-oss")
    assert folder is not None
    config = json.loads((folder / "config.json").read_text())
    model = write_checkpoint(tmp_path / "m", config)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.0.mlp.experts.down_proj_scales"][0, 0, 0] = 140
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="scale 140"):
        load(model, tmp_path / "m")


def test_a_machine_without_cuda_says_so() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch is built for CUDA")
    with pytest.raises(ConfigError, match="built without CUDA") as caught:
        EngineCore.start(replace(TINY, device="cuda:0"))
    assert "device cpu" in caught.value.hint


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Have torch speak of a GPU: what is tested is what we make of its answers."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    return monkeypatch


def test_a_gpu_of_another_generation_is_refused_with_the_way_out(fake_device: pytest.MonkeyPatch) -> None:
    from engine.worker.gpu_worker import GpuError, open_device

    fake_device.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(GpuError, match="NVIDIA A100 is sm_80; the GPU kernels need sm_90") as caught:
        open_device("cuda:0")
    assert caught.value.hint == "use device cpu"


def test_an_old_driver_is_named_with_what_it_must_serve(fake_device: pytest.MonkeyPatch) -> None:
    from engine.worker.gpu_worker import GpuError, open_device

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nPlease update.")

    fake_device.setattr(torch, "zeros", refuse)
    with pytest.raises(GpuError, match="driver on your system is too old") as caught:
        open_device("cuda:0")
    assert "the driver must serve CUDA 13.0" in caught.value.hint
    assert "\n" not in str(caught.value)


def test_a_kernel_that_cannot_be_built_is_one_clear_error() -> None:
    from engine.worker.gpu_worker import GpuError, _kernels
    from kernels.build import KernelBuildError

    with pytest.raises(GpuError, match=r"layers.cu: error: no such thing") as caught, _kernels():
        raise KernelBuildError("layers.cu: error: no such thing")
    assert caught.value.hint == "use device cpu"
    ptxas = type("PTXASError", (Exception,), {"__module__": "triton.runtime.errors"})
    with pytest.raises(GpuError, match="PTXASError: PTXAS error: out of registers"), _kernels():
        raise ptxas("PTXAS error: out of registers\nlong listing")
    with pytest.raises(ZeroDivisionError), _kernels():
        raise ZeroDivisionError
