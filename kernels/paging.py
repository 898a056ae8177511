"""How a step's rows lie in the paged KV cache: the description that attention ops read.

Slots number the tokens of the whole pool: slot = block id × block size + offset. Block 0 is the null block: nothing is
written there, so slot 0 is a key and a value of zeros, and padding may point at it.

A row's keys are named exactly, slot by slot, from its window's first position to its last: an op that reads only named
slots can never see what another request left in a block.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Prefill:
    """Several query tokens of one row: tokens [token, token + count) of the batch, at positions from `position` on.

    `table` int64 [M] holds the row's blocks from position 0.
    """

    token: int
    count: int
    position: int
    table: Tensor


@dataclass(slots=True)
class PagedBatch:
    """One step's rows, for the layers of one KV group.

    The first `len(decode_positions)` tokens of the batch are the single queries of that many rows; those of `prefills`
    follow. `decode_tables` int64 [B, M] holds their blocks from position 0, padded with block 0; entries below the
    window may name blocks that belong to others by now. `window` counts visible keys, the query included.
    `slots` int64 [T] says where each token's key and value go. `derived` keeps what an op computed from all this, so
    that the layers of a group share it.
    """

    block_size: int
    window: int | None
    slots: Tensor
    decode_positions: list[int]
    decode_tables: Tensor | None
    prefills: list[Prefill]
    derived: dict[str, object] = field(default_factory=dict)

    def first_visible(self, position: int) -> int:
        """Position of the first key that a query at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)


def slots_of(table: Tensor, begin: int, end: int, block_size: int) -> Tensor:
    """Name the slots of positions [begin, end) of the row with block table int64 [M]."""
    positions = torch.arange(begin, end)
    return table[positions // block_size] * block_size + positions % block_size
