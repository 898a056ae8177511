"""Rotary embedding with YaRN: the frequency table, and the rotation on adjacent pairs.

Pairs: Hugging Face checkpoints rotate dimension i with i + D/2. Loaders permute the rows of q and k so that the two lie
side by side (`pair_order`); dot products do not notice, and one complex product rotates a whole head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071). `truncate` rounds the ramp's borders to whole dimensions; gpt-oss does not."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    truncate: bool


def pair_order(head_dim: int) -> Tensor:
    """Give the order of rows that puts dimension i beside i + D/2: 0, D/2, 1, D/2 + 1, …; int64 [D]."""
    return torch.arange(head_dim).view(2, head_dim // 2).t().reshape(-1)


def inverse_frequencies(head_dim: int, theta: float, scaling: YarnScaling | None) -> tuple[Tensor, float]:
    """Compute rotation per position for each pair, float32 [D/2], and the factor on cos and sin.

    Float32 throughout, in the order the model's authors compute it: at position 131,071 one ulp of a frequency is
    0.008 rad, so a more precise table would be a different model.
    """
    frequency = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return 1.0 / frequency, 1.0
    low, high = correction_range(head_dim, theta, scaling)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    extrapolated = 1.0 - ramp
    inverse = (1.0 / (scaling.factor * frequency)) * (1 - extrapolated) + (1.0 / frequency) * extrapolated
    return inverse, 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0


def correction_range(head_dim: int, theta: float, scaling: YarnScaling) -> tuple[float, float]:
    """Give the borders of YaRN's ramp, in pairs; 8.092779 and 17.398025 for gpt-oss-20b."""

    def border(rotations: float) -> float:
        length = scaling.original_max_position_embeddings
        return (head_dim * math.log(length / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = border(scaling.beta_fast), border(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high + 0.001 if low == high else high


def rope_table(inverse: Tensor, concentration: float, num_positions: int) -> Tensor:
    """Tabulate cos + i sin, times the concentration: complex64 [P, 1, D/2].

    The angle is the float32 product position × frequency. The middle dimension broadcasts over heads.
    """
    angle = torch.arange(num_positions, dtype=torch.float32)[:, None, None] * inverse
    return torch.complex(angle.cos() * concentration, angle.sin() * concentration)


def rotate_(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate adjacent pairs (a, b) to (a·cos − b·sin, b·cos + a·sin), in place, float32 inside.

    Shapes: x [T, N, D] with pairs side by side, rotation complex64 [T, 1, D/2] (cos + i sin).
    """
    pairs = x.view(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0].float(), pairs[..., 1].float()
    cos, sin = rotation.real, rotation.imag
    pairs.copy_(torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1))
    return x


def qkv_project(
    x: Tensor, weight: Tensor, bias: Tensor, rotation: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor]:
    """Project to queries, keys and values, and rotate the first two.

    Shapes: x [T, H]; weight [(Hq + 2 K) D, H] with rows q, k, v, pairs side by side; rotation complex64 [T, 1, D/2].
    Returns query [T, Hq, D] and kv [T, 2, K, D] (keys, then values): views of one buffer, valid until the next call.
    """
    head_dim = rotation.shape[2] * 2
    qkv = torch.nn.functional.linear(x, weight, bias).view(x.shape[0], -1, head_dim)
    rotate_(qkv[:, : num_heads + num_kv_heads], rotation)
    return qkv[:, :num_heads], qkv[:, num_heads:].view(-1, 2, num_kv_heads, head_dim)
