"""MXFP4 in plain torch: quantise, pack, expand, and a straight-through version for training.

Knows: 32-value blocks along the last axis, E2M1 nibbles (low nibble first) and one E8M0 scale byte.
Refuses to know: which tensors of a model are quantised; `export.py` decides that.
"""

from __future__ import annotations

import torch

BLOCK = 32
SCALE_BIAS = 127
MAX_SCALE_BYTE = 252
"""Larger scales overflow bf16 on expansion, so readers refuse them."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Halfway points between neighbours of E2M1. At a tie the even code wins, so a value equal to
# midpoint i goes up only if code i+1 is even, that is for odd i.
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def _split_blocks(weight: torch.Tensor) -> torch.Tensor:
    """View [..., K] as float32 blocks [..., K / 32, 32]."""
    return weight.detach().float().reshape(*weight.shape[:-1], -1, BLOCK)


def _block_exponents(blocks: torch.Tensor) -> torch.Tensor:
    """Return floor(log2(max |x|)) - 2 for each block, 0 for an all-zero block, as float32."""
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    # frexp is exact where log2 may round up just below a power of two.
    exponents = torch.frexp(largest).exponent.float() - 1.0 - 2.0
    exponents = exponents.clamp(-SCALE_BIAS, MAX_SCALE_BYTE - SCALE_BIAS)
    return torch.where(largest > 0, exponents, torch.zeros_like(exponents))


def _magnitude_codes(scaled: torch.Tensor) -> torch.Tensor:
    """Round magnitudes to the nearest E2M1 code (ties to even, saturating), as int64 0..7."""
    codes = torch.zeros(scaled.shape, dtype=torch.int64, device=scaled.device)
    for index, midpoint in enumerate(_MIDPOINTS):
        above = scaled >= midpoint if index % 2 else scaled > midpoint
        codes += above
    return codes


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a weight along its last axis into checkpoint form.

    Shapes: weight [..., K], K a multiple of 32; returns uint8 blocks [..., K/32, 16] and scales [..., K/32].
    Raises: ValueError when K is not a multiple of 32 or a value is not finite.
    """
    if weight.shape[-1] % BLOCK:
        raise ValueError(f"last axis {weight.shape[-1]} is not a multiple of {BLOCK}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight holds a value that is not finite")
    blocks = _split_blocks(weight)
    exponents = _block_exponents(blocks)
    codes = _magnitude_codes((blocks * torch.exp2(-exponents)).abs()) | (torch.signbit(blocks).long() << 3)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    scales = (exponents.squeeze(-1) + SCALE_BIAS).to(torch.uint8)
    return packed.to(torch.uint8), scales


def expand(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Expand checkpoint blocks to float32.

    Shapes: blocks uint8 [..., G, 16], scales uint8 [..., G]; returns [..., 32 G].
    Raises: ValueError for a scale above 252.
    """
    if bool((scales > MAX_SCALE_BYTE).any()):
        raise ValueError(f"a scale byte exceeds {MAX_SCALE_BYTE}")
    table = torch.tensor(E2M1 + tuple(-value for value in E2M1), device=blocks.device)
    nibbles = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1).flatten(-2)
    values = table[nibbles.long()]
    return torch.ldexp(values, (scales.to(torch.int32) - SCALE_BIAS).unsqueeze(-1)).flatten(-2)


def fake_quantize(weight: torch.Tensor) -> torch.Tensor:
    """Return the value MXFP4 would store, with the gradient of the identity (straight-through)."""
    blocks = _split_blocks(weight)
    scale = torch.exp2(_block_exponents(blocks))
    scaled = blocks / scale
    magnitude = scaled.abs()
    # The grid is 0.5 apart below 2, 1 apart below 4 and 2 apart up to 6; torch.round ties to even,
    # which agrees with the even code everywhere on this grid.
    step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    rounded = (torch.round(magnitude / step) * step).clamp(max=6.0).copysign(scaled) * scale
    return weight + (rounded.flatten(-2) - weight).detach()
