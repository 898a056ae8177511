"""A decode layer and a prefill layer as the runner runs them: a row does not depend on its neighbours, bit for bit;
padding harms nobody; both ways through the experts agree; what a step needs is compiled ahead."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

HAS_GPU = importlib.util.find_spec("triton") is not None and torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device and triton")]
DEVICE = "cuda"
HEADS, KV_HEADS, DIM, HIDDEN, INTER, EXPERTS, TOP_K, BLOCK = 64, 8, 64, 2880, 2880, 32, 4, 64
MAX_BLOCKS = 6


def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).bfloat16()


@dataclass
class Layer:
    """Random weights of one layer, and a cache."""

    def __post_init__(self) -> None:
        from kernels.triton.moe_gluon import prepare_scales

        def experts(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            shape = (EXPERTS, rows, columns // 32)
            blocks = torch.randint(0, 256, (*shape, 16), device=DEVICE, dtype=torch.uint8)
            scales = torch.randint(115, 119, shape, device=DEVICE, dtype=torch.uint8)
            return blocks, prepare_scales(scales), randn(EXPERTS, rows, scale=0.1)

        self.qkv, self.qkv_bias = randn((HEADS + 2 * KV_HEADS) * DIM, HIDDEN, scale=0.02), randn(5120, scale=0.1)
        self.out, self.out_bias = randn(HIDDEN, HEADS * DIM, scale=0.02), randn(HIDDEN, scale=0.1)
        self.router, self.router_bias = randn(EXPERTS, HIDDEN, scale=0.05), randn(EXPERTS, scale=0.1)
        self.norm = torch.rand(HIDDEN, device=DEVICE) + 0.5
        self.sinks = torch.randn(HEADS, device=DEVICE)
        self.gate_up, self.down = experts(2 * INTER, HIDDEN), experts(HIDDEN, INTER)
        self.cos_sin = torch.rand(MAX_BLOCKS * BLOCK, DIM // 2, 2, device=DEVICE)

    def decode(self, x: torch.Tensor, cache: torch.Tensor, tables: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
        """Run the layer for one token a row; returns the next normed state. Changes x and the cache."""
        from kernels.triton import attention_decode, moe, norm, permute, rope, router

        rows = x.shape[0]
        positions = (lens - 1).clamp(min=0)
        slots = rope.decode_slots(tables, positions, lens, BLOCK, torch.empty_like(lens))
        normed = norm.rms_norm(x, self.norm, 1e-5)
        query = rope.rope_kv_write(normed @ self.qkv.t(), self.qkv_bias, self.cos_sin, positions, slots, cache)
        attended = attention_decode.paged_decode_attention(
            query, cache, tables, lens, self.sinks, DIM**-0.5, block_size=BLOCK
        )
        expert_x = torch.empty(rows, permute.expert_width(HIDDEN), device=DEVICE, dtype=torch.bfloat16)
        norm.add_rms_norm(attended @ self.out.t(), self.out_bias, x, self.norm, 1e-5, out=normed, expert_out=expert_x)
        ids, weights = router.router_topk(normed, self.router, self.router_bias, TOP_K, real=lens)
        index = router.expert_index(ids, EXPERTS)
        act = torch.zeros(rows * TOP_K, permute.expert_width(INTER), device=DEVICE, dtype=torch.bfloat16)
        deltas = torch.zeros(rows, TOP_K, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
        deltas, shares = moe.run_experts(expert_x, weights, index, self.gate_up, self.down, 7.0, act=act, out=deltas)
        return norm.add_rms_norm(deltas, None, x, self.norm, 1e-5, slot_weights=shares)


def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw rows of 1 to 384 tokens: x, cache, tables, lens."""
    tables = (torch.randperm(rows * MAX_BLOCKS, device=DEVICE) + 1).int().view(rows, MAX_BLOCKS)
    lens = torch.randint(1, MAX_BLOCKS * BLOCK, (rows,), device=DEVICE, dtype=torch.int32)
    cache = randn((rows * MAX_BLOCKS + 1) * BLOCK, 2, KV_HEADS, DIM)
    return torch.randn(rows, HIDDEN, device=DEVICE), cache, tables, lens


