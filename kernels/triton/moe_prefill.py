"""Experts straight from MXFP4 for long prefills: a warp-specialised twin of `moe_gluon`.

Reference: `kernels.reference.moe.moe_add_`. One warp feeds tokens through TMA; two warp groups of 64 weight rows each
dequantise in registers and multiply, and since nothing but the token buffers couples them, one dequantises while the
tensor cores work for the other. Tokens are first copied into the experts' order, so that a tile is one TMA box; rows of
a tile past its expert's end belong to the next expert, cost nothing extra and are not stored.

Which weight row a fragment row holds is free, and chosen so that results leave the registers in runs: gate_up takes
units in the order that the next product reads (`permute.py`), gate and up in rows g and g + 8 of one thread.
"""

# Device code has no Python types.
# ruff: noqa: ANN001, ANN202, C408
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.triton.moe_gluon import _unpack
from kernels.triton.permute import expert_width
from kernels.triton.router import ExpertIndex

_BLOCK_M = 128


@gluon.jit
def _produce(x_desc, buffers, full, empty, start, iterations: gl.constexpr, stages: gl.constexpr):
    for i in range(iterations):
        stage = i % stages
        mbarrier.wait(empty.index(stage), (i // stages & 1) ^ 1)
        mbarrier.expect(full.index(stage), x_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(x_desc, [start, i * 128], full.index(stage), buffers.index(stage))


@gluon.jit
def _row_of(index, half, is_gate_up: gl.constexpr):
    """Give the weight row of M index `index` in the 64 rows `half`, in tiles of 16: g, then g + 8."""
    local = half * 32 + index // 16 * 8 + index % 8
    side = index // 8 % 2
    if is_gate_up:
        # Position `local` in expert order names this unit.
        low = local % 128
        local = local - low + low // 2 % 4 * 32 + low // 32 * 8 + low % 2 * 4 + low // 16 % 2 * 2 + low // 8 % 2
    return 2 * local + side


@gluon.jit
def _consume(
    buffers,
    full,
    empty,
    codes_ptr,
    scales_ptr,
    bias_ptr,
    order_ptr,
    out_ptr,
    expert,
    start,
    end,
    half,
    limit,
    out_stride: gl.constexpr,
    num_rows: gl.constexpr,
    num_blocks: gl.constexpr,
    is_gate_up: gl.constexpr,
    block_t: gl.constexpr,
    stages: gl.constexpr,
):
    iterations: gl.constexpr = (num_blocks + 3) // 4
    code_layout: gl.constexpr = gl.BlockedLayout([1, 1, 8], [8, 4, 1], [4, 1, 1], [2, 1, 0])
    row_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, code_layout))
    r = gl.arange(0, 64, row_layout)
    # The thread's registers run over h; the M index is warp, h, g.
    row = _row_of(r // 8 % 4 * 16 + r // 32 * 8 + r % 8, half, is_gate_up)
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, code_layout)))
    word = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(0, code_layout)))
    at = row[:, None] * num_blocks + lane[None, :]
    row_ok = (row < num_rows)[:, None]
    layer = expert.to(gl.int64) * (num_rows * num_blocks)
    code_at = codes_ptr + layer * 8 + at.expand_dims(2) * 8 + word.expand_dims(0).expand_dims(0)
    scale_layer = expert.to(gl.int64) * (num_rows * iterations * 4)
    scale_at = scales_ptr + scale_layer + row[:, None] * 4 + lane[None, :]

    near_ok = row_ok & (lane < num_blocks)[None, :]
    codes = gl.load(code_at, mask=near_ok.expand_dims(2), other=0)
    scales = gl.load(scale_at, mask=row_ok, other=0)

    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_t, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    acc = gl.zeros([64, block_t], gl.float32, mma)
    for i in range(iterations):
        weights = _unpack(codes, scales, 64, 4, operand)
        next_ok = row_ok & (lane + (i + 1) * 4 < num_blocks)[None, :]
        codes = gl.load(code_at + (i + 1) * 32, mask=next_ok.expand_dims(2), other=0)
        scales = gl.load(scale_at + (i + 1) * (num_rows * 4), mask=row_ok & (i + 1 < iterations), other=0)
        mbarrier.wait(full.index(i % stages), i // stages & 1)
        # Waited for at once: a product in flight still reads the registers of its weights, which the next ones would
        # overwrite. The other warp group keeps the tensor cores busy meanwhile.
        token = warpgroup_mma(weights, buffers.index(i % stages).permute([1, 0]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[token])
        mbarrier.arrive(empty.index(i % stages))

    m = gl.arange(0, 64, gl.SliceLayout(1, mma))
    m_row = _row_of(m, half, is_gate_up)
    bias = gl.load(bias_ptr + expert * num_rows + m_row, mask=m_row < num_rows, other=0.0).to(gl.float32)
    pairs = (acc + bias[:, None]).reshape([4, 2, 8, block_t]).permute([0, 2, 3, 1])
    if is_gate_up:
        gate, up = gl.split(pairs)
        gate = gl.minimum(gate, limit)
        up = gl.minimum(gl.maximum(up, -limit), limit)
        act = (gate / (1.0 + gl.exp(-1.702 * gate)) * (up + 1.0)).to(gl.bfloat16).reshape([32, block_t])
        layout: gl.constexpr = act.type.layout
        position = half * 32 + gl.arange(0, 32, gl.SliceLayout(1, layout))
        token = start + gl.arange(0, block_t, gl.SliceLayout(0, layout))
        # The experts' order again: the row is the place in the sorted list. Padding columns become zeros.
        target = out_ptr + token.to(gl.int64)[None, :] * out_stride + position[:, None]
        gl.store(target, act, mask=(token < end)[None, :] & (position < out_stride)[:, None])
    else:
        natural = pairs.permute([0, 1, 3, 2]).reshape([64, block_t]).to(gl.bfloat16)
        layout2: gl.constexpr = natural.type.layout
        out_row = half * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout2))
        token = start + gl.arange(0, block_t, gl.SliceLayout(0, layout2))
        flat = gl.load(order_ptr + token, mask=token < end, other=0)
        target = out_ptr + flat.to(gl.int64)[None, :] * out_stride + out_row[:, None]
        gl.store(target, natural, mask=(token < end)[None, :] & (out_row < num_rows)[:, None])


