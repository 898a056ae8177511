"""MXFP4 (OCP Microscaling): 32 values share one E8M0 scale; 16 bytes of E2M1 nibbles, low nibble first."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
MAX_SCALE = 252  # 253 and 254 overflow bfloat16, 255 is NaN
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def mxfp4_expand(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Expand to values: LUT[nibble] · 2^(scale − 127), exact in float32 and bfloat16 for scales up to 252.

    Shapes: blocks uint8 [E, R, B, 16], scales uint8 [E, R, B]; returns `dtype` [E, R, 32 · B].
    """
    lut = torch.tensor(E2M1, dtype=torch.float32)
    nibbles = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1).flatten(-2)
    # Indexing would widen the indices to 8 bytes first; this takes 4 as they are.
    values = lut.index_select(0, nibbles.flatten().int()).view(nibbles.shape)
    values = torch.ldexp(values, (scales.int() - 127).unsqueeze(-1))
    return values.flatten(-2).to(dtype)


def mxfp4_quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise [..., 32 · B] to (blocks uint8 [..., B, 16], scales uint8 [..., B]).

    Maths: exponent = ⌊log2 max|x|⌋ − 2, round to nearest even, saturate at ±6; an all-zero block has scale 127.
    """
    grouped = values.float().reshape(*values.shape[:-1], -1, BLOCK)
    largest = grouped.abs().amax(-1)
    exponent = torch.where(largest > 0, torch.frexp(largest).exponent - 3, torch.zeros((), dtype=torch.int32))
    exponent = exponent.clamp(-127, MAX_SCALE - 127)
    scaled = torch.ldexp(grouped, -exponent.unsqueeze(-1))
    magnitude = scaled.abs()
    # Borders between neighbours; a tie goes to the even code, so it counts as passed only below an odd code.
    borders = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    code = torch.bucketize(magnitude, borders, right=False)
    tie = (magnitude.unsqueeze(-1) == borders).any(-1)
    code = torch.where(tie & (code % 2 == 1), code + 1, code)
    nibble = (code + 8 * (torch.signbit(scaled) & (code > 0))).to(torch.uint8)
    pairs = nibble.view(*nibble.shape[:-1], BLOCK // 2, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4), (exponent + 127).to(torch.uint8)
