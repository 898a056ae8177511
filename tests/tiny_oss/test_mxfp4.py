"""Quantising to MXFP4: half a step of error, idempotent, and the same values in training as in the checkpoint."""

from __future__ import annotations

import pytest
import torch

from tools.tiny_oss.mxfp4 import E2M1, expand, fake_quantize, quantize


def _weights(scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(5, 6, 96, generator=generator) * scale


@pytest.mark.parametrize("scale", [1e-6, 0.02, 1.0, 37.0, 1e6])
def test_error_is_at_most_half_a_step_or_saturation(scale: float) -> None:
    weight = _weights(scale)
    blocks, scales = quantize(weight)
    unit = torch.exp2(scales.float() - 127).repeat_interleave(32, -1)
    magnitude = weight.abs() / unit
    error = (expand(blocks, scales) - weight).abs() / unit
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    limit = torch.where(magnitude > 6, magnitude - 6, step / 2)
    assert bool((error <= limit + 1e-6).all())
    assert float(magnitude.max()) < 8


def test_quantising_expanded_values_changes_nothing() -> None:
    blocks, scales = quantize(_weights(0.1))
    value = expand(blocks, scales)
    assert torch.equal(expand(*quantize(value)), value)


def test_every_code_survives() -> None:
    table = torch.tensor(E2M1 + tuple(-value for value in E2M1)).repeat(2).view(1, 32)
    blocks, scales = quantize(table * 0.25)
    assert torch.equal(expand(blocks, scales), table * 0.25)
    assert scales.tolist() == [[125]]
    # Low nibble first: the second byte holds codes 2 and 3.
    assert blocks[0, 0, 1] == 0x32


def test_ties_go_to_the_even_code() -> None:
    row = torch.zeros(1, 32)
    row[0, :8] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 4.0])
    assert expand(*quantize(row))[0, :8].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 4.0]


def test_zero_block_has_scale_127() -> None:
    blocks, scales = quantize(torch.zeros(1, 64))
    assert scales.tolist() == [[127, 127]]
    assert not blocks.any()


def test_training_sees_the_checkpoint_values_and_an_identity_gradient() -> None:
    weight = _weights(0.05).requires_grad_()
    seen = fake_quantize(weight)
    assert torch.equal(seen.detach(), expand(*quantize(weight)))
    torch.autograd.backward(seen.sum())
    assert weight.grad is not None
    assert bool((weight.grad == 1).all())


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize(torch.zeros(2, 33))
    with pytest.raises(ValueError, match="not finite"):
        quantize(torch.full((1, 32), float("nan")))
    with pytest.raises(ValueError, match="exceeds 252"):
        expand(torch.zeros(1, 1, 16, dtype=torch.uint8), torch.full((1, 1), 253, dtype=torch.uint8))
