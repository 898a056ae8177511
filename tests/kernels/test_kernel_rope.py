"""The rotary table against the paper's closed form and against transformers."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_helpers import CPU

from kernels.ops import Ops, YarnScaling, inverse_frequencies, pair_order, rope_table, rotate_
from kernels.reference.rope import correction_range

GPT_OSS = YarnScaling(32.0, 4096, 32.0, 1.0, truncate=False)
TINY_OSS = YarnScaling(4.0, 512, 32.0, 1.0, truncate=False)


def closed_form(head_dim: int, theta: float, scaling: YarnScaling) -> list[float]:
    low, high = correction_range(head_dim, theta, scaling)
    table = []
    for i in range(head_dim // 2):
        frequency = theta ** (2 * i / head_dim)
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        table.append((1 - ramp) / frequency + ramp / (scaling.factor * frequency))
    return table


def test_gpt_oss_ramp_is_fractional() -> None:
    low, high = correction_range(64, 150000.0, GPT_OSS)
    assert low == pytest.approx(8.092779, abs=1e-6)
    assert high == pytest.approx(17.398025, abs=1e-6)
    inverse, concentration = inverse_frequencies(64, 150000.0, GPT_OSS)
    assert concentration == pytest.approx(1.3465736, abs=1e-7)
    known = {0: 1.0, 8: 5.081327e-2, 9: 3.170570e-2, 12: 6.794959e-3, 16: 4.564839e-4, 17: 1.293187e-4, 31: 3.023511e-7}
    for index, value in known.items():
        assert float(inverse[index]) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(("head_dim", "scaling"), [(64, GPT_OSS), (32, TINY_OSS)])
def test_inverse_frequencies_follow_the_closed_form(head_dim: int, scaling: YarnScaling) -> None:
    inverse, _ = inverse_frequencies(head_dim, 150000.0, scaling)
    for found, expected in zip(inverse.tolist(), closed_form(head_dim, 150000.0, scaling), strict=True):
        assert found == pytest.approx(expected, rel=1e-6)


def test_cos_and_sin_equal_transformers_at_far_positions() -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    parameters = {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    }
    config = GptOssConfig(head_dim=64, max_position_embeddings=131072, rope_parameters=parameters)
    positions = torch.tensor([[0, 1, 4095, 4096, 100_000, 131_071]])
    cos, sin = GptOssRotaryEmbedding(config)(torch.zeros(1), positions)
    inverse, concentration = inverse_frequencies(64, 150000.0, GPT_OSS)
    table = rope_table(inverse, concentration, 131_072)[positions[0], 0]
    assert float((table.real - cos[0]).abs().max()) <= 1e-6
    assert float((table.imag - sin[0]).abs().max()) <= 1e-6


def test_no_scaling_is_plain_rope() -> None:
    inverse, concentration = inverse_frequencies(8, 10000.0, None)
    assert concentration == 1.0
    assert inverse.tolist() == pytest.approx([10000 ** (-i / 4) for i in range(4)])


def test_rotation_of_paired_rows_is_rotation_of_halves() -> None:
    """Permuting the rows of q and k leaves their dot products as the checkpoint's layout gives them."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 5, 1, 16, generator=generator)
    inverse, _ = inverse_frequencies(16, 10000.0, None)
    rotation = rope_table(inverse, 1.0, 5)
    cos, sin = rotation.real[:, 0].repeat(1, 2)[:, None], rotation.imag[:, 0].repeat(1, 2)[:, None]

    def halves(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    expected = (halves(q) * halves(k)).sum(-1)
    order = pair_order(16)
    found = (rotate_(q[..., order].clone(), rotation) * rotate_(k[..., order].clone(), rotation)).sum(-1)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 2, 40])
def test_qkv_project_equals_its_reference(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    heads, kv_heads, head_dim, hidden = 8, 2, 16, 96
    weight = torch.randn((heads + 2 * kv_heads) * head_dim, hidden, generator=generator) * hidden**-0.5
    bias = torch.randn(weight.shape[0], generator=generator)
    x = torch.randn(num_tokens, hidden, generator=generator)
    angle = torch.rand(num_tokens, 1, head_dim // 2, generator=generator) * math.tau
    rotation = torch.polar(torch.ones_like(angle), angle)
    from kernels.reference.rope import qkv_project

    expected = qkv_project(x, weight, bias, rotation, heads, kv_heads)
    found = Ops(CPU).checked().qkv_project(x, weight, bias, rotation, heads, kv_heads)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 2e-6
