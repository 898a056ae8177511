"""Linear layers on weights that are laid out once for a fast product.

Two layouts, the first one that serves:
- FBGEMM, float16 weights under float32 activations and sums. Half the bytes, and bytes are what decoding waits for:
  640 x 224 weights times one token take 5 µs, with MKL 6 from cache and 22 from memory; times 16 tokens 18 µs, 30 with
  oneDNN, 52 with MKL. Only taken where float16 holds the weights exactly, as it does those of a bfloat16 or MXFP4
  checkpoint unless they are tiny.
- oneDNN, float32.

All of these are internal to torch, and the quickest is announced to go: `kernels.platform` tries each before its use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor

from kernels.platform import fbgemm_half_works, fbgemm_serial_works

# Beyond this a second copy costs more memory than its speed is worth; such weights are used as they are.
MAX_PACKED_BYTES = 64 << 20
# Multiplications up to which one thread finishes before two have been woken: 16 rows times 640 x 224 weights take 18 µs
# on one thread, 19 on two.
SERIAL_WORK = 4 << 20
# Rows that oneDNN lays the weights out for: a layout for 1 is 30 % slower at 16 rows, that for 16 not slower at 1.
PACK_ROWS = 16
# Largest error of a float16 weight, as a share of the matrix's largest: float32 sums err by more than that.
HALF_TOLERANCE = 2.0**-22
_PIECE = 1 << 18

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """x ↦ x weightᵀ + bias: `one` for a single row x [1, N], `many` for several."""

    one: Product
    many: Product

    def __call__(self, x: Tensor) -> Tensor:
        return self.one(x) if x.shape[0] == 1 else self.many(x)


class Packs:
    """Packed weights by identity of the weight tensor, made when first needed."""

    def __init__(self) -> None:
        # The weight itself is kept beside its product: an id is only unique while its object lives.
        self._packed: dict[int, tuple[Tensor, PackedLinear]] = {}

    def get(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Give the product with a float32 weight [M, N]; one that is too large to hold twice is used as it is."""
        entry = self._packed.get(id(weight))
        if entry is None:
            plain = _plain(weight, bias)
            packed = pack(weight, bias) if weight.nbytes <= MAX_PACKED_BYTES else PackedLinear(plain, plain)
            entry = self._packed[id(weight)] = (weight, packed)
        return entry[1]


def pack(weight: Tensor, bias: Tensor | None) -> PackedLinear:
    """Lay a float32 weight [M, N] out in the best way that serves."""
    if not half_is_exact(weight):
        # Column by column, one row's product reads memory forwards: 22 µs instead of 41 from memory.
        return PackedLinear(_plain(weight.t().contiguous().t(), bias), _onednn(weight, bias))
    if not fbgemm_serial_works():
        return PackedLinear(_plain(weight.t().contiguous().t(), bias), _half_parallel(weight, bias))
    serial_rows = SERIAL_WORK // weight.numel()
    made: dict[bool, Product] = {True: _half_serial(weight, bias)} if serial_rows else {}

    def product(x: Tensor) -> Tensor:
        is_serial = x.shape[0] <= serial_rows or torch.get_num_threads() == 1
        if is_serial not in made:
            made[is_serial] = (_half_serial if is_serial else _half_parallel)(weight, bias)
        return made[is_serial](x)

    return PackedLinear(made.get(True, product), product)


def half_is_exact(weight: Tensor) -> bool:
    """Whether float16 holds a weight as well as float32 sums can tell, and torch can multiply by it."""
    if not fbgemm_half_works():
        return False
    low, high = weight.aminmax()
    bound = HALF_TOLERANCE * max(-float(low), float(high))
    # A piece at a time, in the order of memory: nothing of the weight's own size is made on the way.
    rows = weight if weight.is_contiguous() else weight.t()
    pieces = torch.split(rows, max(1, _PIECE // rows.shape[1]))
    return all(float((piece.half().float() - piece).abs_().max()) <= bound for piece in pieces)


def _plain(weight: Tensor, bias: Tensor | None) -> Product:
    return lambda x: F.linear(x, weight, bias)


def _half_serial(weight: Tensor, bias: Tensor | None) -> Product:
    """FBGEMM's product as a plain torch function: 7 µs less per call than the other, but always one thread."""
    packed = torch.fbgemm_pack_gemm_matrix_fp16(weight.contiguous())
    multiply = torch.fbgemm_linear_fp16_weight_fp32_activation
    return lambda x: multiply(x, packed, bias)


def _half_parallel(weight: Tensor, bias: Tensor | None) -> Product:
    packed = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), bias)
    multiply = torch.ops.quantized.linear_dynamic_fp16.default
    return lambda x: multiply(x, packed)


def _onednn(weight: Tensor, bias: Tensor | None) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x, packed, bias, "none", [], "")
