"""The GPU's fused kernels by their float32 twins, on a CPU: `kernels.gpu` for tests of everything above it.

Same names, arguments and layouts as the door; slow, and right by the references that the kernels are held against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.comm.group import Group
from kernels.contract import KernelError as KernelBuildError
from kernels.cuda.decode import BATCH_SIZES, LARGEST_SCALE, DecodeShape, DecodeState, LayerWeights
from kernels.cuda.layers import LayerCall, LayerPlan
from kernels.reference import basic, decode, moe
from kernels.reference.attention import attend
from kernels.reference.mxfp4 import mxfp4_expand

__all__ = [
    "BATCH_SIZES",
    "LARGEST_SCALE",
    "DecodeShape",
    "DecodeState",
    "KernelBuildError",
    "LayerCall",
    "LayerPlan",
    "LayerWeights",
]
FUSED_TOKENS = 24  # a step of so many is summed and added in one go; more take the plain sum


def expert_width(width: int) -> int:
    return -(-width // 128) * 128


def widening_linear(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    wide = x.float() @ weight.float().t()
    return wide if out is None else out.copy_(wide)


def prepare_scales(scales: Tensor) -> Tensor:
    return scales  # the twin of run_experts reads them as they are


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None, expert_out: Any = None) -> Tensor:
    normed = basic.rms_norm(x, weight, eps).bfloat16()
    if expert_out is not None:
        expert_out.zero_()
        expert_out[:, : x.shape[1]] = normed
    return normed if out is None else out.copy_(normed)


def add_rms_norm(
    deltas: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, eps: float, *,
    slot_weights: Tensor | None = None, out: Tensor | None = None, expert_out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    deltas = deltas.float()
    if deltas.dim() == 3:
        deltas = (deltas * (1.0 if slot_weights is None else slot_weights[..., None])).sum(1)
    residual += deltas + (0.0 if bias is None else bias.float())
    return rms_norm(residual, weight, eps, out=out, expert_out=expert_out)


def decode_slots(tables: Tensor, positions: Tensor, seq_lens: Tensor, block_size: int, out: Tensor) -> Tensor:
    at = positions.long()
    blocks = tables.gather(1, (at // block_size)[:, None])[:, 0]
    return out.copy_(torch.where(seq_lens > 0, blocks * block_size + positions % block_size, -1))


def rope_kv_write(
    qkv: Tensor, bias: Tensor, cos_sin: Tensor, positions: Tensor, slots: Tensor, cache: Tensor
) -> Tensor:
    kv_heads, dim = cache.shape[2:]
    heads = (qkv.float() + bias.float()).view(len(qkv), -1, dim)
    cos, sin = cos_sin[positions.long()].unsqueeze(1).unbind(-1)
    first, second = heads[:, :-kv_heads].chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    real = slots >= 0
    where = slots[real].long()
    cache[where, 0] = turned[real, -kv_heads:].to(cache.dtype)
    cache[where, 1] = heads[real, -kv_heads:].to(cache.dtype)
    return turned[:, :-kv_heads].bfloat16()


@dataclass
class DecodeWorkspace:
    @classmethod
    def allocate(cls, *_: object) -> DecodeWorkspace:
        return cls()


SampleWorkspace = DecodeWorkspace


def paged_decode_attention(
    query: Tensor, cache: Tensor, tables: Tensor, lens: Tensor, sinks: Tensor, scale: float, *,
    block_size: int, window: int | None = None, workspace: object = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    done = decode.paged_decode_attention(query.float(), cache, sinks, lens, tables, block_size, window, scale)
    return done.bfloat16() if out is None else out.copy_(done)


def paged_prefill_attention(
    query: Tensor, cache: Tensor, tables: Tensor, starts: Tensor, lens: Tensor, sinks: Tensor, scale: float, *,
    block_size: int, window: int | None = None, out: Tensor,
) -> Tensor:  # fmt: skip
    for row, length in enumerate(lens.tolist()):
        begin, end = int(starts[row]), int(starts[row + 1])
        kv = cache[decode.cache_slots(tables, row, 0, length, block_size)]
        at = torch.arange(length)
        mine = torch.arange(length - (end - begin), length)[:, None]
        visible = (at <= mine) & (at > mine - (window or 1 << 30))
        out[begin:end] = attend(query[begin:end], kv[:, 0], kv[:, 1], sinks, visible, scale).flatten(1).to(out.dtype)
    return out


def router_topk(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, *, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    shares, ids = moe.router_topk(x, weight, bias, k)
    if real is not None:
        shares, ids = shares.masked_fill(real[:, None] == 0, 0.0), ids.masked_fill(real[:, None] == 0, -1)
    return ids.int(), shares


def expert_index(ids: Tensor, _: int) -> Tensor:
    return ids


def run_experts(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up: Any, down: Any, limit: float, *, act: Any = None, out: Any = None
) -> tuple[Tensor, Tensor | None]:
    hidden = gate_up[0].shape[2] * 32
    result = torch.zeros(*ids.shape, down[0].shape[1])
    for expert in {int(e) for e in ids.flatten() if e >= 0}:
        token, slot = torch.where(ids == expert)
        wide = mxfp4_expand(gate_up[0][expert : expert + 1], gate_up[1][expert : expert + 1], torch.float32)[0]
        back = mxfp4_expand(down[0][expert : expert + 1], down[1][expert : expert + 1], torch.float32)[0]
        both = x[token, :hidden].float() @ wide.T + gate_up[2][expert].float()
        inner = moe.swiglu(torch.cat((both[:, 0::2], both[:, 1::2]), 1), limit)
        result[token, slot] = weights[token, slot, None] * (inner @ back.T + down[2][expert].float())
    return result, None


def sampling_thresholds(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    from kernels.triton import reference_sampling

    return reference_sampling.sampling_thresholds(logits, temperature, top_k, top_p, min_p)


def sample(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    thresholds: Any = None,
    workspace: Any = None,
) -> tuple[Tensor, Tensor]:
    from kernels.triton import reference_sampling

    return reference_sampling.sample(logits, temperature, seeds, positions, thresholds=thresholds)


def sum_slots(deltas: Tensor, slot_weights: Tensor | None = None) -> Tensor:
    wide = deltas.float() if slot_weights is None else deltas.float() * slot_weights[..., None]
    return wide.sum(1).bfloat16()


class Exchange:
    """What kernels are handed to sum inside themselves: here the hosts' group, which sums in the order of ranks too."""

    def __init__(self, group: Group, vocab_rows: tuple[int, ...]) -> None:
        self.num_ranks, self.group, self.vocab_rows = group.size, group, vocab_rows


