"""How a step's rows lie in the paged KV cache: the description that attention ops read.

Slots number the tokens of the whole pool: slot = block id × block size + offset. Block 0 is the null block: nothing is
written there, so slot 0 holds a key and a value of zeros, and padding may point at it.

A row's block table is kept expanded to slots, one per position, so that an op names exactly the keys it reads: from the
window's first position to the query's own. What another request left in a block is never read, not even to be masked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Prefill:
    """Several query tokens of one row: tokens [token, token + count) of the batch, at positions from `position` on."""

    row: int
    token: int
    count: int
    position: int


@dataclass(slots=True)
class PagedBatch:
    """One step's rows, for the layers of one KV group.

    The first `len(decode_rows)` tokens of the batch are the single queries of those rows, at `decode_positions`; the
    tokens of `prefills` follow. `window` counts visible keys, the query included; None sees all.
    `slot_table` int64 [R, C]: column 0 holds slot 0, column p + 1 the slot of position p; entries below the window may
    name slots that belong to others by now. `slots` int64 [T] says where each token's key and value go.
    `derived` keeps what an op computed from all this, so that the layers of a group share it.
    """

    window: int | None
    slot_table: Tensor
    slots: Tensor
    decode_rows: list[int]
    decode_positions: list[int]
    prefills: list[Prefill]
    derived: dict[str | int, Any] = field(default_factory=dict)

    def first_visible(self, position: int) -> int:
        """Give the position of the first key that a query at `position` sees."""
        return 0 if self.window is None else max(0, position - self.window + 1)

    def keys(self, row: int, begin: int, end: int) -> Tensor:
        """Name the slots of a row's positions [begin, end): a view, int64 [end - begin]."""
        return self.slot_table[row, begin + 1 : end + 1]
