"""Sums and joins of tensors among the CPU ranks of one host, through shared memory.

Knows: slabs, stamps, the fixed order of a sum. Refuses to know: which layer asks, other hosts (`engine.comm.gloo`).

The memory is drawn in `engine.comm.ends`. A stage: write own slab → FENCE → stamp := stage → FENCE → ring who sleeps;
wait until every stamp has come to the stage → FENCE → read the others. Ranks are never more than one stage apart, so a
byte compared cyclically is enough; and a buffer is written again two stages later, when every rank has stamped the
stage between and so has read it.

Sums are float32 and in rank order on every rank, whatever their size: all ranks hold the same bits, and so do runs.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.comm.board import NoBoard, Notes
from engine.comm.ends import GROUP_HEADER, GROUP_MAGIC, GROUP_VERSION, GroupEnd, GroupError
from engine.comm.segment import LINE, Segment, Sleeper, fence, wake

# Elements from which it pays that each rank sums one slice and reads the others' sums, instead of summing everything.
SLICED_ELEMENTS = 16 << 10


class Group(Protocol):
    """Ranks that work on the same tokens. All of them call the same methods in the same order."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum x over the ranks; may overwrite x. Shapes and dtype as x."""
        ...

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """Join the ranks' float32 [B, widths[i]] side by side, [B, sum of widths]."""
        ...

    def close(self) -> None: ...


class SharedGroup:
    """One rank's place in a group on its host.

    `timeout_seconds` bounds every wait; `notes` is told of it, so that a rank that waits is not taken for one that
    hangs. `way`: see `engine.comm.edges`.
    """

    way = "SHM/group"

    def __init__(self, end: GroupEnd, *, timeout_seconds: float = 600.0, notes: Notes | None = None) -> None:
        self._segment = Segment(end.segment)
        view = self._view = self._segment.view
        magic, version, size, slot_bytes = GROUP_HEADER.unpack_from(view)
        if magic != GROUP_MAGIC or version != GROUP_VERSION or len(end.bells) != size:
            raise GroupError(f"not a group of {len(end.bells)} ranks: {magic!r}, version {version}, {size} ranks")
        self.rank = end.rank
        self.size: int = size
        self._timeout = timeout_seconds
        self._notes = notes or NoBoard()
        self._bells = end.bells
        self._stamps = [LINE * (1 + i) for i in range(size)]
        self._parked = [LINE * (1 + size + i) for i in range(size)]
        self._stage = view[self._stamps[self.rank]]
        self._sleeper = Sleeper(view, self._parked[self.rank], end.bells[self.rank])
        self._room = slot_bytes // 4
        floats = torch.frombuffer(view, dtype=torch.float32, offset=LINE * (1 + 2 * size))
        slots = floats.view(2 * size + 2, self._room)
        self._slabs = [[slots[2 * i + turn] for i in range(size)] for turn in range(2)]
        self._sums = [slots[2 * size], slots[2 * size + 1]]
        self._turn = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Group.all_reduce`. Raises: GroupError naming the ranks that did not come in time."""
        flat = x.contiguous().view(-1)
        wide = flat if flat.dtype == torch.float32 else flat.float()
        for begin in range(0, len(wide), self._room):
            self._reduce(wide[begin : begin + self._room])
        return (wide if wide.dtype == x.dtype else wide.to(x.dtype)).view(x.shape)

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """See `Group.all_gather`. Raises: GroupError naming the ranks that did not come in time."""
        num_rows = x.shape[0]
        step = self._room // max(widths)
        if not step:
            raise GroupError(f"a row of {max(widths)} numbers is wider than a slot of {self._room}")
        out = torch.empty(num_rows, sum(widths))
        columns = out.split_with_sizes(list(widths), dim=1)
        for begin in range(0, num_rows, step):
            rows = min(step, num_rows - begin)
            slabs = self._slabs[self._turn]
            slabs[self.rank][: rows * widths[self.rank]].view(rows, -1).copy_(x[begin : begin + rows])
            self._meet()
            for column, slab, width in zip(columns, slabs, widths, strict=True):
                if width:
                    column[begin : begin + rows] = slab[: rows * width].view(rows, width)
        return out

    def close(self) -> None:
        """Give the memory back; tensors of it must not be used any more."""
        self._slabs, self._sums = [], []
        self._segment.close()
        for fd in self._bells:
            with contextlib.suppress(OSError):
                os.close(fd)

    def _reduce(self, part: Tensor) -> None:
        count = len(part)
        turn = self._turn
        slabs = [slab[:count] for slab in self._slabs[turn]]
        slabs[self.rank].copy_(part)
        if self.size == 2 or count < SLICED_ELEMENTS:
            self._meet()
            _sum(slabs, part)
            return
        self._meet()
        begin, end = count * self.rank // self.size, count * (self.rank + 1) // self.size
        sums = self._sums[turn]
        _sum([slab[begin:end] for slab in slabs], sums[begin:end])
        # Two stages bring the turn back: the next exchange may write these slabs, which nobody reads after this, while
        # slow ranks still read the sums, which nobody writes before they have come to that exchange.
        self._meet()
        part.copy_(sums[:count])

    def _meet(self) -> None:
        """End a stage: let the others see what was written before, and wait until they have come here too."""
        view, stage = self._view, (self._stage + 1) & 255
        self._stage = stage
        self._turn ^= 1
        self._notes.meets()
        fence()
        view[self._stamps[self.rank]] = stage
        fence()
        for rank, at in enumerate(self._parked):
            if rank != self.rank:
                wake(view, at, self._bells[rank])
        stamps = self._stamps

        def all_came() -> bool:
            return all((view[at] - stage) & 255 < 128 for at in stamps)

        if not all_came():
            self._notes.waits()
            if self._sleeper.wait(all_came, time.monotonic() + self._timeout) is not None:
                late = [rank for rank, at in enumerate(stamps) if (view[at] - stage) & 255 >= 128]
                raise GroupError(f"ranks {late} of the group did not come within {self._timeout:.0f} s")
            self._notes.computes()
        fence()


def _sum(parts: Sequence[Tensor], out: Tensor) -> None:
    torch.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        out.add_(part)
