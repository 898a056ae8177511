"""Mixture of experts on expanded float32 weights: two ways, by the number of tokens.

Up to `SINGLE_ROWS` tokens: each token's experts one after the other. Else: tokens sorted by expert, one product per
expert and projection, `TILE_TOKENS` at a time. A third way, all experts for all tokens with weights of zero, won at 3
to 16 tokens as long as a product cost 15 µs to call; at 5 µs it loses.

One clamp with a bound per column limits gates and ups together; the "+ 1" of the ups sits in their bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu.packing import MAX_PACKED_BYTES, PackedLinear, pack
from kernels.experts import ExpertWeights
from kernels.platform import Platform
from kernels.reference import moe as reference

# Measured: 2 tokens 1.02 ms a step against 1.10, 3 tokens equal, 4 tokens 1.70 against 1.49.
SINGLE_ROWS = 2
# Tokens that are sorted together: these buffers are the largest of a step, seven times as wide as its hidden states and
# more. Measured on prefills of 2,048: as quick as all at once; 128 at a time cost 7 %.
TILE_TOKENS = 1024


@dataclass(slots=True)
class _Single:
    """One token's buffers: k rows of gate_up, and views of their gates and ups."""

    gate_up: Tensor
    gates: Tensor
    ups: Tensor


@dataclass(slots=True)
class _Prepared:
    """One layer's experts: products per expert, biases included; `low` and `high` bound gates [0:I] and ups [I:2I]."""

    low: Tensor
    high: Tensor
    router_transposed: Tensor
    gate_up: list[PackedLinear]
    down: list[PackedLinear]
    single: _Single
    first: int


def create_moe_add(
    _: Platform,
) -> Callable[[Tensor, Tensor, Tensor, int, ExpertWeights, float, Tensor], Tensor]:
    prepared: dict[int, tuple[ExpertWeights, _Prepared | None]] = {}

    def moe_add(
        x: Tensor,
        router: Tensor,
        router_bias: Tensor,
        top_k: int,
        experts: ExpertWeights,
        limit: float,
        residual: Tensor,
    ) -> Tensor:
        entry = prepared.get(id(experts))
        if entry is None:
            entry = prepared[id(experts)] = (experts, _prepare(experts, router, top_k, limit))
        ready = entry[1]
        if ready is None:
            return reference.moe_add(x, router, router_bias, top_k, experts, limit, residual)
        num_tokens = x.shape[0]
        if num_tokens == 1:
            return _single_token(x, ready, router_bias, top_k, residual)
        if num_tokens <= SINGLE_ROWS:
            for token, row in zip(x.chunk(num_tokens), residual.chunk(num_tokens), strict=True):
                _single_token(token, ready, router_bias, top_k, row)
            return residual
        weights, ids = reference.router_topk(x, router, router_bias, top_k)
        if num_tokens <= TILE_TOKENS:
            return _sorted(x, weights, ids, ready, residual)
        for begin in range(0, num_tokens, TILE_TOKENS):
            tile = slice(begin, begin + TILE_TOKENS)
            _sorted(x[tile], weights[tile], ids[tile], ready, residual[tile])
        return residual

    return moe_add


def _prepare(experts: ExpertWeights, router: Tensor, top_k: int, limit: float) -> _Prepared | None:
    """Make all products of one layer's experts; None when the weights are packed or too large to hold again."""
    gate_up, down = experts.gate_up, experts.down
    if gate_up is None or down is None or gate_up.nbytes + down.nbytes > MAX_PACKED_BYTES:
        return None
    inter = down.shape[2]
    bias = experts.gate_up_bias.clone()
    bias[:, inter:] += 1
    low = torch.cat((torch.full((inter,), float("-inf")), torch.full((inter,), 1.0 - limit)))
    high = torch.cat((torch.full((inter,), limit), torch.full((inter,), 1.0 + limit)))
    rows = torch.empty(top_k, 2 * inter)
    return _Prepared(
        low=low,
        high=high,
        router_transposed=router.t().contiguous(),
        gate_up=[pack(weight, b) for weight, b in zip(gate_up, bias, strict=True)],
        down=[pack(weight, b) for weight, b in zip(down, experts.down_bias, strict=True)],
        single=_Single(gate_up=rows, gates=rows[:, :inter], ups=rows[:, inter:]),
        first=experts.first,
    )


