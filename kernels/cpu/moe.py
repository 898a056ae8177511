"""Mixture of experts on expanded float32 weights: three ways, by the number of tokens.

Up to `SINGLE_ROWS` tokens: the chosen experts one after the other, each a matrix-vector product into a kept buffer.
Few tokens and few experts: all experts for all tokens as two products, where the weight of an expert that was not
chosen is zero. Wasteful in arithmetic and still the fastest up to `DENSE_ROWS`: no sorting, no small products.
Else: tokens sorted by expert, one packed product per expert and projection.

Measured per layer of tiny-oss, six layers in turn so that caches see the true working set, µs on 1 / 2 threads:

    tokens     1         2          4          8          16         32         128
    single     33 / 34   66 / 73    193 / 201  428 / 558
    dense      180 / 113 197 / 129  213 / 142  265 / 188  372 / 256  592 / 395  1949 / 1201
    sorted     101 / 97  149 / 166  271 / 231  357 / 406  453 / 458  529 / 524  922 / 869

SwiGLU in fewer calls: with gate weights scaled by 1.702, g · sigmoid(1.702 g) = silu(1.702 g) / 1.702. The division
moves into the down weights, the "+ 1" into the up bias; one clamp with a bound per column limits gates and ups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

from kernels.cpu.packing import MAX_PACKED_BYTES, pack, packed_linear, packed_linear_add
from kernels.experts import ExpertWeights
from kernels.platform import Platform
from kernels.reference import moe as reference

SINGLE_ROWS = 2
DENSE_ROWS = 32
DENSE_MAX_WASTE = 4


@dataclass(slots=True)
class _Prepared:
    """One layer's experts in the layouts below; `low` and `high` bound gates [0:I] and ups [I:2I].

    single: gate_up [H, 2I] per expert, down [I + 1, H] per expert with the bias as last row (met by a constant 1).
    dense: gate_up packed [2·E·I, H], all gates before all ups; down packed [H, E·I].
    packs: per expert, gate_up [2I, H] and down [H, I] packed.
    """

    low: Tensor
    high: Tensor
    gate_up: list[Tensor]
    gate_up_bias: list[Tensor]
    down: list[Tensor]
    gate_up_packs: list[Tensor]
    down_packs: list[Tensor]
    down_biases: list[Tensor]
    down_bias: Tensor
    dense: _Dense | None
    router_t: Tensor
    single: _Single


@dataclass(slots=True)
class _Dense:
    gate_up: Tensor
    gate_up_bias: Tensor
    down: Tensor
    low: Tensor
    high: Tensor


@dataclass(slots=True)
class _Single:
    """One token's buffers: k rows of gate_up, views of their gates and ups, and activations with a constant 1."""

    gate_up: Tensor
    rows: list[Tensor]
    gates: Tensor
    ups: Tensor
    hidden: Tensor
    hidden_rows: list[Tensor]


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
        if x.shape[0] == 1:
            return _single_token(x, ready, router_bias, top_k, residual)
        if x.shape[0] <= SINGLE_ROWS:
            for token, row in zip(x.chunk(x.shape[0]), residual.chunk(x.shape[0]), strict=True):
                _single_token(token, ready, router_bias, top_k, row)
            return residual
        weights, ids = reference.router_topk(x, router, router_bias, top_k)
        if ready.dense is not None and x.shape[0] <= DENSE_ROWS:
            return _dense(x, weights, ids, ready, ready.dense, residual)
        return _sorted(x, weights, ids, ready, residual)

    return moe_add


