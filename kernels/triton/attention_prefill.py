"""Paged attention of many queries per row: prefix and chunk are both read from the cache.

Reference: `kernels.reference.attention.attend`. A program takes `block_q` tokens times the query heads of one key head
as the rows of its tile: keys are shared by the heads, and a window of 128 wastes little. Blocks below the window are
never visited; only blocks that cross a border are masked.
"""

# Device code has no Python types.
# ruff: noqa: ANN001, ANN202, C408
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = 1.4426950408889634


@triton.jit
def _visit(
    acc,
    largest,
    total,
    query,
    cache_ptr,
    table,
    kv_head,
    begin,
    end,
    position,
    scale,
    window,
    key_begin,
    key_end,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    block_n: tl.constexpr,
    is_masked: tl.constexpr,
    stages: tl.constexpr,
):
    """Fold the keys of [begin, end), whole blocks of block_n, into the running softmax."""
    dim = tl.arange(0, head_dim)
    lane = tl.arange(0, block_n)
    stride: tl.constexpr = 2 * num_kv_heads * head_dim
    for start in tl.range(begin, end, block_n, num_stages=stages):
        if block_size % block_n == 0:
            block_id = tl.load(table + start // block_size).to(tl.int64)
            slot = block_id * block_size + start % block_size + lane
        else:
            # Past the row's end the table may be short: its last entry stands in, and the mask hides what it gives.
            near = tl.minimum(start + lane, key_end - 1)
            slot = tl.load(table + near // block_size).to(tl.int64) * block_size + near % block_size
        base = cache_ptr + slot[:, None] * stride + kv_head * head_dim + dim[None, :]
        key = tl.load(base)
        score = tl.dot(query, tl.trans(key))
        if is_masked:
            key_at = (start + lane)[None, :]
            seen = (key_at <= position[:, None]) & (key_at > position[:, None] - window)
            score = tl.where(seen, score, float("-inf"))
        bigger = tl.maximum(largest, tl.max(score, axis=1) * scale)
        weight = tl.exp2(score * scale - bigger[:, None])
        shrink = tl.exp2(largest - bigger)
        total = total * shrink + tl.sum(weight, axis=1)
        acc = acc * shrink[:, None]
        if is_masked:
            # Slots past the row's end, and of blocks given back below the window, hold anything, NaN too, and 0 · NaN
            # would spread.
            written = ((start + lane >= key_begin) & (start + lane < key_end))[:, None]
            value = tl.load(base + num_kv_heads * head_dim, mask=written, other=0.0)
        else:
            value = tl.load(base + num_kv_heads * head_dim)
        acc = tl.dot(weight.to(value.dtype), value, acc)
        largest = bigger
    return acc, largest, total


@triton.jit(do_not_specialize=["num_rows", "max_blocks", "window"])
def _prefill_kernel(
    query_ptr,
    cache_ptr,
    tables_ptr,
    starts_ptr,
    seq_lens_ptr,
    sinks_ptr,
    out_ptr,
    num_rows,
    max_blocks,
    scale,
    window,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    block_q: tl.constexpr,
    block_n: tl.constexpr,
    has_window: tl.constexpr,
    stages: tl.constexpr,
):
    log2e: tl.constexpr = 1.4426950408889634
    # Late tokens have the most keys: start them first.
    index = tl.num_programs(1) - 1 - tl.program_id(1)
    kv_head = tl.program_id(0)
    # Row r owns the tiles from starts[r] // block_q + r on, always enough of them.
    low = 0
    high = num_rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle) // block_q + middle <= index:
            low = middle
        else:
            high = middle
    row = tl.maximum(low, 0)
    row_start = tl.load(starts_ptr + row)
    count = tl.load(starts_ptr + row + 1) - row_start
    first_token = (index - (row_start // block_q + row)) * block_q
    if first_token >= count:
        return
    length = tl.load(seq_lens_ptr + row)
    member = tl.arange(0, block_q * group)
    token = first_token + member // group
    head = kv_head * group + member % group
    dim = tl.arange(0, head_dim)
    heads: tl.constexpr = num_kv_heads * group
    at = ((row_start + token).to(tl.int64) * heads + head)[:, None] * head_dim + dim[None, :]
    inside = (token < count)[:, None]
    query = tl.load(query_ptr + at, mask=inside, other=0.0)

    first_position = length - count + first_token
    # Rows past the count repeat the last token's view, so that nothing is ever masked entirely.
    position = length - count + tl.minimum(token, count - 1)
    end = length - count + tl.minimum(first_token + block_q, count)
    largest = tl.load(sinks_ptr + head).to(tl.float32) * log2e
    total = tl.full([block_q * group], 1.0, tl.float32)
    acc = tl.zeros([block_q * group, head_dim], tl.float32)
    table = tables_ptr + row.to(tl.int64) * max_blocks
    first_key = tl.maximum(first_position - window + 1, 0)
    begin = first_key // block_n * block_n
    if not has_window:
        full_end = (first_position + 1) // block_n * block_n
        acc, largest, total = _visit(
            acc, largest, total, query, cache_ptr, table, kv_head, 0, full_end, position, scale, window, 0, end,
            num_kv_heads, head_dim, block_size, block_n, False, stages,
        )  # fmt: skip
        begin = full_end
    acc, largest, total = _visit(
        acc, largest, total, query, cache_ptr, table, kv_head, begin, end, position, scale, window, first_key, end,
        num_kv_heads, head_dim, block_size, block_n, True, stages,
    )  # fmt: skip
    tl.store(out_ptr + at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


def paged_prefill_attention(
    query: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    sinks: Tensor,
    scale: float,
    *,
    block_size: int,
    window: int | None = None,
    out: Tensor | None = None,
    block_n: int = 64,
    block_m: int = 64,
    num_warps: int = 4,
    stages: int = 3,
) -> Tensor:
    """Attend from each token to its row's keys: causal, within the window, with sinks.

    Shapes: query bfloat16 [T, Hq, D], cache bfloat16 [S, 2, K, D], block_tables int32 [R, M], query_start_loc int32
    [R + 1] (first token of each row in `query`), seq_lens int32 [R] (keys of the row, its new tokens included), sinks
    [Hq]; returns bfloat16 [T, Hq · D]. A row may have one token, or none.
    """
    tokens, heads, head_dim = query.shape
    num_kv_heads = cache.shape[2]
    group = heads // num_kv_heads
    rows = seq_lens.shape[0]
    if out is None:
        out = torch.empty((tokens, heads * head_dim), dtype=query.dtype, device=query.device)
    if tokens == 0:
        return out
    block_q = max(1, block_m // group)
    _prefill_kernel[(num_kv_heads, tokens // block_q + rows)](
        query,
        cache,
        block_tables,
        query_start_loc,
        seq_lens,
        sinks,
        out,
        rows,
        block_tables.shape[1],
        scale * _LOG2E,
        1 << 30 if window is None else window,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        block_size=block_size,
        block_q=block_q,
        block_n=block_n,
        has_window=window is not None,
        stages=stages,
        num_warps=num_warps,
    )
    return out
