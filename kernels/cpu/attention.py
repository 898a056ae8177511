"""Paged attention on float32 queries: gather the named keys, then attend.

One decoding row: two products and a softmax on gathered keys. Slot 0 stands first among them: a key of zeros scores 0,
so a bias with the sink in that column makes the sink join the softmax, and its zero value drops it again.

Several decoding rows: the same for all rows at once, shorter rows padded with slot 0, whose bias hides it. Two batched
products beat torch's fused attention there, on 2 threads 58 µs against 88 at 16 rows of 64 keys; on 1 they are equal.
Rows whose keys would take more than `MAX_GATHERED_BYTES` go one after the other instead: what a call costs is nothing
beside their products, each row's keys stay in cache for them, and the padding to the longest row would be without
bound.

Prefills: torch's fused CPU attention, which returns the log-sum-exp of the scores. The sink is then exact as a factor:
with l = Σ exp(s_j), out = Σ exp(s_j) v_j / (l + exp(sink)) = fused · sigmoid(log l − sink).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.paging import PagedBatch, Prefill
from kernels.platform import Platform

# Queries of a prefill that attend together; keys beyond the last of them are skipped. Measured: 32 to 64 are best, 256
# costs 20 % of a whole prefill of 512 tokens.
QUERY_TILE = 64
# Up to here, one row after the other is quicker than all at once with padding: 11 to 21 µs a row.
SINGLE_ROWS = 4
# Keys and values that several rows gather together, padded; also what `engine.cpu_memory` counts for it. Measured on
# 2 threads, a step of 16 rows: 1 to 8 MiB are equal (3.4 ms at 64 keys, 7.9 at 2,000); without a bound 36 ms at 2,000,
# row by row always 4.7 ms at 64.
MAX_GATHERED_BYTES = 4 << 20
_NEG_INF = float("-inf")


def create_paged_attention(_: Platform) -> Callable[[Tensor, Tensor, Tensor, PagedBatch, float], Tensor]:
    attend_row = _SingleRow()

    def decode(query: Tensor, cache: Tensor, sinks: Tensor, batch: PagedBatch, scale: float) -> Tensor:
        num_rows = query.shape[0]
        if num_rows == 1:
            return attend_row(query, cache, sinks, batch, scale, 0)
        if num_rows > SINGLE_ROWS and _gathered_bytes(cache, batch) <= MAX_GATHERED_BYTES:
            return _decode(query, cache, sinks, batch, scale)
        return torch.cat([attend_row(query[i : i + 1], cache, sinks, batch, scale, i) for i in range(num_rows)])

    def paged_attention(query: Tensor, cache: Tensor, sinks: Tensor, batch: PagedBatch, scale: float) -> Tensor:
        num_decode = len(batch.decode_rows)
        if not batch.prefills:
            return decode(query, cache, sinks, batch, scale)
        out = torch.empty(query.shape[0], query.shape[1] * query.shape[2])
        if num_decode:
            out[:num_decode] = decode(query[:num_decode], cache, sinks, batch, scale)
        for item in batch.prefills:
            rows = query[item.token : item.token + item.count]
            out[item.token : item.token + item.count] = _prefill(rows, cache, sinks, batch, item, scale)
        return out

    return paged_attention


def _gathered_bytes(cache: Tensor, batch: PagedBatch) -> int:
    """Bytes of the keys and values of all decoding rows, in float32, each padded to the longest."""
    longest = max(batch.decode_positions) + 1
    if batch.window is not None:
        longest = min(longest, batch.window)
    return len(batch.decode_positions) * longest * 2 * cache.shape[2] * cache.shape[3] * 4


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attend without sinks; returns the output, as `query`, and the log-sum-exp of each query's scores."""
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )
    return out, log_sum


@dataclass(slots=True)
class _Gathered:
    """One step's key slots for a single row, and views of the buffer they are gathered into."""

    index: Tensor
    count: int
    gathered: Tensor
    keys: Tensor
    values: Tensor


