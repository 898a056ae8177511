"""E2M1 to bfloat16 by shifts: the inner step of every kernel that reads MXFP4.

A nibble s·ee·m, put at bit 15 (s) and bits 8..6 (ee, m) of a bfloat16, reads as its value times 2^-126; a denormal code
(ee = 0) lands on a bfloat16 denormal and stays exact, provided that the product is taken in bfloat16: float32 units may
flush denormals. The block scale 2^(e - 127) brings the 2^126 along, as the bfloat16 with exponent field e + 126, which
holds for e <= 128; no trained checkpoint comes near, and `folds` says so for one.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

MAX_FOLDED_SCALE = 128

# In: two halfwords of codes (pack = 2), their scale twice. Out: nibble 0, 1, 2, 3 of both halfwords, times the scale.
UNPACK = tl.constexpr("""
{
.reg .b32 m0, m1, m2, m3, t;
shl.b32 t, $4, 12; and.b32 t, t, 0x80008000; shl.b32 m0, $4, 6; and.b32 m0, m0, 0x01C001C0; or.b32 m0, m0, t;
shl.b32 t, $4, 8; and.b32 t, t, 0x80008000; shl.b32 m1, $4, 2; and.b32 m1, m1, 0x01C001C0; or.b32 m1, m1, t;
shl.b32 t, $4, 4; and.b32 t, t, 0x80008000; shr.b32 m2, $4, 2; and.b32 m2, m2, 0x01C001C0; or.b32 m2, m2, t;
and.b32 t, $4, 0x80008000; shr.b32 m3, $4, 6; and.b32 m3, m3, 0x01C001C0; or.b32 m3, m3, t;
mul.bf16x2 $0, m0, $5; mul.bf16x2 $1, m1, $5; mul.bf16x2 $2, m2, $5; mul.bf16x2 $3, m3, $5;
}
""")


def folds(scales: Tensor) -> bool:
    """Say whether all scales of a layer suit the kernels. Waits for the device: call it at load."""
    return int(scales.max()) <= MAX_FOLDED_SCALE
