"""Choose one token per row from float32 logits [B, V], each row by its own options and its own random number.

Every step works row by row along the vocabulary, so a row's token never depends on its neighbours. Order of a row:
penalties, bias, bans; then temperature; min-p, top-k, top-p; then the inverse of the cumulative distribution at one
uniform. Log-probabilities are those of the raw logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.core.plan import FLAG_NAN
from engine.core.request import TokenLogprobs
from engine.sampling.random import uniform
from engine.sampling.row import RowSampling

LOGPROB_FLOOR = -9999.0


@dataclass(slots=True)
class Sampled:
    """Tokens, flags and, when any row asks for them, log-probabilities, in row order."""

    token_ids: list[int]
    flags: list[int]
    logprobs: list[TokenLogprobs | None] | None = None


def sample(logits: Tensor, rows: Sequence[RowSampling]) -> Sampled:
    """Choose a token for each row; `logits` float32 [B, V] may be changed in place. Does not touch the rows.

    A row whose best logit is not finite is flagged; its token is a valid id without meaning.
    """
    best, greedy = logits.max(dim=-1)
    tokens: list[int] = greedy.tolist()
    flags = [0 if math.isfinite(value) else FLAG_NAN for value in best.tolist()]
    if all(row.is_plain_greedy for row in rows):
        return Sampled(tokens, flags)
    logprob_rows = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    # Before the logits change; the chosen ids are filled in below.
    raw = logits[logprob_rows].log_softmax(-1) if logprob_rows else None
    for i, row in enumerate(rows):
        if row.adjusts:
            row.adjust_(logits[i])
            if row.params.is_greedy:
                tokens[i] = int(logits[i].argmax())
    random_rows = [i for i, row in enumerate(rows) if not row.params.is_greedy and not flags[i]]
    if random_rows:
        chosen = _draw(logits[random_rows] if len(random_rows) < len(rows) else logits, [rows[i] for i in random_rows])
        for i, token in zip(random_rows, chosen, strict=True):
            tokens[i] = token
    if raw is None:
        return Sampled(tokens, flags)
    logprobs: list[TokenLogprobs | None] = [None] * len(rows)
    for i, values in zip(logprob_rows, raw, strict=True):
        logprobs[i] = _token_logprobs(values, tokens[i], rows[i].params.logprobs or 0)
    return Sampled(tokens, flags, logprobs)


def _draw(logits: Tensor, rows: Sequence[RowSampling]) -> list[int]:
    """Draw a token per row from its filtered distribution."""
    temperatures = torch.tensor([row.params.temperature for row in rows], dtype=torch.float64)
    uniforms = torch.tensor([uniform(row.seed, row.num_tokens) for row in rows], dtype=torch.float64)
    # Subtracting the maximum first keeps a tiny temperature finite.
    scaled = logits.double()
    scaled = (scaled - scaled.amax(-1, keepdim=True)) / temperatures[:, None]
    tokens = [0] * len(rows)
    plain = [i for i, row in enumerate(rows) if not row.params.has_filters]
    if plain:
        part = scaled[plain] if len(plain) < len(rows) else scaled
        drawn = inverse_cdf(part.softmax(-1), uniforms[plain])
        for i, token in zip(plain, drawn.tolist(), strict=True):
            tokens[i] = token
    filtered = [i for i, row in enumerate(rows) if row.params.has_filters]
    if filtered:
        probabilities, ids = scaled[filtered].softmax(-1).sort(dim=-1, descending=True, stable=True)
        kept = filter_sorted(probabilities, [rows[i].params for i in filtered])
        drawn = ids.gather(1, inverse_cdf(kept, uniforms[filtered])[:, None])[:, 0]
        for i, token in zip(filtered, drawn.tolist(), strict=True):
            tokens[i] = token
    return tokens


def filter_sorted(probabilities: Tensor, params: Sequence[object]) -> Tensor:
    """Zero what min-p, top-k and top-p cut off, in this order. Shapes: float64 [B, V], each row descending.

    top-p keeps the smallest head whose share of what min-p and top-k left reaches p; the first token always stays.
    """
    vocab = probabilities.shape[1]
    limits = torch.tensor([getattr(p, "top_k", 0) or vocab for p in params])[:, None]
    min_ps = torch.tensor([getattr(p, "min_p", 0.0) for p in params], dtype=torch.float64)[:, None]
    top_ps = torch.tensor([getattr(p, "top_p", 1.0) for p in params], dtype=torch.float64)[:, None]
    keep = (torch.arange(vocab) < limits) & (probabilities >= min_ps * probabilities[:, :1])
    kept = probabilities * keep
    before = kept.cumsum(-1) - kept
    total = kept.sum(-1, keepdim=True)
    # p = 1 must keep everything, whatever the sum rounds to.
    return kept * ((before < top_ps * total) | (top_ps >= 1.0))


def inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Give, per row, the first index whose cumulative weight exceeds uniform × total; int64 [B].

    Weights need not sum to one. The index found always has a weight above zero.
    """
    cumulative = probabilities.cumsum(-1)
    targets = uniforms[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    # A product that rounded up to the total would point past the last weight: fall back on that one.
    positive = torch.arange(probabilities.shape[1]) * (probabilities > 0)
    return torch.minimum(index, positive.amax(-1))


def _token_logprobs(values: Tensor, token: int, count: int) -> TokenLogprobs:
    floored = values.clamp(min=LOGPROB_FLOOR).nan_to_num(nan=LOGPROB_FLOOR)
    top = floored.topk(min(count, len(floored))) if count else None
    return TokenLogprobs(
        logprob=float(floored[token]),
        top_ids=top.indices.tolist() if top else [],
        top_logprobs=top.values.tolist() if top else [],
    )