def _prepare(experts: ExpertWeights, router: Tensor, top_k: int, limit: float) -> _Prepared | None:
    """Make all layouts of one layer's experts; None when they are packed or too large to hold again."""
    if experts.gate_up is None or experts.down is None:
        return None
    if experts.gate_up.nbytes + experts.down.nbytes > MAX_PACKED_BYTES:
        return None
    num_experts, hidden, inter = experts.down.shape
    alpha = reference.SWIGLU_ALPHA
    gates, ups = experts.gate_up.chunk(2, dim=1)
    gate_up = torch.cat((gates * alpha, ups), dim=1)
    gate_bias, up_bias = experts.gate_up_bias.chunk(2, dim=1)
    gate_up_bias = torch.cat((gate_bias * alpha, up_bias + 1), dim=1)
    down = experts.down / alpha
    low = torch.cat((torch.full((inter,), float("-inf")), torch.full((inter,), 1.0 - limit)))
    high = torch.cat((torch.full((inter,), alpha * limit), torch.full((inter,), 1.0 + limit)))
    dense = None
    if num_experts <= DENSE_MAX_WASTE * top_k:
        stacked = gate_up.view(num_experts, 2, inter, hidden).transpose(0, 1).reshape(-1, hidden)
        dense = _Dense(
            gate_up=pack(stacked),
            gate_up_bias=gate_up_bias.view(num_experts, 2, inter).transpose(0, 1).reshape(-1),
            down=pack(down.transpose(0, 1).reshape(hidden, -1)),
            low=low.view(2, 1, inter).expand(2, num_experts, inter).reshape(-1),
            high=high.view(2, 1, inter).expand(2, num_experts, inter).reshape(-1),
        )
    rows = torch.empty(top_k, 2 * inter)
    activations = torch.ones(top_k, inter + 1)
    return _Prepared(
        low=low,
        high=high,
        gate_up=list(gate_up.transpose(1, 2).contiguous()),
        gate_up_bias=list(gate_up_bias),
        down=list(torch.cat((down.transpose(1, 2), experts.down_bias[:, None]), dim=1)),
        gate_up_packs=[pack(weight) for weight in gate_up],
        down_packs=[pack(weight) for weight in down],
        down_biases=list(experts.down_bias),
        down_bias=experts.down_bias,
        dense=dense,
        router_t=router.t().contiguous(),
        single=_Single(
            gate_up=rows,
            rows=list(rows.chunk(top_k)),
            gates=rows[:, :inter],
            ups=rows[:, inter:],
            hidden=activations[:, :inter],
            hidden_rows=list(activations.chunk(top_k)),
        ),
    )


def _single_token(x: Tensor, ready: _Prepared, router_bias: Tensor, top_k: int, residual: Tensor) -> Tensor:
    """One token. Choosing k of a few numbers is quicker in Python than in three tensor calls."""
    scores = torch.addmm(router_bias, x, ready.router_t).tolist()[0]
    # A stable sort: among equal scores the lower id wins.
    chosen = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:top_k]
    best = scores[chosen[0]]
    shares = [math.exp(scores[expert] - best) for expert in chosen]
    total = sum(shares)
    buffers = ready.single
    for expert, row in zip(chosen, buffers.rows, strict=True):
        torch.addmm(ready.gate_up_bias[expert], x, ready.gate_up[expert], out=row)
    torch.clamp(buffers.gate_up, ready.low, ready.high, out=buffers.gate_up)
    torch.mul(F.silu(buffers.gates, inplace=True), buffers.ups, out=buffers.hidden)
    for expert, share, row in zip(chosen, shares, buffers.hidden_rows, strict=True):
        residual.addmm_(row, ready.down[expert], alpha=share / total)
    return residual


def _dense(x: Tensor, weights: Tensor, ids: Tensor, ready: _Prepared, dense: _Dense, residual: Tensor) -> Tensor:
    """All experts for all tokens; weights of zero drop those that were not chosen."""
    num_tokens, num_experts = x.shape[0], ready.down_bias.shape[0]
    shares = torch.zeros(num_tokens, num_experts).scatter_(1, ids, weights)
    gate_up = packed_linear(x, dense.gate_up, dense.gate_up_bias)
    torch.clamp(gate_up, dense.low, dense.high, out=gate_up)
    gates, ups = gate_up.chunk(2, dim=1)
    hidden = F.silu(gates, inplace=True).mul_(ups).view(num_tokens, num_experts, -1)
    scaled = hidden.mul_(shares.unsqueeze(-1)).reshape(num_tokens, -1)
    return packed_linear_add(scaled, dense.down, None, residual).addmm_(shares, ready.down_bias)


def _sorted(x: Tensor, weights: Tensor, ids: Tensor, ready: _Prepared, residual: Tensor) -> Tensor:
    """Tokens in order of their expert; one product per expert, then back to (token, slot) order and summed."""
    num_tokens, top_k = ids.shape
    order = ids.flatten().argsort(stable=True)
    counts = ids.flatten().bincount(minlength=len(ready.gate_up)).tolist()
    rows = x.index_select(0, order.div(top_k, rounding_mode="floor"))
    gate_up = _per_expert(rows, counts, ready.gate_up_packs, ready.gate_up_bias)
    torch.clamp(gate_up, ready.low, ready.high, out=gate_up)
    gates, ups = gate_up.chunk(2, dim=1)
    hidden = F.silu(gates, inplace=True).mul_(ups)
    outputs = _per_expert(hidden, counts, ready.down_packs, ready.down_biases)
    by_slot = torch.empty_like(outputs)
    by_slot[order] = outputs
    return residual.add_(torch.bmm(weights.unsqueeze(1), by_slot.view(num_tokens, top_k, -1)).squeeze(1))


def _per_expert(rows: Tensor, counts: list[int], packs: list[Tensor], biases: list[Tensor]) -> Tensor:
    parts = [
        packed_linear(part, packs[expert], biases[expert])
        for expert, part in enumerate(rows.split_with_sizes(counts))
        if counts[expert]
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]