class _SingleRow:
    """Attention of one query token. Keeps the gather buffer, and each layer's bias with the sink in column 0."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)
        self._biases: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(
        self, query: Tensor, cache: Tensor, sinks: Tensor, batch: PagedBatch, scale: float, place: int
    ) -> Tensor:
        """Attend from the decoding row that stands at `place` in the batch; query [1, Hq, D]."""
        plan = batch.derived.get(place)
        if plan is None:
            plan = batch.derived[place] = self._gather_plan(cache, batch, place)
        num_kv_heads, head_dim = cache.shape[2], cache.shape[3]
        if cache.dtype == torch.float32:
            torch.index_select(cache, 0, plan.index, out=plan.gathered)
        else:
            plan.gathered.copy_(cache.index_select(0, plan.index))
        bias = self._bias(sinks, num_kv_heads, plan.count)
        scores = torch.baddbmm(bias, query.view(num_kv_heads, -1, head_dim), plan.keys, alpha=scale)
        return torch.bmm(torch.softmax(scores, -1), plan.values).view(1, -1)

    def _gather_plan(self, cache: Tensor, batch: PagedBatch, place: int) -> _Gathered:
        row, position = batch.decode_rows[place], batch.decode_positions[place]
        begin = batch.first_visible(position)
        index = batch.slot_table[row, : position + 2]
        if begin:
            index = torch.cat((index[:1], index[begin + 1 :]))
        count = position + 2 - begin
        if self._buffer.shape[0] < count or self._buffer.shape[1:] != cache.shape[1:]:
            self._buffer = torch.empty(2 * count, *cache.shape[1:])
        gathered = self._buffer[:count]
        return _Gathered(index, count, gathered, gathered[:, 0].permute(1, 2, 0), gathered[:, 1].transpose(0, 1))

    def _bias(self, sinks: Tensor, num_kv_heads: int, count: int) -> Tensor:
        entry = self._biases.get(id(sinks))
        if entry is None or entry[1].shape[2] < count:
            bias = torch.zeros(num_kv_heads, sinks.shape[0] // num_kv_heads, 2 * count)
            bias[:, :, 0] = sinks.view(num_kv_heads, -1)
            entry = self._biases[id(sinks)] = (sinks, bias)
        return entry[1][:, :, :count]


def _decode(query: Tensor, cache: Tensor, sinks: Tensor, batch: PagedBatch, scale: float) -> Tensor:
    """Attend from one query per row; the query heads that share a key head stand as its query rows."""
    num_rows, num_kv_heads, head_dim = query.shape[0], cache.shape[2], cache.shape[3]
    group = query.shape[1] // num_kv_heads
    plan = batch.derived.get("decode")
    if plan is None:
        plan = batch.derived["decode"] = _decode_plan(batch, num_kv_heads, group)
    index, bias = plan
    bias[..., 0] = sinks.view(num_kv_heads, group)
    kv = cache.index_select(0, index.view(-1)).to(query.dtype).view(num_rows, -1, 2, num_kv_heads, head_dim)
    keys, values = kv.permute(2, 0, 3, 1, 4).reshape(2, num_rows * num_kv_heads, -1, head_dim)
    queries = query.reshape(num_rows * num_kv_heads, group, head_dim)
    scores = torch.baddbmm(bias.flatten(0, 1), queries, keys.transpose(1, 2), alpha=scale)
    return torch.bmm(torch.softmax(scores, -1), values).view(num_rows, -1)


def _decode_plan(batch: PagedBatch, num_kv_heads: int, group: int) -> tuple[Tensor, Tensor]:
    """Name each row's keys, int64 [B, 1 + L] with slot 0 first and as padding; and make the bias [B, K, Hq/K, 1 + L]
    that hides the padding, its column 0 left to the sinks."""
    window = batch.window
    counts = [position + 1 if window is None else min(position + 1, window) for position in batch.decode_positions]
    longest = max(counts)
    steps = torch.arange(longest + 1)
    # Column p + 1 of the table is position p: slot 0, then the last `count` positions of each row.
    skipped = torch.tensor([position + 1 - n for position, n in zip(batch.decode_positions, counts, strict=True)])
    columns = steps + skipped[:, None]
    columns[:, 0] = 0
    bias = torch.zeros(len(counts), num_kv_heads, group, longest + 1)
    if min(counts) < longest:
        hidden = steps > torch.tensor(counts)[:, None]
        columns.masked_fill_(hidden, 0)
        bias.masked_fill_(hidden[:, None, None], _NEG_INF)
    return batch.slot_table[torch.tensor(batch.decode_rows)[:, None], columns], bias


@dataclass(slots=True)
class _Tile:
    """Queries [begin, end) of a prefill, against gathered keys [first, last), with a mask unless all are visible."""

    begin: int
    end: int
    first: int
    last: int
    mask: Tensor | None
    is_causal: bool


def _prefill(query: Tensor, cache: Tensor, sinks: Tensor, batch: PagedBatch, item: Prefill, scale: float) -> Tensor:
    """Attend from a row's several queries, tile by tile."""
    key = f"prefill {item.token}"
    plan = batch.derived.get(key)
    if plan is None:
        plan = batch.derived[key] = _prefill_plan(batch, item)
    index, tiles = plan
    kv = cache.index_select(0, index).to(query.dtype)
    # [L, 2, K, D] -> keys and values [1, K, L, D]
    keys, values = kv.permute(1, 2, 0, 3).unsqueeze(1)
    queries = query.transpose(0, 1).unsqueeze(0)
    out = torch.empty_like(query)
    for tile in tiles:
        part, log_sum = _fused(
            queries[:, :, tile.begin : tile.end],
            keys[:, :, tile.first : tile.last],
            values[:, :, tile.first : tile.last],
            tile.mask,
            scale,
            causal=tile.is_causal,
        )
        factor = torch.sigmoid(log_sum[0] - sinks[:, None])
        torch.mul(part[0].transpose(0, 1), factor.t().unsqueeze(-1), out=out[tile.begin : tile.end])
    return out.flatten(1)


