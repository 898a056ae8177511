"""Norm and linear layers on float32."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

from kernels.cpu.packing import Packs, packed_linear, packed_linear_add
from kernels.platform import Platform


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See `kernels.reference.basic.rms_norm`. One row: the norm as a Python number saves three calls."""
    width = x.shape[1]
    if x.shape[0] == 1:
        norm = torch.linalg.vector_norm(x).item()
        out = x * (1.0 / math.sqrt(norm * norm / width + eps))
    else:
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        # rsqrt(n²/H + eps) = √H · rsqrt(n² + eps·H)
        out = x * norms.square_().add_(eps * width).rsqrt_().mul_(math.sqrt(width))
    return out if weight is None else out.mul_(weight)


def create_linear(_: Platform) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    packs = Packs()

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.shape[0] == 1 or (packed := packs.get(weight)) is None:
            return F.linear(x, weight, bias)
        return packed_linear(x, packed, bias)

    return linear


def create_linear_add(_: Platform) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    packs = Packs()

    def linear_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        if x.shape[0] == 1 or (packed := packs.get(weight)) is None:
            return residual.add_(F.linear(x, weight, bias))
        return packed_linear_add(x, packed, bias, residual)

    return linear_add


def create_logits(_: Platform) -> Callable[[Tensor, Tensor], Tensor]:
    packs = Packs()

    def logits(x: Tensor, weight: Tensor) -> Tensor:
        if x.shape[0] == 1 or (packed := packs.get(weight)) is None:
            return F.linear(x, weight)
        return packed_linear(x, packed, None)

    return logits
