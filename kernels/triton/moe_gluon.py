"""Experts straight from MXFP4, for any number of tokens: dequantised in registers, multiplied by wgmma.

Reference: `kernels.reference.moe.moe_add_`. Weights are the M side of the product (64 rows per warp group, from
registers), tokens the N side (from shared memory), so that few tokens waste nothing and no weight ever crosses shared
memory. A thread loads 16 bytes of a checkpoint row, one MXFP4 block, and that block's one scale; `permute.py` explains
which values these are to the tensor core, and why activations must come in expert order. Rows 2 u and 2 u + 1, a gate
and its up, are rows g and g + 8 of one thread's fragment, so SwiGLU needs no exchange.

Tiles: tokens are taken expert by expert from `expert_index`, up to `block_t` per program; a program finds its expert
from the offsets, and programs past the last tile return at once.
"""

# Device code has no Python types.
# ruff: noqa: ANN001, ANN202, C408
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from kernels.triton import fp4
from kernels.triton.permute import GROUP, expert_width

_UNPACK = gl.constexpr(fp4.UNPACK.value)
_BLOCK_M = 128


@gluon.jit
def _unpack(codes, scales, block_m: gl.constexpr, warps: gl.constexpr, operand: gl.constexpr):
    """Turn codes int16 [M, 4, 8] and scales uint8 [M, 4] into the register operand bfloat16 [M, 128]."""
    factor = ((scales.to(gl.int16) + 126) << 7).to(gl.bfloat16, bitcast=True)
    factor = factor.expand_dims(2).broadcast_to([block_m, 4, 8])
    n0, n1, n2, n3 = gl.inline_asm_elementwise(
        _UNPACK,
        "=r,=r,=r,=r,r,r",
        [codes, factor],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=2,
    )
    values = gl.join(gl.join(n0, n1), gl.join(n2, n3))
    reps: gl.constexpr = block_m // (16 * warps)
    values = values.reshape([reps, 2, warps, 8, 4, 4, 2, 2, 2]).permute([0, 2, 1, 3, 5, 8, 7, 4, 6])
    return gl.convert_layout(values.reshape([block_m, 128]), operand, assert_trivial=True)


@gluon.jit
def _copy_tokens(tile, x_rows, column, is_real, width):
    async_copy.async_copy_global_to_shared(tile, x_rows + column, mask=is_real)
    async_copy.commit_group()