def _prefill_plan(batch: PagedBatch, item: Prefill) -> tuple[Tensor, list[_Tile]]:
    start = batch.first_visible(item.position)
    index = batch.keys(item.row, start, item.position + item.count)
    band = _causal_band(min(QUERY_TILE, item.count), item.position + item.count - start)
    tiles = []
    for begin in range(0, item.count, QUERY_TILE):
        end = min(begin + QUERY_TILE, item.count)
        first_query, last_query = item.position + begin, item.position + end - 1
        first = batch.first_visible(first_query)
        slides = batch.first_visible(last_query) > first
        is_causal = first_query == first and not slides
        mask = None
        if not is_causal:
            num_keys = last_query + 1 - first
            mask = band[band.shape[0] - (end - begin) :, band.shape[1] - num_keys :]
            if slides:
                keys = torch.arange(first, last_query + 1)
                queries = torch.arange(first_query, last_query + 1)[:, None]
                mask = mask.masked_fill(keys <= queries - (batch.window or 0), _NEG_INF)
            mask = mask[None, None]
        tiles.append(_Tile(begin, end, first - start, last_query + 1 - start, mask, is_causal))
    return index, tiles


def _causal_band(num_queries: int, num_keys: int) -> Tensor:
    """Make the mask [num_queries, num_keys] of queries that stand at the last keys: 0 where visible, else -inf.

    Its lower right corner is the mask of fewer queries against fewer keys, so that all tiles share one.
    """
    return torch.full((num_queries, num_keys), _NEG_INF).triu_(num_keys - num_queries + 1)
