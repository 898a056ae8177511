"""RMSNorm over a float32 residual stream, alone or fused with what is added to the stream before it.

Reference: `kernels.reference.basic.rms_norm`, `add_rms_norm`.
"""

# Device code has no Python types.
# ruff: noqa: ANN001, ANN202, C408
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _expert_position(column):
    """Position of activation `column` in the order that the MXFP4 expert kernels read (see `permute.py`)."""
    low = column % 128
    lane = low // 32
    word = low // 8 % 4
    high = low // 4 % 2
    nibble = low % 4
    return column - low + (2 * word + nibble // 2) * 16 + nibble % 2 * 8 + 2 * lane + high


@triton.jit
def _norm_kernel(
    x_ptr,
    delta_ptr,
    bias_ptr,
    slot_weights_ptr,
    weight_ptr,
    out_ptr,
    expert_ptr,
    width,
    expert_width,
    eps,
    num_deltas: tl.constexpr,
    has_bias: tl.constexpr,
    has_slot_weights: tl.constexpr,
    has_expert: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0)
    if num_deltas > 0:
        total = tl.zeros([block], tl.float32)
        for slot in tl.static_range(num_deltas):
            at = (row * num_deltas + slot) * width + column
            if has_slot_weights:
                # A slot of no expert weighs 0, and nobody wrote its delta.
                slot_weight = tl.load(slot_weights_ptr + row * num_deltas + slot)
                delta = tl.load(delta_ptr + at, mask=inside & (slot_weight != 0.0), other=0.0).to(tl.float32)
                total += slot_weight * delta
            else:
                total += tl.load(delta_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if has_bias:
            total += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        x += total
        tl.store(x_ptr + row * width + column, x, mask=inside)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    normed = (x * scale * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + column, normed, mask=inside)
    if has_expert:
        tl.store(expert_ptr + row * expert_width + _expert_position(column), normed, mask=column < expert_width)


def _launch(
    x: Tensor,
    deltas: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    expert_out: Tensor | None,
    slot_weights: Tensor | None = None,
) -> Tensor:
    rows, width = x.shape
    if out is None:
        out = torch.empty((rows, width), dtype=torch.bfloat16, device=x.device)
    if rows == 0:
        return out
    count = 0 if deltas is None else deltas.numel() // x.numel()
    block = triton.next_power_of_2(width if expert_out is None else expert_out.shape[1])
    _norm_kernel[(rows,)](
        x,
        x if deltas is None else deltas,
        x if bias is None else bias,
        x if slot_weights is None else slot_weights,
        weight,
        out,
        out if expert_out is None else expert_out,
        width,
        0 if expert_out is None else expert_out.shape[1],
        eps,
        num_deltas=count,
        has_bias=bias is not None,
        has_slot_weights=slot_weights is not None,
        has_expert=expert_out is not None,
        block=block,
        num_warps=4 if block <= 2048 else 8,
    )
    return out


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None, expert_out: Tensor | None = None
) -> Tensor:
    """Norm the rows of the residual stream.

    Shapes: x float32 [T, H], weight [H]; returns bfloat16 [T, H]. `expert_out` bfloat16 [T, padded H], when given,
    receives the same values in the order the expert kernels read (`permute.expert_width` wide).
    """
    return _launch(x, None, None, weight, eps, out, expert_out)


def add_rms_norm(
    deltas: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    slot_weights: Tensor | None = None,
    out: Tensor | None = None,
    expert_out: Tensor | None = None,
) -> Tensor:
    """Add to the residual stream in place, then norm it.

    Shapes: deltas [T, H], or [T, k, H] summed over k in slot order (what the expert kernels leave); bias [H] or None;
    slot_weights float32 [T, k] weighs the slots before the sum (where it is 0 the slot is not read); residual float32
    [T, H], updated; weight [H]; returns bfloat16 [T, H]. `expert_out` as in `rms_norm`.
    """
    return _launch(residual, deltas, bias, weight, eps, out, expert_out, slot_weights)
