"""MXFP4 against a table of 64-bit floats, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.ops import MAX_SCALE, mxfp4_expand, mxfp4_quantize

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_bytes_and_scales_are_exact(dtype: torch.dtype) -> None:
    scales = torch.arange(MAX_SCALE + 1, dtype=torch.uint8)
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, MAX_SCALE + 1, 16, 16)
    found = mxfp4_expand(blocks, scales.view(1, -1, 1).expand(1, -1, 16), dtype)[0].double().numpy()
    nibbles = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=-1).reshape(-1)
    values = np.array(VALUES + tuple(-v for v in VALUES))[nibbles]
    expected = values[None, :] * np.exp2(np.arange(MAX_SCALE + 1, dtype=np.float64) - 127)[:, None]
    assert np.array_equal(found, expected)
    assert np.array_equal(np.signbit(found), np.signbit(expected))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-20, 20))
def test_quantizing_errs_by_half_a_step_at_most_and_is_idempotent(seed: int, exponent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 6, 64, generator=generator) * 2.0**exponent
    x[0, 0] = 0
    blocks, scales = mxfp4_quantize(x)
    assert scales[0, 0].tolist() == [127, 127]
    found = mxfp4_expand(blocks, scales, torch.float32)
    unit = torch.exp2(scales.double() - 127).repeat_interleave(32, -1)
    magnitude = x.double().abs() / unit
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    error = (found.double() - x.double()).abs() / unit
    assert bool((error <= step / 2).logical_or(magnitude > 6).all())
    assert bool((found.double().abs() / unit)[magnitude > 6].eq(6).all())
    assert torch.equal(mxfp4_expand(*mxfp4_quantize(found), torch.float32), found)


def test_ties_go_to_the_even_code() -> None:
    x = torch.zeros(32)
    x[:8] = torch.tensor([4.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    found = mxfp4_expand(*(t[None, None] for t in mxfp4_quantize(x)), torch.float32).flatten()
    assert found[:8].tolist() == [4.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
