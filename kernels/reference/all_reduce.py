"""Twins of the sums over ranks in `kernels/cuda/all_reduce.cu`: all ranks' parts in one place, float32, any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.reference import basic


def all_reduce(parts: Sequence[Tensor]) -> Tensor:
    """Sum the ranks' parts, bf16, in the order of ranks in float32; returns bf16."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.bfloat16()


def all_reduce_add_norm(
    deltas: Sequence[Tensor],
    slot_weights: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Sum each rank's deltas bf16 [T, k, H] over slots, then over ranks; add sum and bias to the residual, norm it.

    Returns the residual stream float32 [T, H] and the normed one bf16. A slot that weighs 0 is not read. What a rank
    gives to the others is bf16.
    """
    total = torch.zeros_like(residual)
    for own in deltas:
        wide = own.float()
        if slot_weights is not None:
            wide = torch.where(slot_weights[..., None] == 0, 0.0, wide * slot_weights[..., None])
        part = wide[:, 0]
        for slot in range(1, wide.shape[1]):
            part = part + wide[:, slot]
        total = total + part.bfloat16().float()
    if bias is not None:
        total = total + bias.float()
    stream = residual + total
    return stream, basic.rms_norm(stream, weight, epsilon).bfloat16()
