"""The memory of groups and links, made by an engine before its ranks start, and inherited by them.

Knows: layouts and descriptors. Refuses to know: torch, so that a process may hold ends long before it can use them.

A group's memory:

    header   64 B            magic "HLG1" | version u16 | ranks u16 | slot_bytes u32
    stamps   ranks x 64 B    byte 0 = number of the last stage that rank i has finished, modulo 256
    parked   ranks x 64 B    byte 0 = rank i sleeps
    slabs    ranks x 2 x slot_bytes     what rank i gives, in two buffers that take turns
    sums     2 x slot_bytes             what the ranks summed, each its slice
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from dataclasses import dataclass

from engine.comm.ring import RingEnd, create_ring
from engine.comm.segment import LINE, Segment, new_bell

GROUP_MAGIC = b"HLG1"
GROUP_VERSION = 1
GROUP_HEADER = struct.Struct("<4sHHI")
SLOT_BYTES = 1 << 20
PIECE_BYTES = 512 << 10
"""A link carries tensors in pieces of this size."""


class GroupError(Exception):
    """The group is not what it should be, or a rank of it did not come."""


@dataclass(frozen=True, slots=True)
class GroupEnd:
    """The descriptors of one rank's place in a group, to be inherited by its process."""

    rank: int
    segment: int
    bells: tuple[int, ...]

    @property
    def fds(self) -> tuple[int, ...]:
        return (self.segment, *self.bells)

    def close(self) -> None:
        """Close an end that another process has inherited."""
        for fd in self.fds:
            with contextlib.suppress(OSError):
                os.close(fd)


def create_group(size: int, *, slot_bytes: int = SLOT_BYTES) -> list[GroupEnd]:
    """Make the memory of a group; one end per rank."""
    if size < 2 or slot_bytes % LINE or slot_bytes < LINE:
        raise GroupError(f"{size} ranks and slots of {slot_bytes} bytes make no group")
    segment = Segment.create("hlaunch-group", LINE * (1 + 2 * size) + (2 * size + 2) * slot_bytes)
    GROUP_HEADER.pack_into(segment.view, 0, GROUP_MAGIC, GROUP_VERSION, size, slot_bytes)
    bells = [new_bell() for _ in range(size)]
    ends = [GroupEnd(rank, os.dup(segment.fd), tuple(os.dup(bell) for bell in bells)) for rank in range(size)]
    for bell in bells:
        os.close(bell)
    segment.close()
    return ends


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where ranks that talk over TCP find each other. `listener` is the store's socket on the rank that keeps it."""

    host: str
    port: int
    listener: int = -1

    @property
    def fds(self) -> tuple[int, ...]:
        return (self.listener,) if self.listener >= 0 else ()

    def close(self) -> None:
        """Close what another process has inherited."""
        for fd in self.fds:
            with contextlib.suppress(OSError):
                os.close(fd)


def create_rendezvous(host: str, num_ranks: int) -> list[Rendezvous]:
    """Open the store's socket on a free port of `host`; the first rank will keep it."""
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listener.getsockname()[1]
    return [Rendezvous(host, port, listener.detach()), *(Rendezvous(host, port) for _ in range(1, num_ranks))]


def create_link() -> tuple[RingEnd, RingEnd]:
    """Make the sender's and the receiver's end of a link."""
    # Eight pieces lie in the ring: the next batches of a short pipeline, or a part of a long prefill.
    ours, (theirs,) = create_ring(1, slots=8, slot_bytes=PIECE_BYTES + LINE)
    return ours, theirs
