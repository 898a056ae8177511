"""Sums, joins and hand-overs of CPU ranks over TCP, by Gloo: between hosts, and as the baseline on one.

Knows: Gloo's process groups, made without torch's global ones; the one address that everything binds to. Refuses to
know: which layer asks. On one host `engine.comm.group` does the same an order of magnitude faster.

Sums gather all parts and add them in rank order, as shared memory does: the bits are the same over either, and do not
depend on what else is in the tensor, which Gloo's own sums (pieces of a ring, each begun at another rank) would.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from engine.comm.board import NoBoard, Notes
from engine.comm.ends import GroupError, Rendezvous
from engine.comm.link import LinkError

DEFAULT_TIMEOUT_SECONDS = 600.0
_TAG = 7
# The classes of torch.distributed that stand below its global groups have no types.
_DIST: Any = torch.distributed


def open_store(rendezvous: Rendezvous, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> Any:
    """Reach the store at which ranks find each other; the rank that holds the listening socket keeps it."""
    is_keeper = rendezvous.listener >= 0
    return _DIST.TCPStore(
        rendezvous.host,
        rendezvous.port,
        is_master=is_keeper,
        timeout=timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        master_listen_fd=rendezvous.listener if is_keeper else None,
    )


def open_gloo(
    store: Any, name: str, rank: int, size: int, host: str, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
) -> Any:
    """Make a process group whose sockets are bound to `host`, this node's own address. Blocks until all have come."""
    options = _DIST.ProcessGroupGloo._Options()
    options._devices = [_DIST.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=timeout_seconds)
    return _DIST.ProcessGroupGloo(_DIST.PrefixStore(name, store), rank, size, options)


class GlooGroup:
    """One rank's place in a group that may span hosts; see `engine.comm.group.Group`."""

    way = "NET/Gloo"

    def __init__(self, gloo: Any, rank: int, size: int, notes: Notes | None = None) -> None:
        self.rank = rank
        self.size = size
        self._gloo = gloo
        self._notes = notes or NoBoard()

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Group.all_reduce`. Raises: GroupError."""
        parts = self._gather(x.contiguous().float())
        total = torch.add(parts[0], parts[1])
        for part in parts[2:]:
            total.add_(part)
        return total if total.dtype == x.dtype else total.to(x.dtype)

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """See `Group.all_gather`. Raises: GroupError."""
        padded = x.new_zeros(x.shape[0], max(widths))
        padded[:, : x.shape[1]] = x
        parts = self._gather(padded)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def close(self) -> None:
        """Leave the group."""
        self._gloo = None

    def _gather(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._notes.meets()
        self._notes.waits()
        try:
            self._gloo.allgather([parts], [x]).wait()
        except RuntimeError as error:
            raise GroupError(f"a rank of the group is gone: {str(error).splitlines()[0]}") from error
        self._notes.computes()
        return parts


class GlooSender:
    """The way to the next stage, rank `peer` of a process group."""

    way = "NET/Gloo"

    def __init__(self, gloo: Any, peer: int) -> None:
        self._gloo = gloo
        self._peer = peer

    def send(self, x: Tensor) -> None:
        """Send a tensor. Raises: LinkError."""
        try:
            self._gloo.send([x], self._peer, _TAG).wait()
        except RuntimeError as error:
            raise LinkError(f"the next stage is gone: {str(error).splitlines()[0]}") from error

    def close(self) -> None:
        """Leave the group."""
        self._gloo = None


class GlooReceiver:
    """The way from the stage before, rank `peer` of a process group."""

    way = "NET/Gloo"

    def __init__(self, gloo: Any, peer: int, notes: Notes | None = None) -> None:
        self._gloo = gloo
        self._peer = peer
        self._notes = notes or NoBoard()

    def receive(self, x: Tensor) -> None:
        """Fill a tensor. Raises: LinkError."""
        self._notes.meets()
        self._notes.waits()
        try:
            self._gloo.recv([x], self._peer, _TAG).wait()
        except RuntimeError as error:
            raise LinkError(f"the stage before is gone: {str(error).splitlines()[0]}") from error
        self._notes.computes()

    def close(self) -> None:
        """Leave the group."""
        self._gloo = None
