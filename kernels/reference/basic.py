"""Norm, linear, embedding, activations: the reference. float32 inside, the input's dtype outside."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Scale rows to unit root mean square, then by `weight`, and cast last.

    Shapes: x [T, H], weight [H] or None for no such factor; returns [T, H].
    Maths: x · rsqrt(mean(x²) + eps) · w, all in float32 (Llama's code casts before multiplying by w; gpt-oss does not).
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide if weight is None else wide * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Add x to the residual stream and norm the sum; returns (normed, new residual), both [T, H]."""
    total = residual + x
    return rms_norm(total, weight, eps), total


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply by weightᵀ and add the bias. Shapes: x [T, N], weight [M, N], bias [M] or None; returns [T, M]."""
    return F.linear(x, weight, bias)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """Return residual + x weightᵀ + bias; `residual` may be overwritten.

    Shapes: x [T, N], weight [M, N], bias [M], residual [T, M].
    """
    return residual.add_(F.linear(x, weight, bias))


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """Project hidden states on the vocabulary. Shapes: x [B, H], weight [V, H]; returns float32 [B, V]."""
    return F.linear(x, weight).float()


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """Look up rows. Shapes: ids int64 [T] within the table, table [V, H]; returns a new [T, H]."""
    return table.index_select(0, ids)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Combine gates [T, 0:I] and ups [T, I:2I] to [T, I]: silu(gate) · up, as in Llama and Qwen."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """Apply GELU in its tanh form to x [T, N]: x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))."""
    return F.gelu(x.float(), approximate="tanh").to(x.dtype)
