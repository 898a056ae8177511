"""The whole engine on one GPU: logits against float32, greedy tokens against the CPU's, rows against their neighbours.

Runs under pytest with marker `gpu`, or as a script where pytest is missing.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine.config import (
    CacheConfig,
    ConfigError,
    EngineConfig,
    ModelConfig,
    SchedulerConfig,
    load_model_config,
    resolve_model_folder,
)
from engine.core.request import EngineRequest
from engine.core.sampling_params import SamplingParams
from engine.engine_core import EngineCore

HAS_GPU = importlib.util.find_spec("triton") is not None and torch.cuda.is_available()
try:
    import pytest

    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device and triton")]
except ModuleNotFoundError:
    pass

GREEDY = SamplingParams(temperature=0.0)
TINY = EngineConfig(
    model="tiny-oss",
    device="cuda:0",
    max_model_len=1024,
    cache=CacheConfig(num_blocks=4096),
    scheduler=SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=2048),
)


def run(core: EngineCore, requests: list[EngineRequest]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        assert core.add(request) is None
    while core.has_work:
        for output in core.step():
            assert output.error is None, output.error
            tokens[output.request_id] += output.new_token_ids
    assert core.stats().num_used_blocks == 0
    core.scheduler.check_integrity()
    return tokens


def requests_of(params: list[SamplingParams], max_tokens: int = 48) -> list[EngineRequest]:
    source = random.Random(3)
    made = []
    for i, p in enumerate(params):
        length = (5, 40, 170, 300)[i % 4] + i  # shorter and longer than the window of 64
        made.append(EngineRequest(f"r{i}", [source.randrange(2000) for _ in range(length)], p, max_tokens, seed=i))
    return made


def agreement(first: dict[str, list[int]], second: dict[str, list[int]]) -> float:
    """Share of requests with equal tokens."""
    return sum(first[name] == second[name] for name in first) / len(first)


def test_greedy_tokens_are_those_of_the_cpu() -> None:
    requests = requests_of([GREEDY] * 24)
    wanted = run(EngineCore.start(replace(TINY, device="cpu")), requests)
    core = EngineCore.start(TINY)
    got = run(core, requests)
    alone = {request.request_id: run(core, [request])[request.request_id] for request in requests}
    print(f"equal to the CPU: batched {agreement(got, wanted):.2f}, alone {agreement(alone, wanted):.2f}")
    # bfloat16 turns a near-tie now and then.
    assert agreement(got, wanted) >= 0.8
    assert agreement(alone, wanted) >= 0.8


def test_graphs_give_what_eager_steps_give() -> None:
    params = [GREEDY, SamplingParams(temperature=0.8, top_p=0.9), SamplingParams(temperature=1.0), GREEDY]
    core, eager = EngineCore.start(TINY), EngineCore.start(replace(TINY, enforce_eager=True))
    for count in (1, 3, 4, 7, 16, 40):
        requests = requests_of([params[i % 4] for i in range(count)])
        got, wanted = run(core, requests), run(eager, requests)
        print(f"{count} rows: {agreement(got, wanted):.2f}")
        assert agreement(got, wanted) == 1.0


def test_tokens_do_not_depend_on_chunks_prefixes_and_preemption() -> None:
    requests = requests_of([GREEDY] * 16)
    wanted = run(EngineCore.start(TINY), requests)
    shapes = {
        "chunks": replace(TINY, scheduler=replace(TINY.scheduler, max_num_batched_tokens=67)),
        "plain": replace(TINY, scheduler=replace(TINY.scheduler, async_scheduling=False)),
        "starved": replace(TINY, max_model_len=512, cache=CacheConfig(num_blocks=150)),
    }
    for name, config in shapes.items():
        core = EngineCore.start(config)
        got = run(core, requests)
        again = run(core, requests)  # from cached prefixes
        print(
            f"{name}: {agreement(got, wanted):.2f}, again {agreement(again, wanted):.2f}, "
            f"{core.stats().num_preemptions} preemptions"
        )
        assert agreement(got, wanted) >= 0.8
        assert agreement(again, wanted) >= 0.8


def test_options_that_the_host_samples() -> None:
    params = [
        SamplingParams(temperature=0.0, frequency_penalty=0.7, repetition_penalty=1.3),
        SamplingParams(temperature=0.0, logprobs=3),
        SamplingParams(temperature=0.0, logit_bias={7: 50.0}),
        GREEDY,
    ]
    requests = requests_of(params)
    cpu = run(EngineCore.start(replace(TINY, device="cpu")), requests)
    gpu = run(EngineCore.start(TINY), requests)
    print(f"equal to the CPU: {agreement(gpu, cpu):.2f}")
    assert agreement(gpu, cpu) >= 0.75
    assert set(gpu["r2"]) == {7}


def errors_by_layer(model: ModelConfig, num_tokens: int) -> list[float]:
    """Relative errors of the normed states after each layer, and last of the logits, against float32."""
    from engine.models.gpt_oss_gpu_weights import load_gpt_oss_gpu
    from kernels import gpu

    device = torch.device("cuda:0")
    weights = load_gpt_oss_gpu(
        model, None, device, num_positions=2 * num_tokens, num_threads=8, seed=5, progress=lambda *_: None
    )
    torch.manual_seed(7)
    ids = torch.randint(0, model.vocab_size, (num_tokens,), device=device)
    positions = torch.arange(num_tokens, device=device, dtype=torch.int32)
    tables = torch.arange(1, num_tokens // 64 + 2, device=device, dtype=torch.int32)[None]
    slots = (positions + 64).int()
    caches = [
        torch.zeros((num_tokens + 192, 2, model.num_kv_heads, model.head_dim), dtype=torch.bfloat16, device=device)
        for _ in range(model.num_layers)
    ]
    starts = torch.tensor([0, num_tokens], device=device, dtype=torch.int32)
    length = torch.tensor([num_tokens], device=device, dtype=torch.int32)

    def attend(layer: int, query: torch.Tensor) -> torch.Tensor:
        return gpu.paged_prefill_attention(
            query, caches[layer], tables, starts, length, weights.layers[layer].weights.sinks, model.head_dim**-0.5,
            block_size=64, window=model.layer_windows[layer],
        )  # fmt: skip

    errors = []
    for count in range(1, model.num_layers + 1):
        part = replace(weights, layers=weights.layers[:count])
        chosen: list[torch.Tensor] = []
        with torch.inference_mode():
            normed = part.forward(ids, positions, [slots] * count, caches[:count], attend, after_router=chosen.append)
        wanted = reference(part, ids, positions, chosen)
        errors.append(relative(normed, wanted))
    logits = weights.logits(normed[-4:])
    errors.append(relative(logits, wanted[-4:] @ weights.lm_head.float().T))
    return errors


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def reference(weights: Any, ids: torch.Tensor, positions: torch.Tensor, routes: list[torch.Tensor]) -> torch.Tensor:
    """Compute the normed states in float32, layer by layer, from the twins.

    Experts are those that the GPU chose (`routes`): a near-tie that turns is another model's answer, not an error of
    arithmetic. Their weights are computed here; that few choices turn is asserted.
    """
    from kernels.reference import basic, moe
    from kernels.reference.attention import attend
    from kernels.reference.decode import _expanded

    model = weights.config
    x = weights.embedding[ids].float()
    cos, sin = weights.rotations[positions.long()].unsqueeze(1).unbind(-1)
    for layer, chosen in zip(weights.layers, routes, strict=True):
        w = layer.weights
        qkv = basic.rms_norm(x, w.input_norm, model.rms_norm_eps) @ w.qkv.float().T + w.qkv_bias.float()
        heads = qkv.view(len(x), -1, model.head_dim)
        first, second = heads[:, : -model.num_kv_heads].chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        query, key = turned.split([model.num_attention_heads, model.num_kv_heads], dim=1)
        at = torch.arange(len(x), device=x.device)
        visible = (at <= at[:, None]) & (at > at[:, None] - (layer.window or 1 << 30))
        out = attend(query, key, heads[:, -model.num_kv_heads :], w.sinks, visible, model.head_dim**-0.5)
        x = x + out.flatten(1) @ w.out.float().T + w.out_bias.float()
        normed = basic.rms_norm(x, w.post_norm, model.rms_norm_eps)
        _, own = moe.router_topk(normed, w.router, w.router_bias, model.num_experts_per_token)
        turned_ones = (own.sort().values != chosen.long().sort().values).any(-1).float().mean()
        assert turned_ones <= 0.05, f"{float(turned_ones):.0%} of the tokens go to other experts"
        scores = basic.linear(normed, w.router.float(), w.router_bias.float())
        shares = scores.gather(1, chosen.long()).softmax(-1)
        for expert in torch.unique(chosen).tolist():
            token, slot = torch.where(chosen == expert)
            wide = normed[token] @ _expanded(w.gate_up_blocks[expert], w.gate_up_scales[expert]).T
            wide += w.gate_up_bias[expert].float()
            inner = moe.swiglu(torch.cat((wide[:, 0::2], wide[:, 1::2]), 1), model.swiglu_limit)
            back = inner @ _expanded(w.down_blocks[expert], w.down_scales[expert]).T + w.down_bias[expert].float()
            x[token] += shares[token, slot, None] * back
    return basic.rms_norm(x, weights.norm, model.rms_norm_eps)


def test_logits_of_the_true_shape_are_within_bfloat16() -> None:
    folder = resolve_model_folder("tiny-oss")
    assert folder is not None
    tiny = load_model_config(folder)
    true = replace(
        tiny, num_layers=4, hidden_size=2880, intermediate_size=2880, num_attention_heads=64, num_kv_heads=8,
        head_dim=64, vocab_size=201_088, layer_windows=(128, None, 128, None), num_experts=32,
        num_experts_per_token=4,
    )  # fmt: skip
    for name, model in (("tiny", tiny), ("true, 4 layers", true)):
        errors = errors_by_layer(model, 320)
        print(f"{name}: " + ", ".join(f"{error:.1e}" for error in errors))
        assert max(errors) <= 2e-2


def test_too_little_memory_is_one_clear_error() -> None:
    error = None
    try:
        EngineCore.start(replace(TINY, cache=CacheConfig(num_blocks=1 << 26)))
    except ConfigError as caught:
        error = caught
    assert error is not None
    print(error, "|", error.hint)
    assert "ran out of memory for the KV cache" in str(error)
    assert error.hint


if __name__ == "__main__":
    failures = 0
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            try:
                test()
                print("ok  ", name, flush=True)
            except Exception:  # noqa: BLE001 - a script's report of each test
                failures += 1
                print("FAIL", name, flush=True)
                traceback.print_exc()
    sys.exit(1 if failures else 0)