@gluon.jit
def _prefill_kernel(
    x_desc,
    order_ptr,
    tiles_ptr,
    codes_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    limit,
    out_stride: gl.constexpr,
    num_rows: gl.constexpr,
    num_blocks: gl.constexpr,
    is_gate_up: gl.constexpr,
    block_t: gl.constexpr,
    stages: gl.constexpr,
):
    tile_at = tiles_ptr + gl.program_id(1) * 4
    expert = gl.load(tile_at)
    start = gl.load(tile_at + 1)
    end = gl.load(tile_at + 2)
    if expert < 0:
        return
    buffers = gl.allocate_shared_memory(gl.bfloat16, [stages, block_t, 128], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    iterations: gl.constexpr = (num_blocks + 3) // 4
    first = gl.program_id(0) * 2
    gl.warp_specialize(
        [
            (_consume, (buffers, full, empty, codes_ptr, scales_ptr, bias_ptr, order_ptr, out_ptr, expert, start, end,
                        first, limit, out_stride, num_rows, num_blocks, is_gate_up, block_t, stages)),
            (_consume, (buffers, full, empty, codes_ptr, scales_ptr, bias_ptr, order_ptr, out_ptr, expert, start, end,
                        first + 1, limit, out_stride, num_rows, num_blocks, is_gate_up, block_t, stages)),
            (_produce, (x_desc, buffers, full, empty, start, iterations, stages)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


@triton.jit
def _sort_kernel(x_ptr, order_ptr, offsets_ptr, out_ptr, k, num_experts, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(offsets_ptr + num_experts):
        token = (tl.load(order_ptr + row) // k).to(tl.int64)
        column = tl.arange(0, block)
        x = tl.load(x_ptr + token * width + column, mask=column < width)
        tl.store(out_ptr + row * width + column, x, mask=column < width)


def sort_tokens(x: Tensor, k: int, index: ExpertIndex) -> Tensor:
    """Copy tokens into the experts' order: x [T, W] to [T · k, W]; rows past the last used one are not written."""
    rows, width = x.shape[0] * k, x.shape[1]
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    _sort_kernel[(rows,)](
        x, index.order, index.offsets, out, k, index.offsets.shape[0] - 1, width,
        block=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return out


def _launch(
    x: Tensor,
    index: ExpertIndex,
    blocks: Tensor,
    scales: Tensor,
    bias: Tensor,
    out: Tensor,
    limit: float,
    is_gate_up: bool,
    stages: int,
) -> None:
    _, num_rows, num_blocks, _ = blocks.shape
    block_t = index.block_t
    layout = gl.NVMMASharedLayout(128, 16, 2)
    rows = expert_width(num_rows // 2) * 2 if is_gate_up else num_rows
    _prefill_kernel[(triton.cdiv(rows, _BLOCK_M), index.tiles.shape[0])](
        TensorDescriptor.from_tensor(x, [block_t, 128], layout),
        index.order,
        index.tiles,
        blocks.view(torch.int16),
        scales,
        bias,
        out,
        limit,
        out_stride=out.shape[-1],
        num_rows=num_rows,
        num_blocks=num_blocks,
        is_gate_up=is_gate_up,
        block_t=block_t,
        stages=stages,
        num_warps=4,
    )


def moe_prefill(
    x: Tensor,
    k: int,
    index: ExpertIndex,
    gate_up: tuple[Tensor, Tensor, Tensor],
    down: tuple[Tensor, Tensor, Tensor],
    limit: float,
    *,
    stages: int = 3,
) -> Tensor:
    """Run each token through its k experts.

    Shapes: x bfloat16 [T, expert_width(H)] in expert order; index from `expert_index` with block_t 256 or 128; gate_up
    and down are (blocks, scales from `prepare_scales`, bias); returns unweighted bfloat16 [T, k, H], for
    `add_rms_norm(…, slot_weights=…)`; rows of no expert are not written.
    """
    tokens, hidden = x.shape[0], down[0].shape[1]
    sorted_x = sort_tokens(x, k, index)
    inter = gate_up[0].shape[1] // 2
    act = torch.empty((tokens * k, expert_width(inter)), dtype=torch.bfloat16, device=x.device)
    _launch(sorted_x, index, *gate_up, act, limit, True, stages)
    out = torch.empty((tokens, k, hidden), dtype=torch.bfloat16, device=x.device)
    _launch(act, index, *down, out, limit, False, stages)
    return out
