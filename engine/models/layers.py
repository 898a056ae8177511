"""Layers that families share: attention with sinks over the paged cache, and a mixture of experts.

Weights only, and the order of the ops; which kernel runs is the business of `kernels.ops.Ops`, handed in by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.ops import ExpertWeights, Ops, PagedBatch


@dataclass(slots=True)
class Attention:
    """Norm, projections, paged attention, output projection, added to the residual stream.

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

    def forward(self, ops: Ops, x: Tensor, rotation: Tensor, cache: Tensor, batch: PagedBatch) -> Tensor:
        """Run over tokens x [T, H]; writes their keys and values to `cache`, may overwrite x."""
        normed = ops.rms_norm(x, self.norm, self.eps)
        query, kv = ops.qkv_project(normed, self.qkv, self.qkv_bias, rotation, self.num_heads, self.num_kv_heads)
        ops.kv_write(cache, batch.slots, kv)
        attended = ops.paged_attention(query, cache, self.sinks, batch, self.scale)
        return ops.linear_add(attended, self.out, self.out_bias, x)


@dataclass(slots=True)
class MixtureOfExperts:
    """Norm, router, chosen experts, added to the residual stream.

    Shapes: norm [H]; router float32 [E, H].
    """

    norm: Tensor
    router: Tensor
    router_bias: Tensor
    experts: ExpertWeights
    top_k: int
    limit: float
    eps: float

    def forward(self, ops: Ops, x: Tensor) -> Tensor:
        """Run over tokens x [T, H]; may overwrite x."""
        normed = ops.rms_norm(x, self.norm, self.eps)
        return ops.moe_add(normed, self.router, self.router_bias, self.top_k, self.experts, self.limit, x)
