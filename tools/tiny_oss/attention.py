"""Attention over packed rows, twice: a dense one that runs anywhere and FlexAttention for CUDA.

Knows: that a token sees only its own document, causally, and in sliding layers only the last `window` keys.
Refuses to know: the model around it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from tools.tiny_oss.model import Attend


def dense_attends(documents: Tensor, window: int) -> tuple[Attend, Attend]:
    """Return full and sliding attention for rows of documents, int64 [B, T], by masked softmax."""
    length = documents.shape[1]
    order = torch.arange(length, device=documents.device)
    distance = order[:, None] - order[None, :]
    same = documents[:, None, :, None] == documents[:, None, None, :]
    full = same & (distance >= 0)
    return _dense(full), _dense(full & (distance < window))


def _dense(visible: Tensor) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~visible, float("-inf"))
        sink = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
        return weights.to(v.dtype) @ v

    return attend


def flex_attends(documents: Tensor, window: int) -> tuple[Attend, Attend]:
    """Return the same two through FlexAttention, which skips blocks that no document crosses (CUDA only)."""
    rows, length = documents.shape

    def full(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (documents[b, i] == documents[b, j])

    def sliding(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < window) & (documents[b, i] == documents[b, j])

    return _flex(full, rows, length, documents), _flex(sliding, rows, length, documents)


@cache
def _compiled_create_block_mask() -> Callable[..., BlockMask]:
    """Compile on first use: without it the whole mask is written out, and importing stays cheap."""
    return torch.compile(create_block_mask)


def _flex(
    visible: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], rows: int, length: int, documents: Tensor
) -> Attend:
    mask = _compiled_create_block_mask()(visible, rows, None, length, length, device=documents.device)

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        out, lse = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, return_lse=True)
        # A sink only adds to the softmax denominator, so it is a factor on the output.
        return out * torch.sigmoid(lse - sinks.view(1, -1, 1)).unsqueeze(-1).to(out.dtype)

    return attend
