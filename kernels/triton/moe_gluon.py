"""Experts straight from MXFP4, for any number of tokens: dequantised in registers, multiplied by wgmma.

Reference: `kernels.reference.moe.moe_add_`. Weights are the M side of the product (64 rows per warp group, from
registers), tokens the N side (from shared memory), so that few tokens waste nothing and no weight ever crosses shared
memory. A thread loads 16 bytes of a checkpoint row, one MXFP4 block, and that block's one scale; `permute.py` explains
which values these are to the tensor core, and why activations must come in expert order. Rows 2 u and 2 u + 1, a gate
and its up, are rows g and g + 8 of one thread's fragment, so SwiGLU needs no exchange.

Tiles: tokens are taken expert by expert from `expert_index`, up to `block_t` per program; programs past the last tile
return at once.
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
from kernels.triton.router import ExpertIndex

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
def _copy_tokens(tile, x_ptr, x_rows, column, is_real):
    # 32-bit offsets until the last moment: a pointer per row would cost twice the registers.
    async_copy.async_copy_global_to_shared(tile, x_ptr + (x_rows + column), mask=is_real)
    async_copy.commit_group()


@gluon.jit
def _load_weights(
    codes_ptr,
    scales_ptr,
    code_at,
    scale_at,
    row_ok,
    lane,
    i,
    num_rows: gl.constexpr,
    num_blocks: gl.constexpr,
    iterations: gl.constexpr,
):
    """Ask for K group i: codes int16 [M, 4, 8] and scales uint8 [M, 4], zeros past the end."""
    block_ok = row_ok & (lane + i * 4 < num_blocks)[None, :]
    # 32-bit offsets until the last moment: a pointer per row would cost twice the registers.
    codes = gl.load(codes_ptr + (code_at + i * 32), mask=block_ok.expand_dims(2), other=0)
    scales = gl.load(scales_ptr + (scale_at + i * (num_rows * 4)), mask=row_ok & (i < iterations), other=0)
    return codes, scales


@gluon.jit
def _step(
    acc,
    codes,
    scales,
    i,
    tile,
    ahead_tile,
    x_ptr,
    x_rows,
    is_real,
    codes_ptr,
    scales_ptr,
    code_at,
    scale_at,
    row_ok,
    lane,
    num_rows: gl.constexpr,
    num_blocks: gl.constexpr,
    iterations: gl.constexpr,
    ring: gl.constexpr,
    block_m: gl.constexpr,
    warps: gl.constexpr,
    operand: gl.constexpr,
):
    """Multiply K group i, and ask for the weights of group i + ring and the tokens of group i + ring - 1."""
    acc = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[acc]))
    async_copy.wait_group(ring - 2)
    fence_async_shared()
    gl.thread_barrier()
    # Only now: a product in flight still reads its registers, and nothing but program order protects them.
    weights = _unpack(codes, scales, block_m, warps, operand)
    codes, scales = _load_weights(
        codes_ptr, scales_ptr, code_at, scale_at, row_ok, lane, i + ring, num_rows, num_blocks, iterations
    )
    ahead = i + ring - 1
    _copy_tokens(ahead_tile, x_ptr, x_rows, ahead * 128, is_real & (ahead < iterations))
    acc = warpgroup_mma(weights, tile.permute([1, 0]), acc, is_async=True)
    return acc, codes, scales


@gluon.jit
def _expert_kernel(
    x_ptr,
    order_ptr,
    tiles_ptr,
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
    x_div: gl.constexpr,
    is_gate_up: gl.constexpr,
    block_m: gl.constexpr,
    block_t: gl.constexpr,
    ring: gl.constexpr,
    warps: gl.constexpr,
):
    tile_at = tiles_ptr + gl.program_id(1) * 4
    expert = gl.load(tile_at)
    start = gl.load(tile_at + 1)
    end = gl.load(tile_at + 2)
    if expert < 0:
        return

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
    iterations: gl.constexpr = (num_blocks + 3) // 4
    scale_layer = expert.to(gl.int64) * (num_rows * iterations * 4)
    scales_ptr += scale_layer
    codes_ptr += layer * 8
    scale_at = row[:, None] * 4 + lane[None, :]
    code_at = at.expand_dims(2) * 8 + half.expand_dims(0).expand_dims(0)

    # Tokens: 16 bytes per copy.
    copy_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [warps, 1], [1, 0])
    token = gl.arange(0, block_t, gl.SliceLayout(1, copy_layout))
    flat = gl.load(order_ptr + start + token, mask=start + token < end, other=0)
    column = gl.arange(0, 128, gl.SliceLayout(0, copy_layout))
    x_rows = (flat // x_div)[:, None] * x_stride + column[None, :]
    is_real = (start + token < end)[:, None]
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    # One allocation for each place of the ring, used by name: the compiler sees that they do not overlap and needs no
    # barrier between reading one and filling another.
    tile0 = gl.allocate_shared_memory(gl.bfloat16, [block_t, 128], shared)
    tile1 = gl.allocate_shared_memory(gl.bfloat16, [block_t, 128], shared)
    tile2 = gl.allocate_shared_memory(gl.bfloat16, [block_t, 128], shared)
    if ring == 4:
        tile3 = gl.allocate_shared_memory(gl.bfloat16, [block_t, 128], shared)

    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, block_t, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)

    _copy_tokens(tile0, x_ptr, x_rows, 0, is_real)
    _copy_tokens(tile1, x_ptr, x_rows, 128, is_real & (iterations > 1))
    if ring == 4:
        _copy_tokens(tile2, x_ptr, x_rows, 256, is_real & (iterations > 2))
    codes0, scales0 = _load_weights(
        codes_ptr, scales_ptr, code_at, scale_at, row_ok, lane, 0, num_rows, num_blocks, iterations
    )
    codes1, scales1 = _load_weights(
        codes_ptr, scales_ptr, code_at, scale_at, row_ok, lane, 1, num_rows, num_blocks, iterations
    )
    codes2, scales2 = _load_weights(
        codes_ptr, scales_ptr, code_at, scale_at, row_ok, lane, 2, num_rows, num_blocks, iterations
    )
    if ring == 4:
        codes3, scales3 = _load_weights(
            codes_ptr, scales_ptr, code_at, scale_at, row_ok, lane, 3, num_rows, num_blocks, iterations
        )

    reps: gl.constexpr = block_m // (16 * warps)
    m = gl.arange(0, block_m, gl.SliceLayout(1, mma))
    m_row = gl.program_id(0) * block_m + 2 * (m // 16 * 8 + m % 8) + m // 8 % 2
    bias = gl.load(bias_ptr + expert * num_rows + m_row, mask=m_row < num_rows, other=0.0).to(gl.float32)
    vector: gl.constexpr = 4 if is_gate_up else 8
    store_layout: gl.constexpr = gl.BlockedLayout([1, vector], [2, 16], [warps, 1], [1, 0])
    out_token = gl.arange(0, block_t, gl.SliceLayout(1, store_layout))
    out_ok = start + out_token < end
    out_flat = gl.load(order_ptr + start + out_token, mask=out_ok, other=0)

    acc = warpgroup_mma_init(gl.zeros([block_m, block_t], gl.float32, mma))
    # Unrolled over the ring, so that what is loaded stays in its registers until it is used. Moving it along instead
    # would wait for it an iteration after it was asked for.
    rounds: gl.constexpr = iterations // ring * ring
    for i in range(0, rounds, ring):
        if ring == 4:
            acc, codes0, scales0 = _step(
                acc, codes0, scales0, i, tile0, tile3, x_ptr, x_rows, is_real, codes_ptr, scales_ptr, code_at,
                scale_at, row_ok, lane, num_rows, num_blocks, iterations, ring, block_m, warps, operand,
            )  # fmt: skip
        else:
            acc, codes0, scales0 = _step(
                acc, codes0, scales0, i, tile0, tile2, x_ptr, x_rows, is_real, codes_ptr, scales_ptr, code_at,
                scale_at, row_ok, lane, num_rows, num_blocks, iterations, ring, block_m, warps, operand,
            )  # fmt: skip
        acc, codes1, scales1 = _step(
            acc, codes1, scales1, i + 1, tile1, tile0, x_ptr, x_rows, is_real, codes_ptr, scales_ptr, code_at,
            scale_at, row_ok, lane, num_rows, num_blocks, iterations, ring, block_m, warps, operand,
        )  # fmt: skip
        acc, codes2, scales2 = _step(
            acc, codes2, scales2, i + 2, tile2, tile1, x_ptr, x_rows, is_real, codes_ptr, scales_ptr, code_at,
            scale_at, row_ok, lane, num_rows, num_blocks, iterations, ring, block_m, warps, operand,
        )  # fmt: skip
        if ring == 4:
            acc, codes3, scales3 = _step(
                acc, codes3, scales3, i + 3, tile3, tile2, x_ptr, x_rows, is_real, codes_ptr, scales_ptr, code_at,
                scale_at, row_ok, lane, num_rows, num_blocks, iterations, ring, block_m, warps, operand,
            )  # fmt: skip
    if iterations % ring > 0:
        if ring == 4:
            acc, codes0, scales0 = _step(
                acc, codes0, scales0, rounds, tile0, tile3, x_ptr, x_rows, is_real, codes_ptr, scales_ptr, code_at,
                scale_at, row_ok, lane, num_rows, num_blocks, iterations, ring, block_m, warps, operand,
            )  # fmt: skip
        else:
            acc, codes0, scales0 = _step(
                acc, codes0, scales0, rounds, tile0, tile2, x_ptr, x_rows, is_real, codes_ptr, scales_ptr, code_at,
                scale_at, row_ok, lane, num_rows, num_blocks, iterations, ring, block_m, warps, operand,
            )  # fmt: skip
    if iterations % ring > 1:
        acc, codes1, scales1 = _step(
            acc, codes1, scales1, rounds + 1, tile1, tile0, x_ptr, x_rows, is_real, codes_ptr, scales_ptr, code_at,
            scale_at, row_ok, lane, num_rows, num_blocks, iterations, ring, block_m, warps, operand,
        )  # fmt: skip
    if iterations % ring > 2:
        acc, codes2, scales2 = _step(
            acc, codes2, scales2, rounds + 2, tile2, tile1, x_ptr, x_rows, is_real, codes_ptr, scales_ptr, code_at,
            scale_at, row_ok, lane, num_rows, num_blocks, iterations, ring, block_m, warps, operand,
        )  # fmt: skip
    acc = warpgroup_mma_wait(0, deps=[acc])
    async_copy.wait_group(0)

    acc = acc + bias[:, None]
    if is_gate_up:
        pairs = acc.reshape([reps, warps, 2, 8, block_t]).permute([0, 1, 3, 4, 2])
        gate, up = gl.split(pairs)
        gate = gl.minimum(gate, limit)
        up = gl.minimum(gl.maximum(up, -limit), limit)
        act = (gate / (1.0 + gl.exp(-1.702 * gate)) * (up + 1.0)).to(gl.bfloat16)
        # 64 units, c's low bit | word | j | nibble, in expert order: word | nibble | c's low bit | j.
        act = act.reshape([2, 4, 2, 2, 2, block_t]).permute([5, 1, 3, 4, 0, 2]).reshape([block_t, block_m // 2])
        act = gl.convert_layout(act, store_layout)
        q = gl.arange(0, block_m // 2, gl.SliceLayout(0, store_layout))
        half_group = gl.program_id(0) % 2
        position = gl.program_id(0) // 2 * 128 + half_group * 4 + q // 4 * 8 + q % 4
        target = out_ptr + out_flat.to(gl.int64)[:, None] * out_stride + position[None, :]
        gl.store(target, act, mask=out_ok[:, None])
    else:
        natural = acc.reshape([reps, warps, 2, 8, block_t]).permute([4, 0, 1, 3, 2]).reshape([block_t, block_m])
        weight = gl.load(weights_ptr + out_flat, mask=out_ok, other=0.0)
        natural = gl.convert_layout(natural.to(gl.float32), store_layout) * weight[:, None]
        out_row = gl.program_id(0) * block_m + gl.arange(0, block_m, gl.SliceLayout(0, store_layout))
        target = out_ptr + out_flat.to(gl.int64)[:, None] * out_stride + out_row[None, :]
        gl.store(target, natural.to(gl.bfloat16), mask=out_ok[:, None] & (out_row < num_rows)[None, :])


def prepare_scales(scales: Tensor) -> Tensor:
    """Reorder scales uint8 [E, N, B] to [E, ⌈B/4⌉, N, 4], padded with 127: what the kernels read, once, at load."""
    experts, rows, blocks = scales.shape
    groups = -(-blocks // 4)
    padded = torch.nn.functional.pad(scales, (0, groups * 4 - blocks), value=127)
    return padded.view(experts, rows, groups, 4).transpose(1, 2).contiguous()


def _launch(
    x: Tensor,
    index: ExpertIndex,
    blocks: Tensor,
    scales: Tensor,
    bias: Tensor,
    weights: Tensor,
    out: Tensor,
    limit: float,
    x_div: int,
    is_gate_up: bool,
    warps: int | None,
    stages: int | None,
    max_registers: int | None,
) -> None:
    _, num_rows, num_blocks, _ = blocks.shape
    block_t = index.block_t
    grid = (triton.cdiv(num_rows, _BLOCK_M), index.tiles.shape[0])
    if warps is None:
        warps = 8
    if stages is None:
        stages = 3
    if max_registers is None and block_t <= 64:
        max_registers = 128  # two blocks a multiprocessor
    if stages not in (3, 4):
        raise ValueError(f"a ring of 3 or 4 stages, not {stages}")
    _expert_kernel[grid](
        x,
        index.order,
        index.tiles,
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
        x_div=x_div,
        is_gate_up=is_gate_up,
        block_m=_BLOCK_M,
        block_t=block_t,
        ring=stages,
        warps=warps,
        num_warps=warps,
        maxnreg=max_registers,
    )


def moe_gate_up(
    x: Tensor,
    k: int,
    index: ExpertIndex,
    blocks: Tensor,
    scales: Tensor,
    bias: Tensor,
    limit: float,
    *,
    out: Tensor | None = None,
    warps: int | None = None,
    stages: int | None = None,
    max_registers: int | None = None,
) -> Tensor:
    """Project each token by its k experts and apply SwiGLU.

    Shapes: x bfloat16 [T, expert_width(H)] in expert order; index from `expert_index`; blocks uint8
    [E, 2 I, H/32, 16], scales from `prepare_scales`, bias bfloat16 [E, 2 I], gate and up interleaved; returns bfloat16
    [T · k, expert_width(I)] in expert order, rows by flat slot; rows of no expert are not written. `out` must hold
    zeros in its padding columns.
    """
    slots = x.shape[0] * k
    inter = blocks.shape[1] // 2
    if out is None:
        out = torch.empty((slots, expert_width(inter)), dtype=torch.bfloat16, device=x.device)
        if inter % GROUP:
            out[:, inter // GROUP * GROUP :].zero_()
    _launch(x, index, blocks, scales, bias, bias, out, limit, k, True, warps, stages, max_registers)
    return out


def moe_down(
    act: Tensor,
    index: ExpertIndex,
    blocks: Tensor,
    scales: Tensor,
    bias: Tensor,
    weights: Tensor,
    *,
    out: Tensor | None = None,
    warps: int | None = None,
    stages: int | None = None,
    max_registers: int | None = None,
) -> Tensor:
    """Project back and weigh.

    Shapes: act as `moe_gate_up` left it; blocks uint8 [E, H, I/32, 16] and so on; weights float32 [T, k]; returns
    bfloat16 [T, k, H], which `add_rms_norm` sums over k into the residual stream; rows of no expert are not written, so
    a caller with padding passes an `out` that it zeroed once.
    """
    tokens, k = weights.shape
    if out is None:
        out = torch.zeros((tokens, k, blocks.shape[1]), dtype=torch.bfloat16, device=act.device)
    _launch(act, index, blocks, scales, bias, weights, out, 0.0, 1, False, warps, stages, max_registers)
    return out
