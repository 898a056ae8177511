"""Mixture of experts on expanded float32 weights: three ways, by the number of tokens.

Up to `SINGLE_ROWS` tokens: the chosen experts one after the other.
Few tokens and few experts: all experts for all tokens as two products, where the weight of an expert that was not
chosen is zero. Wasteful in arithmetic and still the fastest up to `DENSE_ROWS`: no sorting, no small products.
Else: tokens sorted by expert, one product per expert and projection.

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

SINGLE_ROWS = 1
DENSE_ROWS = 16
DENSE_MAX_WASTE = 4


@dataclass(slots=True)
class _Dense:
    """All experts as two products: gate_up [2·E·I, H], all gates before all ups; down [H, E·I], without its bias."""

    gate_up: PackedLinear
    down: PackedLinear
    low: Tensor
    high: Tensor


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
    down_bias: Tensor
    dense: _Dense | None
    single: _Single


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
        if ready.dense is not None and num_tokens <= DENSE_ROWS:
            return _dense(x, weights, ids, ready, ready.dense, residual)
        return _sorted(x, weights, ids, ready, residual)

    return moe_add


def _prepare(experts: ExpertWeights, router: Tensor, top_k: int, limit: float) -> _Prepared | None:
    """Make all products of one layer's experts; None when the weights are packed or too large to hold again."""
    gate_up, down = experts.gate_up, experts.down
    if gate_up is None or down is None or gate_up.nbytes + down.nbytes > MAX_PACKED_BYTES:
        return None
    num_experts, hidden, inter = down.shape
    bias = experts.gate_up_bias.clone()
    bias[:, inter:] += 1
    low = torch.cat((torch.full((inter,), float("-inf")), torch.full((inter,), 1.0 - limit)))
    high = torch.cat((torch.full((inter,), limit), torch.full((inter,), 1.0 + limit)))
    dense = None
    if num_experts <= DENSE_MAX_WASTE * top_k:
        stacked = gate_up.view(num_experts, 2, inter, hidden).transpose(0, 1).reshape(-1, hidden)
        dense = _Dense(
            gate_up=pack(stacked, bias.view(num_experts, 2, inter).transpose(0, 1).reshape(-1)),
            down=pack(down.transpose(0, 1).reshape(hidden, -1), None),
            low=low.view(2, 1, inter).expand(2, num_experts, inter).reshape(-1),
            high=high.view(2, 1, inter).expand(2, num_experts, inter).reshape(-1),
        )
    rows = torch.empty(top_k, 2 * inter)
    return _Prepared(
        low=low,
        high=high,
        router_transposed=router.t().contiguous(),
        gate_up=[pack(weight, b) for weight, b in zip(gate_up, bias, strict=True)],
        down=[pack(weight, b) for weight, b in zip(down, experts.down_bias, strict=True)],
        down_bias=experts.down_bias,
        dense=dense,
        single=_Single(gate_up=rows, gates=rows[:, :inter], ups=rows[:, inter:]),
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
    torch.cat([ready.gate_up[expert].one(x) for expert in chosen], out=buffers.gate_up)
    torch.clamp(buffers.gate_up, ready.low, ready.high, out=buffers.gate_up)
    hidden = _activate(buffers.gates, buffers.ups).chunk(top_k)
    for expert, share, row in zip(chosen, shares, hidden, strict=True):
        residual.add_(ready.down[expert].one(row), alpha=share / total)
    return residual


def _activate(gates: Tensor, ups: Tensor) -> Tensor:
    """Give g · sigmoid(1.702 g) · u of clamped gates and (shifted) ups."""
    return torch.mul(gates, reference.SWIGLU_ALPHA).sigmoid_().mul_(gates).mul_(ups)


def _dense(x: Tensor, weights: Tensor, ids: Tensor, ready: _Prepared, dense: _Dense, residual: Tensor) -> Tensor:
    """All experts for all tokens; weights of zero drop those that were not chosen."""
    num_tokens, num_experts = x.shape[0], ready.down_bias.shape[0]
    shares = torch.zeros(num_tokens, num_experts).scatter_(1, ids, weights)
    gate_up = dense.gate_up(x)
    torch.clamp(gate_up, dense.low, dense.high, out=gate_up)
    hidden = _activate(*gate_up.chunk(2, dim=1)).view(num_tokens, num_experts, -1).mul_(shares.unsqueeze(-1))
    return residual.add_(dense.down(hidden.view(num_tokens, -1))).addmm_(shares, ready.down_bias)


def _sorted(x: Tensor, weights: Tensor, ids: Tensor, ready: _Prepared, residual: Tensor) -> Tensor:
    """Tokens in order of their expert; one product per expert, then back to (token, slot) order and summed."""
    num_tokens, top_k = ids.shape
    order = ids.flatten().argsort(stable=True)
    counts = ids.flatten().bincount(minlength=len(ready.gate_up)).tolist()
    rows = x.index_select(0, order.div(top_k, rounding_mode="floor"))
    gate_up = _per_expert(rows, counts, ready.gate_up)
    torch.clamp(gate_up, ready.low, ready.high, out=gate_up)
    outputs = _per_expert(_activate(*gate_up.chunk(2, dim=1)), counts, ready.down)
    # Gathering by the inverse order is three times quicker than scattering by the order.
    by_slot = outputs.index_select(0, order.argsort())
    return residual.add_(torch.bmm(weights.unsqueeze(1), by_slot.view(num_tokens, top_k, -1)).squeeze(1))


def _per_expert(rows: Tensor, counts: list[int], products: list[PackedLinear]) -> Tensor:
    parts = [products[expert](part) for expert, part in enumerate(rows.split_with_sizes(counts)) if counts[expert]]
    return torch.cat(parts) if len(parts) > 1 else parts[0]
