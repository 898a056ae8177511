"""Experts of long prefills through bfloat16: expand one layer into a scratch, then torch's grouped GEMM.

Reference: `kernels.reference.moe.moe_add_`. The scratch (1.6 GB for gpt-oss) is shared by all layers; its cost does not
depend on the number of tokens, so this is for many of them, and the fallback where nothing faster fits.
"""

# Device code has no Python types.
# ruff: noqa: ANN001, ANN202, C408
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton import fp4
from kernels.triton.router import ExpertIndex


@triton.jit
def _expand_kernel(codes_ptr, scales_ptr, out_ptr, total, block: tl.constexpr):
    unit = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = unit < total
    half = tl.arange(0, 8)
    codes = tl.load(codes_ptr + unit[:, None] * 8 + half[None, :], mask=inside[:, None], other=0)
    scale = tl.load(scales_ptr + unit, mask=inside, other=0).to(tl.int16)
    factor = ((scale + 126) << 7).to(tl.bfloat16, bitcast=True)
    factor = tl.broadcast_to(factor[:, None], [block, 8])
    n0, n1, n2, n3 = tl.inline_asm_elementwise(
        fp4.UNPACK,
        "=r,=r,=r,=r,r,r",
        [codes, factor],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )
    values = tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [block, 32])
    value = tl.arange(0, 32)
    tl.store(out_ptr + unit[:, None] * 32 + value[None, :], values, mask=inside[:, None])


def expand(blocks: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """Expand MXFP4 to bfloat16: blocks uint8 [E, N, B, 16], scales uint8 [E, N, B], out [E, N, 32 B] (or flat)."""
    total = scales.numel()
    block = 128
    _expand_kernel[(triton.cdiv(total, block),)](blocks.view(torch.int16), scales, out, total, block=block, num_warps=4)
    return out


@triton.jit
def _gather_kernel(x_ptr, order_ptr, offsets_ptr, out_ptr, width, k, num_experts, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(offsets_ptr + num_experts):
        token = (tl.load(order_ptr + row) // k).to(tl.int64)
        column = tl.arange(0, block)
        x = tl.load(x_ptr + token * width + column, mask=column < width)
        tl.store(out_ptr + row * width + column, x, mask=column < width)


@triton.jit
def _expert_of(row, offsets_ptr, num_experts, experts: tl.constexpr):
    expert = tl.arange(0, experts)
    ends = tl.load(offsets_ptr + 1 + expert, mask=expert < num_experts, other=2147483647)
    return tl.sum((ends <= row).to(tl.int32), axis=0)


@triton.jit
def _swiglu(gate, up, limit):
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    return gate / (1.0 + tl.exp(-1.702 * gate)) * (up + 1.0)


@triton.jit
def _swiglu_kernel(
    gate_up_ptr, bias_ptr, offsets_ptr, out_ptr, limit, width, num_experts, experts: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0)
    if row < tl.load(offsets_ptr + num_experts):
        expert = _expert_of(row, offsets_ptr, num_experts, experts).to(tl.int64)
        column = tl.arange(0, 2 * block)
        inside = column < 2 * width
        both = tl.load(gate_up_ptr + row.to(tl.int64) * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        both += tl.load(bias_ptr + expert * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(both, [block, 2]))
        unit = tl.arange(0, block)
        act = _swiglu(gate, up, limit).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row.to(tl.int64) * width + unit, act, mask=unit < width)


@triton.jit
def _inverse_kernel(order_ptr, offsets_ptr, inverse_ptr, num_experts, block: tl.constexpr):
    row = tl.program_id(0) * block + tl.arange(0, block)
    inside = row < tl.load(offsets_ptr + num_experts)
    flat = tl.load(order_ptr + row, mask=inside, other=0)
    tl.store(inverse_ptr + flat, row, mask=inside)


@triton.jit
def _finish_kernel(
    down_ptr, bias_ptr, ids_ptr, weights_ptr, inverse_ptr, out_ptr, width, k: tl.constexpr, block: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    total = tl.zeros([block], tl.float32)
    for slot in tl.static_range(k):
        expert = tl.load(ids_ptr + token * k + slot).to(tl.int64)
        if expert >= 0:
            row = tl.load(inverse_ptr + token * k + slot).to(tl.int64)
            value = tl.load(down_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
            value += tl.load(bias_ptr + expert * width + column, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(weights_ptr + token * k + slot) * value
    tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class DenseScratch:
    """Room for one layer's expanded experts: gate_up [E, 2 I, H] and down [E, H, I], bfloat16."""

    gate_up: Tensor
    down: Tensor

    @classmethod
    def allocate(cls, num_experts: int, hidden: int, intermediate: int, device: torch.device | str) -> DenseScratch:
        """Make the scratch of a model's layers."""
        return cls(
            torch.empty((num_experts, 2 * intermediate, hidden), dtype=torch.bfloat16, device=device),
            torch.empty((num_experts, hidden, intermediate), dtype=torch.bfloat16, device=device),
        )


def moe_dense(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    index: ExpertIndex,
    gate_up_blocks: Tensor,
    gate_up_scales: Tensor,
    gate_up_bias: Tensor,
    down_blocks: Tensor,
    down_scales: Tensor,
    down_bias: Tensor,
    limit: float,
    scratch: DenseScratch,
) -> Tensor:
    """Sum each token's weighted experts.

    Shapes: x bfloat16 [T, H] in natural order; ids, weights from `router_topk`; index from `expert_index`; the
    layer's experts as in the checkpoint; returns bfloat16 [T, H], what `add_rms_norm` adds to the residual stream.
    """
    tokens, hidden = x.shape
    k = ids.shape[1]
    order, offsets = index.order, index.offsets
    num_experts = offsets.shape[0] - 1
    intermediate = gate_up_bias.shape[1] // 2
    rows = tokens * k
    wide = triton.next_power_of_2(hidden)
    experts = triton.next_power_of_2(num_experts)
    sorted_x = torch.empty((rows, hidden), dtype=x.dtype, device=x.device)
    _gather_kernel[(rows,)](x, order, offsets, sorted_x, hidden, k, num_experts, block=wide, num_warps=4)
    gate_up_weight = expand(gate_up_blocks, gate_up_scales, scratch.gate_up)
    ends = offsets[1:]
    gate_up = torch.nn.functional.grouped_mm(sorted_x, gate_up_weight.transpose(-2, -1), offs=ends)
    act = torch.empty((rows, intermediate), dtype=x.dtype, device=x.device)
    _swiglu_kernel[(rows,)](
        gate_up, gate_up_bias, offsets, act, limit, intermediate, num_experts,
        experts=experts, block=triton.next_power_of_2(intermediate), num_warps=8,
    )  # fmt: skip
    down_weight = expand(down_blocks, down_scales, scratch.down)
    down = torch.nn.functional.grouped_mm(act, down_weight.transpose(-2, -1), offs=ends)
    inverse = torch.empty(rows, dtype=torch.int32, device=x.device)
    _inverse_kernel[(triton.cdiv(rows, 1024),)](order, offsets, inverse, num_experts, block=1024, num_warps=4)
    out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    _finish_kernel[(tokens,)](down, down_bias, ids, weights, inverse, out, hidden, k=k, block=wide, num_warps=8)
    return out
