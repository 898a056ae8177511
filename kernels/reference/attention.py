"""Attention over the paged KV cache, with sinks and a sliding window: the reference, one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.paging import PagedBatch


def kv_write(cache: Tensor, slots: Tensor, kv: Tensor) -> None:
    """Store keys and values of new tokens. Shapes: cache [S, 2, K, D], slots int64 [T], kv [T, 2, K, D]."""
    cache.index_copy_(0, slots, kv.to(cache.dtype))


def copy_slots(cache: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy keys and values from slot source[i] to slot target[i], in place.

    Shapes: cache [S, 2, K, D], source and target int64 [N]. No slot is in both lists, and none is a target
    twice: copies run in any order.
    """
    cache[target] = cache[source]


def attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attend from T queries to L keys, in float32.

    Shapes: query [T, Hq, D], key and value [L, K, D], sinks [Hq], visible bool [T, L]; returns float32 [T, Hq, D].
    Maths: the sink is one more logit per head that joins the softmax and whose column is dropped.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (t.float().repeat_interleave(group, dim=1) for t in (key, value))
    scores = torch.einsum("thd,lhd->htl", query.float(), key) * scale
    scores = scores.masked_fill(~visible, float("-inf"))
    sink = sinks.float()[:, None, None].expand(-1, query.shape[0], 1)
    weights = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
    return torch.einsum("htl,lhd->thd", weights, value)


def paged_attention(query: Tensor, cache: Tensor, sinks: Tensor, batch: PagedBatch, scale: float) -> Tensor:
    """Attend from each token to the keys its row holds, its own included: causal, within the window, with sinks.

    Shapes: query [T, Hq, D], cache [S, 2, K, D], sinks float32 [Hq]; returns [T, Hq · D] in the query's dtype.
    The tokens' own keys and values must have been written. Slots outside a row's visible range are never read.
    """
    out = torch.empty_like(query)
    todo = [
        (row, i, 1, position)
        for i, (row, position) in enumerate(zip(batch.decode_rows, batch.decode_positions, strict=True))
    ]
    todo += [(item.row, item.token, item.count, item.position) for item in batch.prefills]
    for row, token, count, position in todo:
        begin, end = batch.first_visible(position), position + count
        kv = cache.index_select(0, batch.keys(row, begin, end))
        keys = torch.arange(begin, end)
        queries = torch.arange(position, end)[:, None]
        visible = keys <= queries
        if batch.window is not None:
            visible &= keys > queries - batch.window
        rows_out = attend(query[token : token + count], kv[:, 0], kv[:, 1], sinks, visible, scale)
        out[token : token + count] = rows_out.to(out.dtype)
    return out.flatten(1)
