"""Norm and linear layers on float32."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.cpu.packing import Packs
from kernels.platform import Platform


def create_rms_norm(_: Platform) -> Callable[[Tensor, Tensor | None, float], Tensor]:
    zeros: dict[int, Tensor] = {}

    def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        rows, width = x.shape
        if rows == 1:
            # The norm as a Python number saves three calls, and adding to zeros multiplies by two factors in one.
            norm = torch.linalg.vector_norm(x).item()
            factor = 1.0 / math.sqrt(norm * norm / width + eps)
            if weight is None:
                return x * factor
            zero = zeros.get(width)
            if zero is None:
                zero = zeros[width] = torch.zeros(1, width)
            scaled: Tensor = torch.addcmul(zero, x, weight, value=factor)
            return scaled
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        # rsqrt(n²/H + eps) = √H · rsqrt(n² + eps·H)
        out: Tensor = x * norms.square_().add_(eps * width).rsqrt_().mul_(math.sqrt(width))
        return out if weight is None else out.mul_(weight)

    return rms_norm


def create_linear(_: Platform) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    packs = Packs()

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return packs.get(weight, bias)(x)

    return linear


def create_linear_add(_: Platform) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    packs = Packs()

    def linear_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return residual.add_(packs.get(weight, bias)(x))

    return linear_add


def create_logits(_: Platform) -> Callable[[Tensor, Tensor], Tensor]:
    packs = Packs()

    def logits(x: Tensor, weight: Tensor) -> Tensor:
        return packs.get(weight, None)(x)

    return logits