@gluon.jit
def _expert_kernel(
    x_ptr,
    order_ptr,
    offsets_ptr,
    codes_ptr,
    scales_ptr,
    bias_ptr,
    weights_ptr,
    out_ptr,
    limit,
    x_stride: gl.constexpr,
    out_stride: gl.constexpr,
    num_rows: gl.constexpr,
    num_blocks: gl.constexpr,
    num_experts: gl.constexpr,
    experts: gl.constexpr,
    x_div: gl.constexpr,
    is_gate_up: gl.constexpr,
    block_m: gl.constexpr,
    block_t: gl.constexpr,
    stages: gl.constexpr,
    warps: gl.constexpr,
):
    search: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [warps, 1], [1, 0])
    inner = gl.arange(0, experts, gl.SliceLayout(0, search))
    outer = gl.arange(0, experts, gl.SliceLayout(1, search))
    known = inner < num_experts
    begins = gl.load(offsets_ptr + inner, mask=known, other=0)
    ends = gl.load(offsets_ptr + inner + 1, mask=known, other=0)
    tiles = (ends - begins + block_t - 1) // block_t
    upto = gl.sum(gl.where(inner[None, :] <= outer[:, None], tiles[None, :], 0), axis=1)
    index = gl.program_id(1)
    expert = gl.sum((upto <= index).to(gl.int32), axis=0)
    if expert >= num_experts:
        return
    before = gl.sum(gl.where(inner < expert, tiles, 0), axis=0)
    start = gl.load(offsets_ptr + expert) + (index - before) * block_t
    end = gl.load(offsets_ptr + expert + 1)

    # Weights: thread (warp, g, c) holds, for every 64 rows and h in {0, 1}, row 2 (8 warp + g) + h and block c of four.
    code_layout: gl.constexpr = gl.BlockedLayout([1, 1, 8], [8, 4, 1], [warps, 1, 1], [2, 1, 0])
    row_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, code_layout))
    r = gl.arange(0, block_m, row_layout)
    span: gl.constexpr = 8 * warps
    row = gl.program_id(0) * block_m + 2 * (r // (2 * span) * span + r % span) + r // span % 2
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, code_layout)))
    half = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(0, code_layout)))
    at = row[:, None] * num_blocks + lane[None, :]
    row_ok = (row < num_rows)[:, None]
    layer = expert.to(gl.int64) * (num_rows * num_blocks)
    scale_at = scales_ptr + layer + at
    code_at = codes_ptr + layer * 8 + at.expand_dims(2) * 8 + half.expand_dims(0).expand_dims(0)

    # Tokens: 16 bytes per copy.
    copy_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [warps, 1], [1, 0])
    token = gl.arange(0, block_t, gl.SliceLayout(1, copy_layout))
    flat = gl.load(order_ptr + start + token, mask=start + token < end, other=0)
    column = gl.arange(0, 128, gl.SliceLayout(0, copy_layout))
    x_rows = x_ptr + (flat // x_div)[:, None] * x_stride + column[None, :]
    is_real = (start + token < end)[:, None]
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    buffers = gl.allocate_shared_memory(gl.bfloat16, [stages, block_t, 128], shared)

    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, block_t, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    iterations: gl.constexpr = (num_blocks + 3) // 4

    for stage in gl.static_range(stages - 1):
        _copy_tokens(buffers.index(stage), x_rows, stage * 128, is_real & (stage < iterations), x_stride)
    near_ok = row_ok & (lane < num_blocks)[None, :]
    codes_a = gl.load(code_at, mask=near_ok.expand_dims(2), other=0)
    scales_a = gl.load(scale_at, mask=near_ok, other=0)
    next_ok = row_ok & (lane + 4 < num_blocks)[None, :]
    codes_b = gl.load(code_at + 32, mask=next_ok.expand_dims(2), other=0)
    scales_b = gl.load(scale_at + 4, mask=next_ok, other=0)

    acc = warpgroup_mma_init(gl.zeros([block_m, block_t], gl.float32, mma))
    for i in range(iterations):
        weights = _unpack(codes_a, scales_a, block_m, warps, operand)
        codes_a = codes_b
        scales_a = scales_b
        far_ok = row_ok & (lane + (i + 2) * 4 < num_blocks)[None, :]
        codes_b = gl.load(code_at + (i + 2) * 32, mask=far_ok.expand_dims(2), other=0)
        scales_b = gl.load(scale_at + (i + 2) * 4, mask=far_ok, other=0)
        acc = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[acc]))
        async_copy.wait_group(stages - 2)
        fence_async_shared()
        gl.thread_barrier()
        acc = warpgroup_mma(weights, buffers.index(i % stages).permute([1, 0]), acc, is_async=True)
        ahead = i + stages - 1
        _copy_tokens(buffers.index(ahead % stages), x_rows, ahead * 128, is_real & (ahead < iterations), x_stride)
    acc = warpgroup_mma_wait(0, deps=[acc])
    async_copy.wait_group(0)

    reps: gl.constexpr = block_m // (16 * warps)
    m = gl.arange(0, block_m, gl.SliceLayout(1, mma))
    m_row = gl.program_id(0) * block_m + 2 * (m // 16 * 8 + m % 8) + m // 8 % 2
    bias = gl.load(bias_ptr + expert * num_rows + m_row, mask=m_row < num_rows, other=0.0).to(gl.float32)
    acc = acc + bias[:, None]
    if is_gate_up:
        pairs = acc.reshape([reps, warps, 2, 8, block_t]).permute([0, 1, 3, 4, 2])
        gate, up = gl.split(pairs)
        gate = gl.minimum(gate, limit)
        up = gl.minimum(gl.maximum(up, -limit), limit)
        act = (gate / (1.0 + gl.exp(-1.702 * gate)) * (up + 1.0)).to(gl.bfloat16)
        # 64 units, c's low bit | word | j | nibble, in expert order: word | nibble | c's low bit | j.
        act = act.reshape([2, 4, 2, 2, 2, block_t]).permute([5, 1, 3, 4, 0, 2]).reshape([block_t, block_m // 2])
        store_layout: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [warps, 1], [1, 0])
        act = gl.convert_layout(act, store_layout)
        out_token = gl.arange(0, block_t, gl.SliceLayout(1, store_layout))
        out_flat = gl.load(order_ptr + start + out_token, mask=start + out_token < end, other=0)
        q = gl.arange(0, block_m // 2, gl.SliceLayout(0, store_layout))
        half_group = gl.program_id(0) % 2
        position = gl.program_id(0) // 2 * 128 + half_group * 4 + q // 4 * 8 + q % 4
        target = out_ptr + out_flat.to(gl.int64)[:, None] * out_stride + position[None, :]
        gl.store(target, act, mask=(start + out_token < end)[:, None])
    else:
        natural = acc.reshape([reps, warps, 2, 8, block_t]).permute([4, 0, 1, 3, 2]).reshape([block_t, block_m])
        down_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [warps, 1], [1, 0])
        out_token = gl.arange(0, block_t, gl.SliceLayout(1, down_layout))
        out_ok = start + out_token < end
        out_flat = gl.load(order_ptr + start + out_token, mask=out_ok, other=0)
        weight = gl.load(weights_ptr + out_flat, mask=out_ok, other=0.0)
        natural = gl.convert_layout(natural.to(gl.float32), down_layout) * weight[:, None]
        out_row = gl.program_id(0) * block_m + gl.arange(0, block_m, gl.SliceLayout(0, down_layout))
        target = out_ptr + out_flat.to(gl.int64)[:, None] * out_stride + out_row[None, :]
        gl.store(target, natural.to(gl.bfloat16), mask=out_ok[:, None] & (out_row < num_rows)[None, :])


def choose_block_t(tokens: int, k: int, num_experts: int) -> int:
    """Size the token tile so that most experts need one: about twice the mean load, 16 to 128."""
    mean = tokens * k / num_experts
    for block_t in (16, 32, 64):
        if mean * 1.6 <= block_t:
            return block_t
    return 128


def _launch(
    x: Tensor,
    order: Tensor,
    offsets: Tensor,
    blocks: Tensor,
    scales: Tensor,
    bias: Tensor,
    weights: Tensor,
    out: Tensor,
    limit: float,
    x_div: int,
    is_gate_up: bool,
    block_t: int,
    warps: int | None,
    stages: int | None,
) -> None:
    num_experts, num_rows, num_blocks, _ = blocks.shape
    slots = order.shape[0]
    tiles = min(num_experts, slots) + slots // block_t
    grid = (triton.cdiv(num_rows, _BLOCK_M), tiles)
    if warps is None:
        warps = 8 if block_t >= 128 else 4
    if stages is None:
        stages = 3
    _expert_kernel[grid](
        x,
        order,
        offsets,
        blocks.view(torch.int16),
        scales,
        bias,
        weights,
        out,
        limit,
        x_stride=x.shape[-1],
        out_stride=out.shape[-1],
        num_rows=num_rows,
        num_blocks=num_blocks,
        num_experts=num_experts,
        experts=max(32, triton.next_power_of_2(num_experts)),
        x_div=x_div,
        is_gate_up=is_gate_up,
        block_m=_BLOCK_M,
        block_t=block_t,
        stages=stages,
        warps=warps,
        num_warps=warps,
    )


def moe_gate_up(
    x: Tensor,
    k: int,
    order: Tensor,
    offsets: Tensor,
    blocks: Tensor,
    scales: Tensor,
    bias: Tensor,
    limit: float,
    *,
    out: Tensor | None = None,
    block_t: int | None = None,
    warps: int | None = None,
    stages: int | None = None,
) -> Tensor:
    """Project each token by its k experts and apply SwiGLU.

    Shapes: x bfloat16 [T, expert_width(H)] in expert order; order and offsets from `expert_index`; blocks uint8
    [E, 2 I, H/32, 16], scales uint8 [E, 2 I, H/32], bias bfloat16 [E, 2 I], gate and up interleaved; returns bfloat16
    [T · k, expert_width(I)] in expert order, rows by flat slot; rows of no expert are not written. `out` must hold
    zeros in its padding columns.
    """
    slots = x.shape[0] * k
    inter = blocks.shape[1] // 2
    if out is None:
        out = torch.empty((slots, expert_width(inter)), dtype=torch.bfloat16, device=x.device)
        if inter % GROUP:
            out[:, inter // GROUP * GROUP :].zero_()
    if block_t is None:
        block_t = choose_block_t(x.shape[0], k, blocks.shape[0])
    _launch(x, order, offsets, blocks, scales, bias, bias, out, limit, k, True, block_t, warps, stages)
    return out


def moe_down(
    act: Tensor,
    order: Tensor,
    offsets: Tensor,
    blocks: Tensor,
    scales: Tensor,
    bias: Tensor,
    weights: Tensor,
    *,
    out: Tensor | None = None,
    block_t: int | None = None,
    warps: int | None = None,
    stages: int | None = None,
) -> Tensor:
    """Project back and weigh.

    Shapes: act as `moe_gate_up` left it; blocks uint8 [E, H, I/32, 16] and so on; weights float32 [T, k]; returns
    bfloat16 [T, k, H], which `add_rms_norm` sums over k into the residual stream; rows of no expert are not written, so
    a caller with padding passes an `out` that it zeroed once.
    """
    tokens, k = weights.shape
    if out is None:
        out = torch.zeros((tokens, k, blocks.shape[1]), dtype=torch.bfloat16, device=act.device)
    if block_t is None:
        block_t = choose_block_t(tokens, k, blocks.shape[0])
    _launch(act, order, offsets, blocks, scales, bias, weights, out, 0.0, 1, False, block_t, warps, stages)
    return out