class TwinGroup:
    """A `DeviceGroup` whose devices are their hosts."""

    def __init__(self, group: Group, vocab_rows: tuple[int, ...], *, has_exchange: bool = True) -> None:
        self.rank, self.size, self._group = group.rank, group.size, group
        self.exchange = Exchange(group, vocab_rows) if has_exchange else None
        self.all_gather = group.all_gather

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._group.all_reduce(x)

    def close(self) -> None:
        self._group.close()

    def takes_tokens(self, num_tokens: int) -> bool:
        return self.exchange is not None and num_tokens <= FUSED_TOKENS

    def add_rms_norm(self, deltas: Tensor, *tensors: Any, slot_weights: Tensor | None = None, **outs: Any) -> Tensor:
        if deltas.dim() == 3:
            deltas = sum_slots(deltas, slot_weights)
        return add_rms_norm(self._group.all_reduce(deltas), *tensors, **outs)


class TokenExchange:
    def __init__(self, shape: DecodeShape, most_rows: int, exchange: Exchange, device: object) -> None:
        self._exchange = exchange
        self.tokens = torch.zeros(most_rows, dtype=torch.int32)

    def sample_advance(self, state: DecodeState, logits: Tensor) -> None:
        sample_advance(state, logits, self.tokens, self._exchange)


def sample_advance(state: DecodeState, logits: Tensor, tokens: Tensor, exchange: Exchange | None) -> None:
    if exchange is not None:
        logits = exchange.group.all_gather(logits, exchange.vocab_rows)
    rows = slice(0, len(logits))
    ids, bad = sample(logits, state.temperatures[rows], state.seeds[rows], state.positions[rows])
    tokens[rows] = torch.where(bad > 0, -1, ids)
    real = (state.seq_lens[rows] > 0).int()
    state.input_ids[rows] = ids
    state.positions[rows] += real
    state.seq_lens[rows] += real


