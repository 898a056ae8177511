"""Sums, joins and hand-overs among GPU ranks by NCCL, straight from the library that torch brings.

Knows: the dozen functions of NCCL's C interface that a rank needs. Refuses to know: which layer asks, how ranks find
each other (the CPU's group or link carries the one identifier), and torch's process groups with their threads and
streams: every call here goes to the current stream, so that a CUDA graph captures it like any kernel.

NVLink multicast stays off: on shared hosts it can put GPUs out of service.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from engine.comm.edges import ask_nccl
from engine.comm.ends import GroupError
from engine.comm.group import Group
from engine.comm.link import Receiver, Sender

ID_BYTES = 128
_SUM = 0
_TYPES = {torch.int8: 0, torch.uint8: 1, torch.int32: 2, torch.int64: 4, torch.float32: 7, torch.bfloat16: 9}


class NcclError(GroupError):
    """NCCL is missing, or said no."""


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * ID_BYTES),)


@cache
def _library() -> Any:
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    ask_nccl(os.environ)
    try:
        library = ctypes.CDLL("libnccl.so.2")  # loaded with torch
    except OSError as error:
        raise NcclError(f"NCCL is not here: {error}; it comes with torch for CUDA") from error
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.ncclGetErrorString.restype = ctypes.c_char_p
    library.ncclCommInitRank.argtypes = [ctypes.POINTER(pointer), number, _UniqueId, number]
    library.ncclCommDestroy.argtypes = library.ncclCommAbort.argtypes = [pointer]
    library.ncclAllReduce.argtypes = [pointer, pointer, size, number, number, pointer, pointer]
    library.ncclAllGather.argtypes = [pointer, pointer, size, number, pointer, pointer]
    library.ncclSend.argtypes = library.ncclRecv.argtypes = [pointer, size, number, number, pointer, pointer]
    return library


def _check(status: int, what: str) -> None:
    if status:
        message = _library().ncclGetErrorString(status).decode()
        raise NcclError(f"NCCL: {what}: {message}; NCCL_DEBUG=INFO says more")


def new_id() -> bytes:
    """Make the identifier of a communicator; one rank does, and the others are told."""
    unique = _UniqueId()
    _check(_library().ncclGetUniqueId(ctypes.byref(unique)), "get an identifier")
    return bytes(unique.internal)


class NcclCommunicator:
    """One rank's place among `size`; made by all of them at once, on their current devices. Raises: NcclError."""

    def __init__(self, unique_id: bytes, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._library = _library()
        self._handle = ctypes.c_void_p()
        unique = _UniqueId.from_buffer_copy(unique_id)
        _check(
            self._library.ncclCommInitRank(ctypes.byref(self._handle), size, unique, rank),
            f"join {size} ranks as {rank}",
        )

    def all_reduce_(self, x: Tensor) -> Tensor:
        """Sum a contiguous x over the ranks, in place; all ranks get the same bits."""
        at = x.data_ptr()
        status = self._library.ncclAllReduce(at, at, x.numel(), _TYPES[x.dtype], _SUM, self._handle, _stream())
        _check(status, "all-reduce")
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Put contiguous tensors of one shape together: [size, *x.shape], in the order of ranks."""
        out = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        status = self._library.ncclAllGather(
            x.data_ptr(), out.data_ptr(), x.numel(), _TYPES[x.dtype], self._handle, _stream()
        )
        _check(status, "all-gather")
        return out

    def send(self, x: Tensor, peer: int) -> None:
        """Send a contiguous tensor."""
        status = self._library.ncclSend(x.data_ptr(), x.numel(), _TYPES[x.dtype], peer, self._handle, _stream())
        _check(status, f"send to {peer}")

    def receive(self, x: Tensor, peer: int) -> None:
        """Fill a contiguous tensor."""
        status = self._library.ncclRecv(x.data_ptr(), x.numel(), _TYPES[x.dtype], peer, self._handle, _stream())
        _check(status, f"receive from {peer}")

    def close(self) -> None:
        """Leave, without waiting for the others."""
        if self._handle:
            self._library.ncclCommAbort(self._handle)
            self._handle = ctypes.c_void_p()


class NcclGroup:
    """GPU ranks that work on the same tokens; see `engine.comm.group.Group`, on GPU tensors."""

    def __init__(self, communicator: NcclCommunicator) -> None:
        self.communicator = communicator
        self.rank, self.size = communicator.rank, communicator.size

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Group.all_reduce`."""
        return self.communicator.all_reduce_(x.contiguous())

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """See `Group.all_gather`."""
        widest = max(widths)
        own = x if x.shape[1] == widest else torch.nn.functional.pad(x, (0, widest - x.shape[1]))
        parts = self.communicator.all_gather(own.contiguous())
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def close(self) -> None:
        """Leave the group."""
        self.communicator.close()


class NcclSender:
    """The way to the next stage."""

    def __init__(self, communicator: NcclCommunicator) -> None:
        self._communicator = communicator

    def send(self, x: Tensor) -> None:
        """See `engine.comm.link.Sender`, on GPU tensors."""
        self._communicator.send(x, 1)

    def close(self) -> None:
        """Leave the link."""
        self._communicator.close()


class NcclReceiver:
    """The way from the stage before."""

    def __init__(self, communicator: NcclCommunicator) -> None:
        self._communicator = communicator

    def receive(self, x: Tensor) -> None:
        """See `engine.comm.link.Receiver`, on GPU tensors."""
        self._communicator.receive(x, 0)

    def close(self) -> None:
        """Leave the link."""
        self._communicator.close()


def open_group(group: Group) -> NcclGroup:
    """Make the GPUs' group of the ranks that share a CPU group, which carries the identifier."""
    own = new_id() if group.rank == 0 else bytes(ID_BYTES)
    return NcclGroup(NcclCommunicator(share_bytes(group, own)[0], group.rank, group.size))


def open_sender(link: Sender) -> NcclSender:
    """Make the GPUs' way to the next stage beside the CPU's, while the other side calls `open_receiver`."""
    unique = new_id()
    link.send(torch.frombuffer(bytearray(unique), dtype=torch.uint8))
    return NcclSender(NcclCommunicator(unique, 0, 2))


def open_receiver(link: Receiver) -> NcclReceiver:
    """Make the GPUs' way from the stage before beside the CPU's."""
    unique = torch.empty(ID_BYTES, dtype=torch.uint8)
    link.receive(unique)
    return NcclReceiver(NcclCommunicator(bytes(unique.tolist()), 1, 2))


def share_bytes(group: Group, own: bytes) -> list[bytes]:
    """Tell every rank of a CPU group what each has: strings of one length, in the order of ranks."""
    row = torch.tensor([list(own)], dtype=torch.float32)  # a group joins float32, which holds bytes exactly
    joined = group.all_gather(row, [len(own)] * group.size)
    return [bytes(part) for part in joined.view(group.size, -1).int().tolist()]


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


__all__ = [
    "NcclCommunicator",
    "NcclError",
    "NcclGroup",
    "NcclReceiver",
    "NcclSender",
    "open_group",
    "open_receiver",
    "open_sender",
    "share_bytes",
]
