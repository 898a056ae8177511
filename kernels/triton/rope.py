"""Bias, rotary embedding and the write to the paged cache, in one pass over the output of the qkv GEMM.

Reference: `kernels.reference.rope`, with dimension i paired with i + D/2 as in Hugging Face checkpoints.
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
def _rope_kernel(
    qkv_ptr,
    bias_ptr,
    table_ptr,
    positions_ptr,
    slots_ptr,
    query_ptr,
    cache_ptr,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    half: tl.constexpr,
    heads_per_program: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * heads_per_program + tl.arange(0, heads_per_program)[:, None]
    pair = tl.arange(0, half)[None, :]
    total: tl.constexpr = num_heads + 2 * num_kv_heads
    inside = (head < total) & (pair >= 0)
    column = head * (2 * half) + pair
    row = qkv_ptr + token * (total * 2 * half)
    a = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(row + column + half, mask=inside, other=0.0).to(tl.float32)
    a += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    b += tl.load(bias_ptr + column + half, mask=inside, other=0.0).to(tl.float32)

    position = tl.load(positions_ptr + token).to(tl.int64)
    entry = table_ptr + position * (2 * half) + 2 * pair
    cos = tl.load(entry)
    sin = tl.load(entry + 1)
    rotates = head < num_heads + num_kv_heads
    first = tl.where(rotates, a * cos - b * sin, a).to(tl.bfloat16)
    second = tl.where(rotates, b * cos + a * sin, b).to(tl.bfloat16)

    is_query = head < num_heads
    out = query_ptr + token * (num_heads * 2 * half) + column
    tl.store(out, first, mask=inside & is_query)
    tl.store(out + half, second, mask=inside & is_query)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    # Heads num_heads … total - 1 are k, then v: the order of the cache's [2, K, D].
    target = cache_ptr + slot * (2 * num_kv_heads * 2 * half) + (head - num_heads) * (2 * half) + pair
    writes = inside & (head >= num_heads) & (slot >= 0)
    tl.store(target, first, mask=writes)
    tl.store(target + half, second, mask=writes)


def rope_kv_write(
    qkv: Tensor,
    bias: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Add the bias, rotate queries and keys, write keys and values to their slots, return the queries.

    Shapes: qkv bfloat16 [T, (Hq + 2 K) D], bias [(Hq + 2 K) D], cos_sin float32 [P, D/2, 2], positions and slots
    integer [T], cache bfloat16 [S, 2, K, D]; returns bfloat16 [T, Hq, D]. A token with a negative slot writes nothing.
    """
    tokens = qkv.shape[0]
    _, _, num_kv_heads, head_dim = cache.shape
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    if out is None:
        out = torch.empty((tokens, num_heads, head_dim), dtype=torch.bfloat16, device=qkv.device)
    if tokens == 0:
        return out
    heads_per_program = 16
    _rope_kernel[(tokens, triton.cdiv(num_heads + 2 * num_kv_heads, heads_per_program))](
        qkv,
        bias,
        cos_sin,
        positions,
        slots,
        out,
        cache,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        half=head_dim // 2,
        heads_per_program=heads_per_program,
        num_warps=2,
    )
    return out


@triton.jit(do_not_specialize=["rows", "max_blocks"])
def _slots_kernel(
    tables_ptr,
    positions_ptr,
    seq_lens_ptr,
    slots_ptr,
    rows,
    max_blocks,
    block_size: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0) * block + tl.arange(0, block)
    inside = row < rows
    position = tl.load(positions_ptr + row, mask=inside, other=0)
    is_real = tl.load(seq_lens_ptr + row, mask=inside, other=0) > 0
    entry = row.to(tl.int64) * max_blocks + position // block_size
    block_id = tl.load(tables_ptr + entry, mask=inside & is_real, other=0)
    slot = tl.where(is_real, block_id * block_size + position % block_size, -1)
    tl.store(slots_ptr + row, slot, mask=inside)


def decode_slots(block_tables: Tensor, positions: Tensor, seq_lens: Tensor, block_size: int, out: Tensor) -> Tensor:
    """Name the slot of each row's current token, -1 for padding rows (seq_len 0).

    Shapes: block_tables int32 [B, M], positions and seq_lens int32 [B], out int32 [B].
    """
    rows = positions.shape[0]
    _slots_kernel[(triton.cdiv(rows, 128),)](
        block_tables,
        positions,
        seq_lens,
        out,
        rows,
        block_tables.shape[1],
        block_size=block_size,
        block=128,
        num_warps=4,
    )
    return out
