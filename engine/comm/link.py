"""Hidden states from one pipeline stage to the next, on one host: a ring with one reader, tensors in pieces.

Knows: how a tensor is cut and put together. Refuses to know: stages, steps; the receiver knows the shape beforehand.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from engine.comm.board import NoBoard, Notes
from engine.comm.ends import PIECE_BYTES
from engine.comm.ring import RingEnd, RingError, RingReader, RingWriter


class LinkError(Exception):
    """The other stage is gone, or did not come in time."""


class Sender(Protocol):
    """The way to the next stage."""

    def send(self, x: Tensor) -> None: ...

    def close(self) -> None: ...


class Receiver(Protocol):
    """The way from the stage before."""

    def receive(self, x: Tensor) -> None: ...

    def close(self) -> None: ...


class RingSender:
    """Sends contiguous CPU tensors; blocks while the receiver is eight pieces behind."""

    way = "SHM/ring"

    def __init__(self, end: RingEnd, *, timeout_seconds: float = 600.0) -> None:
        self._ring = RingWriter(end)
        self._timeout = timeout_seconds

    def send(self, x: Tensor) -> None:
        """Send a tensor. Raises: LinkError."""
        data = _bytes_of(x)
        try:
            for begin in range(0, len(data), PIECE_BYTES):
                self._ring.write(data[begin : begin + PIECE_BYTES], timeout_seconds=self._timeout)
        except RingError as error:
            raise LinkError(f"the next stage does not read: {error}") from error

    def close(self) -> None:
        self._ring.close()


class RingReceiver:
    """Receives what a RingSender sent, tensor by tensor."""

    way = "SHM/ring"

    def __init__(self, end: RingEnd, *, timeout_seconds: float = 600.0, notes: Notes | None = None) -> None:
        self._ring = RingReader(end)
        self._timeout = timeout_seconds
        self._notes = notes or NoBoard()

    def receive(self, x: Tensor) -> None:
        """Fill a contiguous CPU tensor. Raises: LinkError."""
        data = _bytes_of(x)
        self._notes.meets()
        self._notes.waits()
        try:
            for begin in range(0, len(data), PIECE_BYTES):
                if not self._ring.read_into(data[begin : begin + PIECE_BYTES], self._timeout):
                    raise LinkError(f"the stage before sent nothing for {self._timeout:.0f} s")
        except RingError as error:
            raise LinkError(f"the stage before is gone: {error}") from error
        self._notes.computes()

    def close(self) -> None:
        self._ring.close()


def _bytes_of(x: Tensor) -> memoryview:
    if not x.is_contiguous() or x.device.type != "cpu":
        raise ValueError("a link carries contiguous CPU tensors")
    data: Any = x.view(-1).view(torch.uint8).numpy()
    return memoryview(data)
