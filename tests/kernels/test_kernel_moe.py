"""Router, SwiGLU and experts: formulas by hand, and the CPU spec against the reference at the sizes it treats apart."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_helpers import CPU, REFERENCE_ONLY, experts

from kernels.cpu import moe as cpu_moe
from kernels.experts import ExpertWeights, gates_first
from kernels.ops import Ops, mxfp4_expand, mxfp4_quantize, router_topk, swiglu
from kernels.reference.moe import moe_add


@pytest.mark.parametrize("gate", [7.0, 7.01, -7.0, -7.01, -100.0, 0.3, 100.0])
@pytest.mark.parametrize("up", [7.0, 7.01, -7.0, -7.01, -100.0, 0.3, 100.0])
def test_swiglu_by_hand(gate: float, up: float) -> None:
    g, u = min(gate, 7.0), max(-7.0, min(up, 7.0))
    expected = g / (1 + math.exp(-1.702 * g)) * (u + 1)
    assert float(swiglu(torch.tensor([[gate, up]]), 7.0)) == pytest.approx(expected, abs=1e-6, rel=1e-6)


def test_router_softmax_runs_over_the_chosen_and_ties_go_to_the_lower_id() -> None:
    weights, ids = router_topk(torch.zeros(2, 4), torch.zeros(5, 4), torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0]), 3)
    assert ids.tolist() == [[1, 3, 2]] * 2
    exponents = [math.exp(v) for v in (3.0, 3.0, 2.0)]
    assert weights[0].tolist() == pytest.approx([e / sum(exponents) for e in exponents], abs=1e-6)
    _, ids = router_topk(torch.zeros(1, 4), torch.zeros(64, 4), torch.zeros(64), 4)
    assert ids.tolist() == [[0, 1, 2, 3]]


SIZES = sorted({1, 2, cpu_moe.SINGLE_ROWS, cpu_moe.SINGLE_ROWS + 1, 20, 150})


@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("is_half", [False, True], ids=["float32", "float16 weights"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (4, 4), (16, 2)], ids=["8/2", "4/4", "16/2"])
def test_cpu_experts_equal_the_reference(num_tokens: int, num_experts: int, top_k: int, is_half: bool) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    weights = experts(num_experts, 64, 96, generator)
    if is_half:
        weights.gate_up, weights.down = (w.half().float() for w in (weights.gate_up, weights.down))  # type: ignore[union-attr]
    router, bias = torch.randn(num_experts, 64, generator=generator), torch.randn(num_experts, generator=generator)
    bound = Ops(CPU).checked()
    for _ in range(2):  # kept buffers must not leak from call to call
        x = torch.randn(num_tokens, 64, generator=generator) * 3
        residual = torch.randn(num_tokens, 64, generator=generator)
        expected = moe_add(x, router, bias, top_k, weights, 7.0, residual.clone())
        found = bound.moe_add(x, router, bias, top_k, weights, 7.0, residual.clone())
        scale = float((expected - residual).abs().max())
        assert float((found - expected).abs().max()) <= 2e-6 * max(scale, 1.0)


@pytest.mark.parametrize("num_tokens", [1, 2, 20, 60])
def test_ties_in_the_router_choose_alike_in_every_way(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = experts(8, 32, 32, generator)
    x, residual = torch.randn(num_tokens, 32, generator=generator), torch.zeros(num_tokens, 32)
    arguments = (torch.zeros(8, 32), torch.zeros(8), 2, weights, 7.0)
    expected = moe_add(x, *arguments, residual.clone())
    assert torch.allclose(Ops(CPU).moe_add(x, *arguments, residual.clone()), expected, atol=1e-5)


def test_a_row_of_nan_stays_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = experts(8, 32, 32, generator)
    router, bias = torch.randn(8, 32, generator=generator), torch.zeros(8)
    for num_tokens in (2, 20, 60):
        x = torch.randn(num_tokens, 32, generator=generator)
        clean = Ops(CPU).moe_add(x, router, bias, 2, weights, 7.0, torch.zeros(num_tokens, 32))
        x[1] = float("nan")
        found = Ops(CPU).moe_add(x, router, bias, 2, weights, 7.0, torch.zeros(num_tokens, 32))
        others = [i for i in range(num_tokens) if i != 1]
        assert bool(found[1].isnan().all())
        assert torch.allclose(found[others], clean[others], atol=1e-6)


@pytest.mark.parametrize("platform", [CPU, REFERENCE_ONLY], ids=["cpu", "reference"])
def test_packed_experts_equal_expanded_ones(platform: object) -> None:
    generator = torch.Generator().manual_seed(7)
    raw_gate_up = torch.randn(4, 2 * 96, 64, generator=generator) / 8
    raw_down = torch.randn(4, 64, 96, generator=generator) / 10
    (gate_blocks, gate_scales), (down_blocks, down_scales) = mxfp4_quantize(raw_gate_up), mxfp4_quantize(raw_down)
    gate_up = mxfp4_expand(gate_blocks, gate_scales, torch.float32)
    biases = torch.randn(4, 192, generator=generator), torch.randn(4, 64, generator=generator)
    expanded = ExpertWeights(
        *biases,
        gate_up=torch.stack([gates_first(one) for one in gate_up]),
        down=mxfp4_expand(down_blocks, down_scales, torch.float32),
    )
    packed = ExpertWeights(
        *biases,
        gate_up_blocks=gate_blocks,
        gate_up_scales=gate_scales,
        down_blocks=down_blocks,
        down_scales=down_scales,
    )
    x, router, bias = torch.randn(5, 64, generator=generator), torch.randn(4, 64, generator=generator), torch.zeros(4)
    bound = Ops(platform)  # type: ignore[arg-type]
    found = [bound.moe_add(x, router, bias, 2, w, 7.0, torch.zeros(5, 64)) for w in (packed, expanded)]
    assert float((found[0] - found[1]).abs().max()) <= 1e-5
