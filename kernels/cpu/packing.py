"""Linear layers on weights that are laid out once for a fast product.

Two layouts, the first one that serves:
- FBGEMM, float16 weights under float32 activations and sums. Half the bytes, and bytes are what decoding waits for: a
  640 x 224 product of 4 tokens takes 15 µs from memory, 27 with oneDNN, 42 with MKL. Only taken where float16 holds the
  weights exactly, as it does those of a bfloat16 or MXFP4 checkpoint unless they are tiny.
- oneDNN, float32.

Both are internal to torch: `kernels.platform` tries them before any spec relies on them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.platform import fbgemm_half_works

# Beyond this a second copy costs more memory than its speed is worth; such weights are used as they are.
MAX_PACKED_BYTES = 64 << 20
# Rows that oneDNN lays the weights out for: a layout for 1 is 30 % slower at 16 rows, that for 16 not slower at 1.
PACK_ROWS = 16
# Largest error of a float16 weight, as a share of the matrix's largest: float32 sums err by more than that.
HALF_TOLERANCE = 2.0**-22

Product = Callable[[Tensor], Tensor]


class Packs:
    """Products with packed weights, by identity of the weight tensor, made when first needed."""

    def __init__(self) -> None:
        # The weight itself is kept beside its product: an id is only unique while its object lives.
        self._products: dict[int, tuple[Tensor, Product | None]] = {}

    def get(self, weight: Tensor, bias: Tensor | None) -> Product | None:
        """Give x ↦ x weightᵀ + bias for a float32 weight [M, N], or None when that is too large to hold twice."""
        entry = self._products.get(id(weight))
        if entry is None:
            product = pack(weight, bias) if weight.nbytes <= MAX_PACKED_BYTES else None
            entry = self._products[id(weight)] = (weight, product)
        return entry[1]


def pack(weight: Tensor, bias: Tensor | None) -> Product:
    """Lay a float32 weight [M, N] out and return x ↦ x weightᵀ + bias."""
    if half_is_exact(weight):
        return pack_half(weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def product(x: Tensor) -> Tensor:
        out: Tensor = multiply(x, packed, bias, "none", [], "")
        return out

    return product


def pack_half(weight: Tensor, bias: Tensor | None) -> Product:
    """Lay a weight out in float16; see `half_is_exact`."""
    packed = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), bias)
    multiply = torch.ops.quantized.linear_dynamic_fp16.default

    def product(x: Tensor) -> Tensor:
        out: Tensor = multiply(x, packed)
        return out

    return product


def half_is_exact(weight: Tensor) -> bool:
    """Whether float16 holds a weight as well as float32 sums can tell."""
    error = (weight.half().float() - weight).abs().max()
    return bool(error <= HALF_TOLERANCE * weight.abs().max()) and fbgemm_half_works()