class DecodeKernels:
    """The decode kernels of one batch size."""

    def __init__(self, shape: DecodeShape, rows: int, device: object, *, exchange: Exchange | None = None) -> None:
        self._exchange = exchange
        self.shape, self.rows = shape, rows
        self.logits = torch.zeros(rows, shape.vocab)
        self.residual = torch.zeros(rows, shape.hidden)
        self.tokens = torch.zeros(rows, dtype=torch.int32)
        self._ids = torch.zeros(rows, shape.top_k, dtype=torch.int32)

    @property
    def has_layers(self) -> bool:
        return self.rows <= 2

    def plan_layers(self, calls: list[LayerCall]) -> LayerPlan:
        return LayerPlan.create(calls, 1, "cpu")

    def run_layers(self, state: DecodeState, plan: LayerPlan) -> None:
        for i, call in enumerate(plan.calls):
            self.norm_qkv_rope(state, call.weights, call.cache, call.table)
            self.paged_decode_attention(state, call.weights.sinks, call.cache, call.table, call.window)
            self.out_proj_add(call.weights)
            self.norm_router_topk(state, call.weights)
            plan.active_experts[i] = self.active_experts()
            self.moe_gate_up(call.weights)
            self.moe_down_add(state, call.weights, call.next_norm)

    def active_experts(self) -> Tensor:
        return torch.unique(self._ids[self._ids >= 0]).numel() * torch.ones((), dtype=torch.int32)

    def embed(self, state: DecodeState, table: Tensor, norm: Tensor) -> None:
        self.residual, self._norm = table[state.input_ids[: self.rows].long()].float(), norm

    def take_over(self, stream: Tensor, norm: Tensor) -> None:
        self.residual, self._norm = stream.clone(), norm

    def _sum(self, part: Tensor) -> Tensor:
        return part if self._exchange is None else self._exchange.group.all_reduce(part)

    def norm_qkv_rope(self, state: DecodeState, weights: LayerWeights, cache: Tensor, table: Tensor) -> None:
        self._query = decode.norm_qkv_rope(
            self.residual, weights.input_norm, weights.qkv, weights.qkv_bias, self.shape.epsilon, state.rotations,
            state.positions[: self.rows], state.seq_lens[: self.rows], table, self.shape.block_size, cache,
        )  # fmt: skip

    def paged_decode_attention(
        self, state: DecodeState, sinks: Tensor, cache: Tensor, table: Tensor, window: int | None
    ) -> None:
        shape = self.shape
        self._attended = decode.paged_decode_attention(
            self._query, cache, sinks, state.seq_lens[: self.rows], table, shape.block_size, window,
            shape.head_dim**-0.5,
        )  # fmt: skip

    def out_proj_add(self, weights: LayerWeights) -> None:
        nothing = torch.zeros_like(weights.out_bias)
        part = decode.out_proj_add(self._attended, weights.out, nothing, torch.zeros_like(self.residual))
        self.residual = self.residual + self._sum(part) + weights.out_bias.float()

    def norm_router_topk(self, state: DecodeState, weights: LayerWeights) -> None:
        self._ids, self._shares = decode.norm_router_topk(
            self.residual, weights.post_norm, weights.router, weights.router_bias, self.shape.epsilon, self.shape.top_k,
            state.seq_lens[: self.rows],
        )  # fmt: skip
        self._post_norm = weights.post_norm

    def moe_gate_up(self, weights: LayerWeights) -> None:
        self._act = decode.moe_gate_up(
            self.residual, self._post_norm, self.shape.epsilon, self._ids, weights.gate_up_blocks,
            weights.gate_up_scales, weights.gate_up_bias, self.shape.swiglu_limit,
        )  # fmt: skip

    def moe_down_add(self, state: DecodeState, weights: LayerWeights, next_norm: Tensor) -> None:
        part = decode.moe_down_add(
            self._act, self._ids, self._shares, weights.down_blocks, weights.down_scales, weights.down_bias,
            torch.zeros_like(self.residual),
        )  # fmt: skip
        self.residual = self.residual + self._sum(part)
        self._norm = next_norm

    def norm_logits(self, lm_head: Tensor) -> None:
        self.logits.copy_(decode.norm_logits(self.residual, self._norm, lm_head, self.shape.epsilon))

    def sample_advance(self, state: DecodeState) -> None:
        sample_advance(state, self.logits, self.tokens, self._exchange)
