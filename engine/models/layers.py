"""Layers that families share: attention with sinks over the paged cache, and a mixture of experts.

Weights only, and the order of the ops; which kernel runs is the business of `kernels.ops.Ops`, handed in by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.comm.group import Group
from kernels.ops import ExpertWeights, Ops, PagedBatch


@dataclass(slots=True)
class Attention:
    """Norm, projections, paged attention, output projection, added to the residual stream.

    With a `group` these are one rank's heads; the ranks' results are summed. Only the first rank's `out_bias` is not 0.
    Shapes: norm [H]; qkv [(Hq + 2 K) D, H], rotation pairs side by side; out [H, Hq D].
    """

    norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    out_bias: Tensor
    sinks: Tensor
    num_heads: int
    num_kv_heads: int
    scale: float
    eps: float
    group: Group | None = None

    def forward(self, ops: Ops, x: Tensor, rotation: Tensor, cache: Tensor, batch: PagedBatch) -> Tensor:
        """Run over tokens x [T, H]; writes their keys and values to `cache`, may overwrite x."""
        if self.num_heads == 0:
            return _join(own_share(x, self.group).add_(self.out_bias), self.group)
        normed = ops.rms_norm(x, self.norm, self.eps)
        query, kv = ops.qkv_project(normed, self.qkv, self.qkv_bias, rotation, self.num_heads, self.num_kv_heads)
        ops.kv_write(cache, batch.slots, kv)
        attended = ops.paged_attention(query, cache, self.sinks, batch, self.scale)
        return _join(ops.linear_add(attended, self.out, self.out_bias, own_share(x, self.group)), self.group)


@dataclass(slots=True)
class MixtureOfExperts:
    """Norm, router, chosen experts, added to the residual stream.

    With a `group` these are one rank's columns of every expert, or its experts; the ranks' results are summed.
    Shapes: norm [H]; router float32 [E, H].
    """

    norm: Tensor
    router: Tensor
    router_bias: Tensor
    experts: ExpertWeights
    top_k: int
    limit: float
    eps: float
    group: Group | None = None

    def forward(self, ops: Ops, x: Tensor) -> Tensor:
        """Run over tokens x [T, H]; may overwrite x."""
        if self.experts.is_empty:
            return _join(own_share(x, self.group), self.group)
        normed = ops.rms_norm(x, self.norm, self.eps)
        share = own_share(x, self.group)
        added = ops.moe_add(normed, self.router, self.router_bias, self.top_k, self.experts, self.limit, share)
        return _join(added, self.group)


def own_share(x: Tensor, group: Group | None) -> Tensor:
    """Give a rank's share of what all ranks hold alike: everything on the first, zeros on the others. May clear x."""
    return x if group is None or group.rank == 0 else x.zero_()


def _join(x: Tensor, group: Group | None) -> Tensor:
    return x if group is None else group.all_reduce(x)
