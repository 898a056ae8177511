"""Norm, linear layers and embedding against float64, for every spec and at the sizes that specs treat apart."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import CPU, REFERENCE_ONLY

from kernels import ops
from kernels.cpu import packing
from kernels.ops import Ops

BOUND = {"reference": Ops(REFERENCE_ONLY), "cpu": Ops(CPU)}


@pytest.mark.parametrize("spec", BOUND)
@pytest.mark.parametrize("num_tokens", [1, 2, 33])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm(spec: str, num_tokens: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    x, weight = torch.randn(num_tokens, 96, generator=generator) * scale, torch.randn(96, generator=generator)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    kept = x.clone()
    assert torch.allclose(BOUND[spec].rms_norm(x, None, 1e-5).double(), expected, rtol=1e-6, atol=1e-7)
    assert torch.allclose(BOUND[spec].rms_norm(x, weight, 1e-5).double(), expected * weight, rtol=1e-6, atol=1e-7)
    assert torch.equal(x, kept)


def test_rms_norm_multiplies_by_the_weight_before_the_cast() -> None:
    x, weight = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16), torch.tensor([1.1, 1.3, 0.7])
    expected = ops.rms_norm(x.float(), weight, 1e-5).to(torch.bfloat16)
    assert torch.equal(ops.rms_norm(x, weight, 1e-5), expected)


@pytest.mark.parametrize("num_tokens", [1, 2, 33])
@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize("is_half", [False, True])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_linear_layers(num_tokens: int, column_major: bool, is_half: bool, num_threads: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 96, generator=generator)
    weight, bias = torch.randn(64, 96, generator=generator) * 0.1, torch.randn(64, generator=generator)
    if is_half:
        weight = weight.half().float()
    if column_major:
        weight = weight.t().contiguous().t()
    residual = torch.randn(num_tokens, 64, generator=generator)
    expected = (x.double() @ weight.double().t() + bias.double()).float()
    bound = BOUND["cpu"].checked()
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for _ in range(2):
            assert torch.allclose(bound.linear_add(x, weight, bias, residual.clone()), expected + residual, atol=1e-5)
            assert torch.allclose(bound.logits(x, weight), expected - bias, atol=1e-5)
        assert torch.allclose(ops.linear(x, weight, bias), expected, atol=1e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("num_tokens", [1, 3, 300])
@pytest.mark.parametrize("value", [70000.0, 1.0 + 2**-12, 2.0**-30])
def test_weights_that_float16_cannot_hold_stay_float32(num_tokens: int, value: float) -> None:
    weight = torch.full((64, 96), value)
    weight[0, 0] = 3 * value
    found = BOUND["cpu"].logits(torch.ones(num_tokens, 96), weight)
    assert torch.allclose(found, (torch.ones(num_tokens, 96).double() @ weight.double().t()).float(), rtol=1e-6)


@pytest.mark.parametrize("missing", [("serial",), ("serial", "half")], ids=["no plain function", "no float16 at all"])
def test_each_layout_serves_when_torch_lacks_the_better_one(
    missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in missing:
        monkeypatch.setattr(packing, f"fbgemm_{name}_works", lambda: False)
    weight, bias = torch.randn(64, 96).half().float(), torch.randn(64)
    packed = packing.pack(weight, bias)
    for num_tokens in (1, 2, 40):
        x = torch.randn(num_tokens, 96)
        assert torch.allclose(packed(x), torch.nn.functional.linear(x, weight, bias), atol=1e-4)


def test_large_work_is_shared_among_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(640, 224, generator=generator).half().float() * 0.125, torch.randn(640)
    x = torch.randn(packing.SERIAL_WORK // weight.numel() + 1, 224, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = packing.pack(weight, bias)(x)
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(found, torch.nn.functional.linear(x, weight, bias), atol=1e-4)


def test_add_rms_norm_and_embedding() -> None:
    x, residual = torch.randn(3, 8), torch.randn(3, 8)
    normed, total = ops.add_rms_norm(x, residual, None, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.allclose(normed, ops.rms_norm(x + residual, None, 1e-5))
    table = torch.randn(5, 8)
    assert torch.equal(ops.embedding(torch.tensor([4, 0, 4]), table), table[[4, 0, 4]])


def test_a_weight_freed_and_another_at_its_address_are_not_confused() -> None:
    """Packed copies are kept by identity: a new weight must never meet an old one's copy."""
    bound = Ops(CPU)
    x = torch.ones(4, 32)
    for value in range(50):
        weight = torch.full((16, 32), float(value))
        assert torch.equal(bound.logits(x, weight), torch.full((4, 16), 32.0 * value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(5, 64, generator=generator) * 4).to(dtype)
    x[0, 0], x[0, 32], x[1, 1] = -100.0, 3.0, 100.0
    gate, up = x.double().chunk(2, dim=-1)
    tolerance = 1e-6 if dtype is torch.float32 else 5e-3
    silu = gate / (1 + (-gate).exp()) * up
    assert torch.allclose(ops.silu_mul(x).double(), silu, rtol=tolerance, atol=1e-7)
    wide = x.double()
    gelu = wide / 2 * (1 + ((2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)).tanh())
    assert torch.allclose(
        ops.gelu_tanh(x).double(), gelu, rtol=tolerance, atol=1e-5 if dtype is torch.bfloat16 else 1e-6
    )


def test_activations_on_a_gpu_are_served_by_triton_or_the_reference_says_why() -> None:
    for name in ("silu_mul", "gelu_tanh"):
        chosen, other = ops.explain(ops.Platform("cuda", torch.bfloat16), name)
        if chosen.name == "reference":
            assert "Triton is not installed" in other.reason
        else:
            assert chosen.name == "triton"
        assert "CUDA" in next(line.reason for line in ops.explain(CPU, name) if line.name == "triton")