def _single_token(x: Tensor, ready: _Prepared, router_bias: Tensor, top_k: int, residual: Tensor) -> Tensor:
    """One token. Choosing k of a few numbers is quicker in Python than in three tensor calls."""
    scores = torch.addmm(router_bias, x, ready.router_transposed).tolist()[0]
    # A stable sort: among equal scores the lower id wins.
    chosen = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:top_k]
    best = scores[chosen[0]]
    shares = [math.exp(scores[expert] - best) for expert in chosen]
    total = sum(shares)
    buffers = ready.single
    if len(ready.gate_up) < len(scores):
        return _single_token_here(x, ready, chosen, [share / total for share in shares], residual)
    torch.cat([ready.gate_up[expert].one(x) for expert in chosen], out=buffers.gate_up)
    torch.clamp(buffers.gate_up, ready.low, ready.high, out=buffers.gate_up)
    hidden = _activate(buffers.gates, buffers.ups).chunk(top_k)
    for expert, share, row in zip(chosen, shares, hidden, strict=True):
        residual.add_(ready.down[expert].one(row), alpha=share / total)
    return residual


def _single_token_here(x: Tensor, ready: _Prepared, chosen: list[int], shares: list[float], residual: Tensor) -> Tensor:
    """One token, where only some of its experts are this rank's."""
    inter = ready.single.gates.shape[1]
    for expert, share in zip(chosen, shares, strict=True):
        index = expert - ready.first
        if 0 <= index < len(ready.gate_up):
            gate_up = torch.clamp(ready.gate_up[index].one(x), ready.low, ready.high)
            hidden = _activate(gate_up[:, :inter], gate_up[:, inter:])
            residual.add_(ready.down[index].one(hidden), alpha=share)
    return residual


def _activate(gates: Tensor, ups: Tensor) -> Tensor:
    """Give g · sigmoid(1.702 g) · u of clamped gates and (shifted) ups."""
    return torch.mul(gates, reference.SWIGLU_ALPHA).sigmoid_().mul_(gates).mul_(ups)


def _sorted(x: Tensor, weights: Tensor, ids: Tensor, ready: _Prepared, residual: Tensor) -> Tensor:
    """Tokens in order of their expert; one product per expert, then back to (token, slot) order and summed."""
    num_tokens, top_k = ids.shape
    order = ids.flatten().argsort(stable=True)
    counts = ids.flatten().bincount(minlength=ready.router_transposed.shape[1]).tolist()
    if len(ready.gate_up) < len(counts):
        return _sorted_here(x, weights, order, counts, ready, residual)
    rows = x.index_select(0, order.div(top_k, rounding_mode="floor"))
    gate_up = _per_expert(rows, counts, ready.gate_up)
    torch.clamp(gate_up, ready.low, ready.high, out=gate_up)
    outputs = _per_expert(_activate(*gate_up.chunk(2, dim=1)), counts, ready.down)
    # Gathering by the inverse order is three times quicker than scattering by the order.
    by_slot = outputs.index_select(0, order.argsort())
    return residual.add_(torch.bmm(weights.unsqueeze(1), by_slot.view(num_tokens, top_k, -1)).squeeze(1))


def _sorted_here(
    x: Tensor, weights: Tensor, order: Tensor, counts: list[int], ready: _Prepared, residual: Tensor
) -> Tensor:
    """As `_sorted`, where only the experts from `first` on are this rank's: their tokens lie together in the order."""
    begin = sum(counts[: ready.first])
    here = counts[ready.first : ready.first + len(ready.gate_up)]
    mine = order[begin : begin + sum(here)]
    if not len(mine):
        return residual
    tokens = mine.div(weights.shape[1], rounding_mode="floor")
    gate_up = _per_expert(x.index_select(0, tokens), here, ready.gate_up)
    torch.clamp(gate_up, ready.low, ready.high, out=gate_up)
    outputs = _per_expert(_activate(*gate_up.chunk(2, dim=1)), here, ready.down)
    return residual.index_add_(0, tokens, outputs.mul_(weights.flatten().index_select(0, mine)[:, None]))


def _per_expert(rows: Tensor, counts: list[int], products: list[PackedLinear]) -> Tensor:
    parts = [products[expert](part) for expert, part in enumerate(rows.split_with_sizes(counts)) if counts[expert]]
    return torch.cat(parts) if len(parts) > 1 else parts[0]
