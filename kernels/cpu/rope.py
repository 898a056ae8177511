"""Queries, keys and values: one product, and one complex multiplication that rotates all heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.cpu.packing import Packs
from kernels.platform import Platform


def rotate_(x: Tensor, rotation: Tensor) -> Tensor:
    """See `kernels.reference.rope.rotate_`: a rotation of a pair is a product of complex numbers."""
    torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)).mul_(rotation)
    return x


def create_qkv_project(
    _: Platform,
) -> Callable[[Tensor, Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor]]:
    packs = Packs()

    def qkv_project(
        x: Tensor, weight: Tensor, bias: Tensor, rotation: Tensor, num_heads: int, num_kv_heads: int
    ) -> tuple[Tensor, Tensor]:
        rows, half = x.shape[0], rotation.shape[2]
        qkv = packs.get(weight, bias)(x)
        rotated = num_heads + num_kv_heads
        torch.view_as_complex(qkv.view(rows, -1, half, 2)[:, :rotated]).mul_(rotation)
        heads = qkv.view(rows, -1, 2 * half)
        return heads[:, :num_heads], heads[:, num_heads:].view(rows, 2, num_kv_heads, -1)

    return qkv_project
