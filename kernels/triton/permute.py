"""The order of activations that the MXFP4 expert kernels read: the maths, in torch, for tests and for the CPU.

A thread of a tensor-core fragment holds K slots {2c, 2c+1, 2c+8, 2c+9} of each 16, where c is its lane modulo 4. The
kernels let lane c load block c of four MXFP4 blocks as they lie in the checkpoint (16 bytes, one scale), and take its
32 values, word by word, as what the tensor core asks of it in eight steps. That is a fixed permutation within each 128
columns; a dot product does not mind, provided that activations come in the same order:

    column 32 c + 8 w + 4 j + i   is read at   16 (2 w + i // 2) + 8 (i % 2) + 2 c + j
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 128


def expert_width(width: int) -> int:
    """Round a row of activations up to whole groups; the added columns are zeros."""
    return -(-width // GROUP) * GROUP


def expert_positions(width: int) -> Tensor:
    """Give the position of each column in the expert order; int64 [width]."""
    column = torch.arange(width)
    low = column % GROUP
    lane, word, high, nibble = low // 32, low // 8 % 4, low // 4 % 2, low % 4
    return column - low + (2 * word + nibble // 2) * 16 + nibble % 2 * 8 + 2 * lane + high


def to_expert_order(x: Tensor) -> Tensor:
    """Permute and pad [T, width] to [T, expert_width(width)]."""
    out = x.new_zeros((x.shape[0], expert_width(x.shape[1])))
    out[:, expert_positions(x.shape[1]).to(x.device)] = x
    return out
