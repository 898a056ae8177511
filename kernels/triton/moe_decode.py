"""Experts straight from MXFP4 for tens to hundreds of tokens: persistent programs, fed by bulk tensor copies.

Reference: `kernels.reference.moe.moe_add_`. One warp of a program keeps a ring of shared memory full: of weights as
they lie in the checkpoint, of their scales and of tokens, tile after tile without a pause. Warp groups of 64 weight
rows each take from it, dequantise in registers and multiply; nothing but the ring couples them, so one dequantises
while another's product runs. Weights are the M side of the product, tokens the N side, so that few tokens waste
nothing; `permute.py` explains which values a thread's 16 bytes are to the tensor core.

Tokens are first copied into the experts' order, so that a tile is one box; rows of a tile past its expert's end belong
to the next expert, cost nothing extra and are not stored.
"""

# Device code has no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

from functools import cache

import torch
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

from kernels.triton import fp4
from kernels.triton.moe_prefill import sort_tokens
from kernels.triton.permute import GROUP, expert_width
from kernels.triton.router import ExpertIndex

_UNPACK = gl.constexpr(fp4.UNPACK.value)
_GROUPS = 2  # warp groups of a program
_PROGRAMS = 2  # programs of a multiprocessor
_STAGES = {16: 6, 32: 4, 64: 4}  # two programs' shared memory holds 8, 6, 4; more than these gains nothing


