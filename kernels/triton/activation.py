"""Activations of dense feed-forward layers: one pass, float32 inside.

References: `kernels.reference.basic.silu_mul`, `gelu_tanh`.
"""

# Device code has no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    gate = tl.load(gate_up_ptr + row * (2 * width) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * (2 * width) + width + column, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * width + column, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_tanh_kernel(x_ptr, out_ptr, total, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < total
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # (1 + tanh z) / 2 = sigmoid(2 z)
    z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    value = x / (1.0 + tl.exp(-2.0 * z))
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Combine gates [T, 0:I] and ups [T, I:2I], bfloat16 or float32 and contiguous, to [T, I]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        _silu_mul_kernel[(rows, triton.cdiv(width, 1024))](gate_up, out, width, block=1024, num_warps=4)
    return out


def gelu_tanh(x: Tensor) -> Tensor:
    """Apply GELU in its tanh form to each element of x, bfloat16 or float32 and contiguous."""
    out = torch.empty_like(x)
    if x.numel():
        _gelu_tanh_kernel[(triton.cdiv(x.numel(), 2048),)](x, out, x.numel(), block=2048, num_warps=4)
    return out
