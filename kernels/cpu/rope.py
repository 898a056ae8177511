"""Queries, keys and values: one product, and one complex multiplication that rotates all heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

from kernels.cpu.packing import Packs
from kernels.platform import Platform


def rotate_(x: Tensor, rotation: Tensor) -> Tensor:
    """See `kernels.reference.rope.rotate_`: a rotation of a pair is a product of complex numbers."""
    torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)).mul_(rotation)
    return x


@dataclass(slots=True)
class _Single:
    """One token's buffer for one weight, and all views of it that a call needs."""

    weight: Tensor
    transposed: Tensor
    out: Tensor
    pairs: Tensor
    query: Tensor
    kv: Tensor


def _single(weight: Tensor, num_heads: int, num_kv_heads: int) -> _Single:
    head_dim = weight.shape[0] // (num_heads + 2 * num_kv_heads)
    out = torch.empty(1, weight.shape[0])
    heads = out.view(1, -1, head_dim)
    pairs = torch.view_as_complex(out.view(1, -1, head_dim // 2, 2)[:, : num_heads + num_kv_heads])
    kv = heads[:, num_heads:].view(1, 2, num_kv_heads, head_dim)
    return _Single(weight, weight.t(), out, pairs, heads[:, :num_heads], kv)


def create_qkv_project(
    _: Platform,
) -> Callable[[Tensor, Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor]]:
    packs = Packs()
    singles: dict[int, _Single] = {}

    def qkv_project(
        x: Tensor, weight: Tensor, bias: Tensor, rotation: Tensor, num_heads: int, num_kv_heads: int
    ) -> tuple[Tensor, Tensor]:
        if x.shape[0] == 1:
            single = singles.get(id(weight))
            if single is None:
                single = singles[id(weight)] = _single(weight, num_heads, num_kv_heads)
            torch.addmm(bias, x, single.transposed, out=single.out)
            single.pairs.mul_(rotation)
            return single.query, single.kv
        product = packs.get(weight, bias)
        qkv = F.linear(x, weight, bias) if product is None else product(x)
        heads = qkv.view(x.shape[0], -1, rotation.shape[2] * 2)
        rotate_(heads[:, : num_heads + num_kv_heads], rotation)
        return heads[:, :num_heads], heads[:, num_heads:].view(x.shape[0], 2, num_kv_heads, -1)

    return qkv_project