@gluon.jit
def _produce(
    x_desc,
    codes_desc,
    scales_desc,
    tokens,
    codes,
    scales,
    full,
    empty,
    tiles_ptr,
    num_rows: gl.constexpr,
    num_blocks: gl.constexpr,
    groups: gl.constexpr,
    stages: gl.constexpr,
):
    iterations: gl.constexpr = (num_blocks + 3) // 4
    row_blocks: gl.constexpr = (num_rows + groups * 64 - 1) // (groups * 64)
    stage_bytes: gl.constexpr = x_desc.block_type.nbytes + groups * (
        codes_desc.block_type.nbytes + scales_desc.block_type.nbytes
    )
    total = gl.load(tiles_ptr + 3) * row_blocks
    count = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        tile_at = tiles_ptr + tile // row_blocks * 4
        expert = gl.load(tile_at)
        start = gl.load(tile_at + 1)
        first = tile % row_blocks * (groups * 64)
        row = expert * num_rows + first
        scale_row = (expert * (iterations * num_rows) + first) // 32
        for i in range(iterations):
            stage = count % stages
            mbarrier.wait(empty.index(stage), (count // stages & 1) ^ 1)
            mbarrier.expect(full.index(stage), stage_bytes)
            for group in gl.static_range(groups):
                place = stage * groups + group
                tma.async_copy_global_to_shared(
                    codes_desc, [row + group * 64, i * 32], full.index(stage), codes.index(place)
                )
                scale_at = scale_row + group * 2 + i * (num_rows // 32)
                tma.async_copy_global_to_shared(scales_desc, [scale_at, 0], full.index(stage), scales.index(place))
            tma.async_copy_global_to_shared(x_desc, [start, i * 128], full.index(stage), tokens.index(stage))
            count += 1


@gluon.jit
def _read(codes, scales, place, code_layout: gl.constexpr, scale_layout: gl.constexpr):
    """Take a group's codes int16 [64, 4, 8] and their factors bfloat16 [64, 4, 8] from the ring."""
    code = codes.index(place).load(code_layout).reshape([64, 4, 8])
    layout: gl.constexpr = code.type.layout
    word = scales.index(place).load(scale_layout).reshape([64])
    word = gl.convert_layout(word, gl.SliceLayout(1, gl.SliceLayout(2, layout)), assert_trivial=True)
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    scale = (word[:, None] >> (lane * 8)[None, :]) & 0xFF
    factor = ((scale + 126) << 7).to(gl.int16).to(gl.bfloat16, bitcast=True)
    return code, factor


@gluon.jit
def _unpack(code, factor, operand: gl.constexpr):
    """Turn codes and factors into the register operand bfloat16 [64, 128]; M index: warp, h, g of row (warp, g, h)."""
    factor = factor.expand_dims(2).broadcast_to([64, 4, 8])
    n0, n1, n2, n3 = gl.inline_asm_elementwise(
        _UNPACK,
        "=r,=r,=r,=r,r,r",
        [code, factor],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=2,
    )
    values = gl.join(gl.join(n0, n1), gl.join(n2, n3))
    values = values.reshape([4, 8, 2, 4, 4, 2, 2, 2]).permute([0, 2, 1, 4, 7, 6, 3, 5])
    return gl.convert_layout(values.reshape([64, 128]), operand, assert_trivial=True)


@gluon.jit
def _consume(
    tokens,
    codes,
    scales,
    full,
    empty,
    group,
    tiles_ptr,
    order_ptr,
    bias_ptr,
    weights_ptr,
    out_ptr,
    limit,
    out_stride: gl.constexpr,
    num_rows: gl.constexpr,
    num_blocks: gl.constexpr,
    is_gate_up: gl.constexpr,
    block_t: gl.constexpr,
    groups: gl.constexpr,
    stages: gl.constexpr,
):
    iterations: gl.constexpr = (num_blocks + 3) // 4
    row_blocks: gl.constexpr = (num_rows + groups * 64 - 1) // (groups * 64)
    # A thread (warp, g, c) holds rows 16 warp + 2 g + h and of each the 16 bytes of block c.
    code_layout: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [1, 0]],
        lane_bases=[[0, 8], [0, 16], [2, 0], [4, 0], [8, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 32],
    )
    scale_layout: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1]],
        lane_bases=[[0, 0], [0, 0], [0, 2], [0, 4], [0, 8]],
        warp_bases=[[0, 16], [1, 0]],
        block_bases=[],
        shape=[2, 32],
    )
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_t, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    m = gl.arange(0, 64, gl.SliceLayout(1, mma))
    m_row = m // 16 * 16 + m % 8 * 2 + m // 8 % 2

    total = gl.load(tiles_ptr + 3) * row_blocks
    count = 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        tile_at = tiles_ptr + tile // row_blocks * 4
        expert = gl.load(tile_at)
        start = gl.load(tile_at + 1)
        end = gl.load(tile_at + 2)
        first = tile % row_blocks * (groups * 64) + group * 64

        acc = gl.zeros([64, block_t], gl.float32, mma)
        mbarrier.wait(full.index(count % stages), count // stages & 1)
        code, factor = _read(codes, scales, count % stages * groups + group, code_layout, scale_layout)
        for i in range(iterations):
            stage = count % stages
            weights = _unpack(code, factor, operand)
            token = warpgroup_mma(weights, tokens.index(stage).permute([1, 0]), acc, is_async=True)
            # While it runs, what comes next; after a tile's last, this once more.
            count += (i + 1 < iterations).to(gl.int32)
            mbarrier.wait(full.index(count % stages), count // stages & 1)
            code, factor = _read(codes, scales, count % stages * groups + group, code_layout, scale_layout)
            # The product still reads the registers of its weights: nothing is dequantised before it has ended.
            acc = warpgroup_mma_wait(0, deps=[token])
            mbarrier.arrive(empty.index(stage))
        count += 1

        rows = first + m_row
        bias = gl.load(bias_ptr + expert * num_rows + rows, mask=rows < num_rows, other=0.0).to(gl.float32)
        acc = acc + bias[:, None]
        if is_gate_up:
            gate, up = gl.split(acc.reshape([4, 2, 8, block_t]).permute([0, 2, 3, 1]))
            gate = gl.minimum(gate, limit)
            up = gl.minimum(gl.maximum(up, -limit), limit)
            act = (gate / (1.0 + gl.exp(-1.702 * gate)) * (up + 1.0)).to(gl.bfloat16)
            # 32 units: word | high | nibble's high bit | its low bit; in expert order: word | nibble | high.
            act = act.reshape([4, 2, 2, 2, block_t]).permute([4, 0, 2, 3, 1]).reshape([block_t, 32])
            layout: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [4, 1], [1, 0])
            act = gl.convert_layout(act, layout)
            q = gl.arange(0, 32, gl.SliceLayout(0, layout))
            unit = first // 2
            position = unit // 128 * 128 + q // 8 * 32 + q // 4 % 2 * 16 + q // 2 % 2 * 8 + unit // 32 % 4 * 2 + q % 2
            row = start + gl.arange(0, block_t, gl.SliceLayout(1, layout))
            target = out_ptr + row.to(gl.int64)[:, None] * out_stride + position[None, :]
            is_unit = first < num_rows
            gl.store(target, act, mask=((row < end) & is_unit)[:, None] & (position < out_stride)[None, :])
        else:
            column = start + gl.arange(0, block_t, gl.SliceLayout(0, mma))
            flat = gl.load(order_ptr + column, mask=column < end, other=0)
            acc = acc * gl.load(weights_ptr + flat, mask=column < end, other=0.0)[None, :]
            natural = acc.to(gl.bfloat16).reshape([4, 2, 8, block_t]).permute([3, 0, 2, 1]).reshape([block_t, 64])
            layout2: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
            natural = gl.convert_layout(natural, layout2)
            row = start + gl.arange(0, block_t, gl.SliceLayout(1, layout2))
            flat2 = gl.load(order_ptr + row, mask=row < end, other=0)
            out_row = first + gl.arange(0, 64, gl.SliceLayout(0, layout2))
            target = out_ptr + flat2.to(gl.int64)[:, None] * out_stride + out_row[None, :]
            gl.store(target, natural, mask=(row < end)[:, None] & (out_row < num_rows)[None, :])


@gluon.jit
def _expert_kernel(
    x_desc,
    codes_desc,
    scales_desc,
    tiles_ptr,
    order_ptr,
    bias_ptr,
    weights_ptr,
    out_ptr,
    limit,
    out_stride: gl.constexpr,
    num_rows: gl.constexpr,
    num_blocks: gl.constexpr,
    is_gate_up: gl.constexpr,
    block_t: gl.constexpr,
    groups: gl.constexpr,
    stages: gl.constexpr,
    consumer_registers: gl.constexpr,
):
    tokens = gl.allocate_shared_memory(gl.bfloat16, [stages, block_t, 128], x_desc.layout)
    codes = gl.allocate_shared_memory(gl.int16, [stages * groups, 64, 32], codes_desc.layout)
    scales = gl.allocate_shared_memory(gl.int32, [stages * groups, 2, 32], scales_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=groups)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (tokens, codes, scales, full, empty, 0, tiles_ptr, order_ptr, bias_ptr, weights_ptr, out_ptr,
                        limit, out_stride, num_rows, num_blocks, is_gate_up, block_t, groups, stages)),
            (_consume, (tokens, codes, scales, full, empty, 1, tiles_ptr, order_ptr, bias_ptr, weights_ptr, out_ptr,
                        limit, out_stride, num_rows, num_blocks, is_gate_up, block_t, groups, stages)),
            (_produce, (x_desc, codes_desc, scales_desc, tokens, codes, scales, full, empty, tiles_ptr, num_rows,
                        num_blocks, groups, stages)),
        ],
        [4, 1],
        [consumer_registers, 24],
    )  # fmt: skip


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _launch(
    x: Tensor,
    index: ExpertIndex,
    blocks: Tensor,
    scales: Tensor,
    bias: Tensor,
    weights: Tensor,
    out: Tensor,
    limit: float,
    is_gate_up: bool,
) -> None:
    experts, num_rows, num_blocks, _ = blocks.shape
    block_t = index.block_t
    token_layout = gl.NVMMASharedLayout(128, 16, 2)
    width, words = num_blocks * 8, experts * -(-num_blocks // 4) * num_rows // 32
    _expert_kernel[(_PROGRAMS * _multiprocessors(x.device),)](
        TensorDescriptor.from_tensor(x, [block_t, 128], token_layout),
        TensorDescriptor(
            blocks.view(torch.int16), [experts * num_rows, width], [width, 1], [64, 32], gl.NVMMASharedLayout(0, 16, 2)
        ),
        TensorDescriptor(scales.view(torch.int32), [words, 32], [32, 1], [2, 32], gl.NVMMASharedLayout(0, 32, 2)),
        index.tiles,
        index.order,
        bias,
        weights,
        out,
        limit,
        out_stride=out.shape[-1],
        num_rows=num_rows,
        num_blocks=num_blocks,
        is_gate_up=is_gate_up,
        block_t=block_t,
        groups=_GROUPS,
        # The larger results of `down` take the room of a stage.
        stages=_STAGES[block_t] - (block_t == 64 and not is_gate_up),
        consumer_registers=104,
        num_warps=4,
        maxnreg=80,
    )


def moe_decode(
    x: Tensor,
    weights: Tensor,
    index: ExpertIndex,
    gate_up: tuple[Tensor, Tensor, Tensor],
    down: tuple[Tensor, Tensor, Tensor],
    limit: float,
    *,
    act: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Run each token through its k experts, and weigh.

    Shapes: x bfloat16 [T, expert_width(H)] in expert order; weights float32 [T, k]; index from `expert_index` with
    block_t 16, 32 or 64; gate_up and down are (blocks as in the checkpoint, scales from `prepare_scales`, bias).
    Returns bfloat16 [T, k, H], which `add_rms_norm` sums over k into the residual stream; rows of no expert are not
    written. `act` [T · k, expert_width(I)] and `out` [T, k, H], zeroed once, spare the allocations.
    """
    tokens, k = weights.shape
    hidden, inter = down[0].shape[1], gate_up[0].shape[1] // 2
    sorted_x = sort_tokens(x, k, index)
    if act is None:
        act = torch.empty((tokens * k, expert_width(inter)), dtype=torch.bfloat16, device=x.device)
        if inter % GROUP:
            act[:, inter // GROUP * GROUP :].zero_()
    if out is None:
        out = torch.zeros((tokens, k, hidden), dtype=torch.bfloat16, device=x.device)
    _launch(sorted_x, index, *gate_up, weights, act, limit, True)
    _launch(act, index, *down, weights, out, 0.0, False)
    return out
