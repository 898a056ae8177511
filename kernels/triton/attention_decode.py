"""Paged attention of single queries: split over keys, merged by the last program to arrive.

Reference: `kernels.reference.attention.attend`. The query heads of one key head (8 in gpt-oss) make the rows of a
tensor-core tile, so every key and value is read once. The sink is the softmax's starting state in split 0: maximum =
sink, sum = 1, value 0. Everything is in base 2, with log2(e) folded into the scale.
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

_LOG2E = 1.4426950408889634
_MIN_TILE = 16  # rows of the smallest tensor-core tile
_TARGET_PROGRAMS = 528  # four per multiprocessor of an H100
_MAX_SPLITS = 64


@triton.jit(do_not_specialize=["max_blocks", "window", "num_splits"])
def _decode_kernel(
    query_ptr,
    cache_ptr,
    tables_ptr,
    seq_lens_ptr,
    sinks_ptr,
    out_ptr,
    partial_ptr,
    state_ptr,
    tickets_ptr,
    max_blocks,
    scale,
    window,
    num_splits,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    tile: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    block_n: tl.constexpr,
    is_split: tl.constexpr,
    stages: tl.constexpr,
):
    log2e: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(seq_lens_ptr + row)
    first = tl.maximum(length - window, 0)
    aligned = first // block_n * block_n
    chunk = tl.cdiv(tl.cdiv(length - aligned, num_splits), block_n) * block_n
    begin = aligned + split * chunk
    end = tl.minimum(begin + chunk, length)

    member = tl.arange(0, tile)
    dim = tl.arange(0, head_dim)
    lane = tl.arange(0, block_n)
    in_group = member < group
    head = kv_head * group + member
    heads: tl.constexpr = num_kv_heads * group
    query_at = (row * heads + head[:, None]) * head_dim + dim[None, :]
    query = tl.load(query_ptr + query_at, mask=in_group[:, None], other=0.0)
    sink = tl.load(sinks_ptr + head, mask=in_group, other=0.0).to(tl.float32) * log2e
    # A finite floor instead of -inf: a split without keys must not make NaN.
    largest = tl.where(split == 0, sink, -1.0e30)
    total = tl.where(split == 0, tl.full([tile], 1.0, tl.float32), tl.zeros([tile], tl.float32))
    acc = tl.zeros([tile, head_dim], tl.float32)
    table = tables_ptr + row * max_blocks
    stride: tl.constexpr = 2 * num_kv_heads * head_dim
    for start in tl.range(begin, end, block_n, num_stages=stages):
        position = start + lane
        visible = (position >= first) & (position < end)
        block_id = tl.load(table + position // block_size, mask=visible, other=0).to(tl.int64)
        slot = block_id * block_size + position % block_size
        base = cache_ptr + slot * stride + kv_head * head_dim
        key = tl.load(base[None, :] + dim[:, None], mask=visible[None, :], other=0.0)
        score = tl.dot(query, key) * scale
        score = tl.where(visible[None, :], score, float("-inf"))
        bigger = tl.maximum(largest, tl.max(score, axis=1))
        shrink = tl.exp2(largest - bigger)
        weight = tl.exp2(score - bigger[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        value = tl.load(base[:, None] + num_kv_heads * head_dim + dim[None, :], mask=visible[:, None], other=0.0)
        acc = tl.dot(weight.to(value.dtype), value, acc * shrink[:, None])
        largest = bigger

    if is_split:
        pair = row * num_kv_heads + kv_head
        part = pair * num_splits + split
        at = member[:, None] * head_dim + dim[None, :]
        tl.store(partial_ptr + part * (tile * head_dim) + at, acc)
        tl.store(state_ptr + part * (2 * tile) + member, largest)
        tl.store(state_ptr + part * (2 * tile) + tile + member, total)
        tl.debug_barrier()
        ticket = tl.atomic_add(tickets_ptr + pair, 1, sem="acq_rel")
        if ticket == num_splits - 1:
            tl.store(tickets_ptr + pair, 0)
            largest = tl.full([tile], -1.0e30, tl.float32)
            total = tl.zeros([tile], tl.float32)
            acc = tl.zeros([tile, head_dim], tl.float32)
            for other in range(num_splits):
                there = pair * num_splits + other
                its_largest = tl.load(state_ptr + there * (2 * tile) + member, cache_modifier=".cg")
                its_total = tl.load(state_ptr + there * (2 * tile) + tile + member, cache_modifier=".cg")
                its_acc = tl.load(partial_ptr + there * (tile * head_dim) + at, cache_modifier=".cg")
                bigger = tl.maximum(largest, its_largest)
                shrink = tl.exp2(largest - bigger)
                its_shrink = tl.exp2(its_largest - bigger)
                total = total * shrink + its_total * its_shrink
                acc = acc * shrink[:, None] + its_acc * its_shrink[:, None]
                largest = bigger
            tl.store(out_ptr + query_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=in_group[:, None])
    else:
        tl.store(out_ptr + query_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=in_group[:, None])


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """What the splits of a row leave for each other. One per stream; the kernel leaves the tickets at zero again."""

    partial: Tensor
    state: Tensor
    tickets: Tensor

    @classmethod
    def allocate(
        cls, rows: int, num_kv_heads: int, head_dim: int, device: torch.device | str, group: int = 8
    ) -> DecodeWorkspace:
        """Make room for any number of rows up to `rows`, at the splits that `choose_splits` gives."""
        tile = max(_MIN_TILE, triton.next_power_of_2(group))
        parts = max(rows_ * num_kv_heads * choose_splits(rows_, num_kv_heads, None) for rows_ in range(1, rows + 1))
        return cls(
            torch.empty(parts * tile * head_dim, dtype=torch.float32, device=device),
            torch.empty(parts * 2 * tile, dtype=torch.float32, device=device),
            torch.zeros(rows * num_kv_heads, dtype=torch.int32, device=device),
        )


def choose_splits(rows: int, num_kv_heads: int, window: int | None) -> int:
    """Split keys so that programs fill the device; a short window is never worth it.

    Past one wave of programs two splits even out the last one (128 rows: 124 against 148 µs unsplit); at just one wave
    none are best (64 rows: 58 against 65 µs).
    """
    if window is not None and window <= 512:
        return 1
    return min(_MAX_SPLITS, _TARGET_PROGRAMS // (rows * num_kv_heads)) or 2


def paged_decode_attention(
    query: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    sinks: Tensor,
    scale: float,
    *,
    block_size: int,
    window: int | None = None,
    workspace: DecodeWorkspace | None = None,
    out: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Attend from one query per row to the row's keys, the current one included.

    Shapes: query bfloat16 [B, Hq, D], cache bfloat16 [S, 2, K, D], block_tables int32 [B, M], seq_lens int32 [B] (0 for
    padding, which reads nothing and gets zeros), sinks [Hq]; returns bfloat16 [B, Hq · D]. `window` counts visible
    keys, the query's own included. Pass a `workspace` where speed matters: without one, each call allocates and clears.
    """
    rows, heads, head_dim = query.shape
    num_kv_heads = cache.shape[2]
    group = heads // num_kv_heads
    if out is None:
        out = torch.empty((rows, heads * head_dim), dtype=query.dtype, device=query.device)
    splits = choose_splits(rows, num_kv_heads, window) if num_splits is None else num_splits
    tile = max(_MIN_TILE, triton.next_power_of_2(group))
    if splits > 1 and workspace is None:
        parts = rows * num_kv_heads * splits
        workspace = DecodeWorkspace(
            torch.empty(parts * tile * head_dim, dtype=torch.float32, device=query.device),
            torch.empty(parts * 2 * tile, dtype=torch.float32, device=query.device),
            torch.zeros(rows * num_kv_heads, dtype=torch.int32, device=query.device),
        )
    spare = out
    _decode_kernel[(rows, num_kv_heads, splits)](
        query,
        cache,
        block_tables,
        seq_lens,
        sinks,
        out,
        spare if workspace is None else workspace.partial,
        spare if workspace is None else workspace.state,
        spare if workspace is None else workspace.tickets,
        block_tables.shape[1],
        scale * _LOG2E,
        1 << 30 if window is None else window,
        splits,
        num_kv_heads=num_kv_heads,
        group=group,
        tile=tile,
        head_dim=head_dim,
        block_size=block_size,
        block_n=64,
        is_split=splits > 1,
        stages=3,
        num_warps=4,
    )
    return out