@pytest.mark.parametrize("rows", [17, 32, 96, 256])
def test_a_row_does_not_change_with_its_neighbours(rows: int) -> None:
    torch.manual_seed(rows)
    layer = Layer()
    x, cache, tables, lens = batch(rows)
    kept = [0, rows // 2, rows - 1]
    first, first_x = cache.clone(), x.clone()
    normed = layer.decode(first_x, first, tables, lens)
    other_x, other_lens, other_cache = torch.randn_like(x), torch.randint_like(lens, 0, 384), randn(*cache.shape)
    other_lens[1::3] = 0
    for row in kept:
        other_x[row], other_lens[row] = x[row], lens[row]
        for block in tables[row].tolist():
            slots = slice(block * BLOCK, (block + 1) * BLOCK)
            other_cache[slots] = cache[slots]
    again = layer.decode(other_x, other_cache, tables, other_lens)
    assert bool(normed.isfinite().all())
    for row in kept:
        assert torch.equal(normed[row], again[row]), f"row {row} of {rows}"
        assert torch.equal(first_x[row], other_x[row])


def test_padding_writes_nothing_and_reads_nothing() -> None:
    """Rows of length 0 whose table names slots full of NaN: the others are as without them, the cache is untouched."""
    torch.manual_seed(1)
    layer = Layer()
    x, cache, tables, lens = batch(32)
    lens[20:] = 0
    for row in range(20, 32):
        for block in tables[row].tolist():
            cache[block * BLOCK : (block + 1) * BLOCK] = float("nan")
    before = cache.clone()
    normed = layer.decode(x, cache, tables, lens)
    assert bool(normed.isfinite().all())
    changed = (cache != before) & ~(cache.isnan() & before.isnan())
    slots = {int(slot) for slot in changed.flatten(1).any(1).nonzero()[:, 0]}
    wanted = {
        int(tables[row, (int(lens[row]) - 1) // BLOCK]) * BLOCK + (int(lens[row]) - 1) % BLOCK for row in range(20)
    }
    assert slots <= wanted


@pytest.mark.parametrize("tokens", [40, 5000])
def test_run_experts_takes_either_way_and_hands_its_weights_on(tokens: int) -> None:
    """Both ways through the experts give what the small one gives token by token."""
    from kernels.triton import moe, norm, permute, router

    torch.manual_seed(tokens)
    layer = Layer()
    x = randn(tokens, HIDDEN)
    ids, weights = router.router_topk(x, layer.router, layer.router_bias, TOP_K)
    part = slice(tokens - 30, tokens)
    results = []
    for rows in (slice(0, tokens), part):
        index = router.expert_index(ids[rows].contiguous(), EXPERTS)
        deltas, shares = moe.run_experts(
            permute.to_expert_order(x[rows]), weights[rows].contiguous(), index, layer.gate_up, layer.down, 7.0
        )
        assert (shares is None) == (index.block_t < moe.PREFILL_BLOCK_T)
        residual = torch.zeros(deltas.shape[0], HIDDEN, device=DEVICE)
        norm.add_rms_norm(deltas, None, residual, layer.norm, 1e-5, slot_weights=shares)
        results.append(residual)
    whole, alone = results[0][part], results[1]
    assert float((whole - alone).norm() / alone.norm()) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations(dtype: torch.dtype) -> None:
    from kernels import ops
    from kernels.reference import basic

    x = (torch.randn(7, 2 * 1500, device=DEVICE) * 4).to(dtype)
    x[0, 0], x[0, 1] = -100.0, 100.0
    for name in ("silu_mul", "gelu_tanh"):
        assert ops.explain(ops.Platform("cuda", dtype), name)[0].name == "triton"
        found, wanted = getattr(ops, name)(x).float(), getattr(basic, name)(x.float())
        assert float((found - wanted).norm() / wanted.norm()) < (1e-6 if dtype is torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copied_slots(dtype: torch.dtype) -> None:
    from kernels import ops
    from kernels.reference import attention

    cache = torch.randn(500, 2, KV_HEADS, DIM, device=DEVICE).to(dtype)
    source, target = torch.randperm(500, device=DEVICE).split(250)
    wanted = cache.clone()
    attention.copy_slots(wanted, source, target)
    ops.copy_slots.bind(ops.Platform("cuda", dtype))(cache, source, target)
    assert torch.equal(cache, wanted)


def test_everything_a_step_needs_is_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `compile_all`, decode steps and prefills at any size add no file to the cache."""
    import triton

    from engine.worker.gpu_decode import LARGE
    from kernels.cuda.decode import DecodeShape
    from kernels.triton import (
        attention_decode,
        attention_prefill,
        moe,
        moe_decode,
        moe_gluon,
        moe_prefill,
        norm,
        permute,
        rope,
        router,
        sampling,
        warm,
    )

    monkeypatch.setenv("HLAUNCH_KERNEL_CACHE", str(tmp_path))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    kept = triton.knobs.cache.dir
    modules = (attention_decode, attention_prefill, moe_decode, moe_gluon, moe_prefill, norm, rope, router, sampling)
    try:
        for module in modules:
            for value in vars(module).values():
                if hasattr(value, "device_caches"):
                    value.device_caches.clear()
        shape = DecodeShape(HIDDEN, INTER, HEADS, KV_HEADS, DIM, EXPERTS, TOP_K, 201088, BLOCK)
        report = warm.compile_all(shape, decode_rows=LARGE)
        assert report.compiled >= 20
        assert warm.use_cache().is_relative_to(tmp_path)
        assert warm.compile_all(shape, decode_rows=LARGE).compiled == 0
        names = set(warm.use_cache().rglob("*.cubin"))
        layer = Layer()
        for rows in LARGE:
            layer.decode(*batch(rows))
        for tokens in (1, 33, 200, 1000, 3001, 6000):
            x = randn(tokens, HIDDEN)
            residual = torch.zeros(tokens, HIDDEN, device=DEVICE)
            ids, weights = router.router_topk(x, layer.router, layer.router_bias, TOP_K)
            deltas, shares = moe.run_experts(
                permute.to_expert_order(x), weights, router.expert_index(ids, EXPERTS), layer.gate_up, layer.down, 7.0
            )
            norm.add_rms_norm(deltas, None, residual, layer.norm, 1e-5, slot_weights=shares)
            lens = torch.tensor([tokens], device=DEVICE, dtype=torch.int32)
            starts = torch.tensor([0, tokens], device=DEVICE, dtype=torch.int32)
            table = torch.arange(1, 100, device=DEVICE, dtype=torch.int32)[None]
            cache = randn(100 * BLOCK, 2, KV_HEADS, DIM)
            for window in (None, 128):
                attention_prefill.paged_prefill_attention(
                    randn(tokens, HEADS, DIM), cache, table, starts, lens, layer.sinks, DIM**-0.5,
                    block_size=BLOCK, window=window,
                )  # fmt: skip
        logits, ones = torch.zeros(37, 201088, device=DEVICE), torch.ones(37, device=DEVICE)
        ints = torch.ones(37, device=DEVICE, dtype=torch.int32)
        cuts = sampling.sampling_thresholds(logits, ones, ints, ones, ones)
        sampling.sample(logits, ones, ints.long(), ints, thresholds=cuts)
        sampling.sample(logits, ones, ints.long(), ints)
        sampling.greedy(logits)
        torch.cuda.synchronize()
        added = {path.name for path in warm.use_cache().rglob("*.cubin") if path not in names}
        assert not added, added
    finally:
        triton.knobs.cache.dir = kept
