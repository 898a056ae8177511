"""Sums over the GPUs of one host by kernels of our own: see all_reduce.cu, and its twin in `kernels/reference`.

Knows: the kernels' arguments and grids, how large a sum they take. Refuses to know: above which size NCCL is faster
(`engine.comm.custom_all_reduce`). Nothing here synchronises: all of it can be captured.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels import build
from kernels.contract import KernelError
from kernels.cuda.launch import Kernel, read_int
from kernels.cuda.peers import PeerMemory

MOST_TOKENS = 512  # of a fused sum: a block each, all of them on the device at once
MOST_BLOCKS = 512
SUM_BLOCKS = 128  # of a plain sum
THREADS = 512
UNIT_BYTES = 16


@cache
def peers_type(num_ranks: int) -> type[ctypes.Structure]:
    """Give `Peers` of all_reduce.cu for a number of ranks."""

    class PeerArguments(ctypes.Structure):
        _fields_ = (("memory", ctypes.c_void_p * num_ranks), ("launches", ctypes.c_void_p), ("rank", ctypes.c_int))

    return PeerArguments


def all_reduce_defines(hidden: int, num_ranks: int, inbox_bytes: int) -> dict[str, int]:
    """Give the macros of a compilation; those of the decode kernels that common.cuh asks for mean nothing here."""
    return {
        "H": hidden,
        "GRID": 1,
        "ROWS": 1,
        "RANKS": num_ranks,
        "MOST_BLOCKS": MOST_BLOCKS,
        "INBOX_BYTES": inbox_bytes,
    }


def all_reduce_bytes(num_ranks: int, inbox_bytes: int) -> int:
    """Bytes that every rank shares with its peers: flags, and two inboxes of each sender."""
    return 2 * num_ranks * (4 * MOST_BLOCKS + inbox_bytes)


class AllReduce:
    """The kernels for one width of the residual stream, over the memory that the ranks share.

    `inbox_bytes` bounds a one-shot sum. All ranks call the same methods with the same shapes in the same order.
    Raises: KernelBuildError.
    """

    def __init__(
        self, hidden: int, rank: int, memory: PeerMemory, inbox_bytes: int, device: torch.device | str = "cuda"
    ) -> None:
        num_ranks = len(memory.pointers)
        module = build.load("all_reduce.cu", all_reduce_defines(hidden, num_ranks, inbox_bytes))
        wanted = read_int(module, "all_reduce_memory_bytes")
        if memory.num_bytes < wanted:
            raise KernelError(f"all-reduce: {memory.num_bytes} bytes are shared, {wanted} are needed")
        self._memory, self._hidden, self._num_ranks = memory, hidden, num_ranks
        self._inbox_bytes = inbox_bytes
        self._launches = torch.zeros(2, dtype=torch.int32, device=device)
        make: Any = peers_type(num_ranks)
        pointers = (ctypes.c_void_p * num_ranks)(*memory.pointers)
        self._peers: ctypes.Structure = make(pointers, self._launches.data_ptr(), rank)

        def kernel(name: str, threads: int = THREADS) -> Kernel:
            return Kernel(module, name, threads, is_dependent=False)

        self._one_shot, self._two_shot = kernel("all_reduce_one_shot"), kernel("all_reduce_two_shot")
        self._add_norm = kernel("all_reduce_add_norm", -(-hidden // 8 // 32) * 32)

    @property
    def token_bytes(self) -> int:
        """What a token's part of the residual stream takes on its way."""
        return 2 * self._hidden

    @property
    def one_shot_bytes(self) -> int:
        """The largest sum that `one_shot` takes."""
        return self._inbox_bytes

    @property
    def two_shot_bytes(self) -> int:
        """The largest sum that `two_shot` takes: an inbox holds two shares of it."""
        return self._inbox_bytes // 2 // UNIT_BYTES * UNIT_BYTES * self._num_ranks

    def takes_tokens(self, num_tokens: int) -> bool:
        """Whether `add_rms_norm` serves a step of so many tokens."""
        return 0 < num_tokens <= MOST_TOKENS and num_tokens * self.token_bytes <= self._inbox_bytes

    def one_shot(self, x: Tensor) -> Tensor:
        """Sum x, contiguous bf16 of a multiple of 8 elements, over the ranks, in place, in the order of ranks."""
        units = _units(x, self._inbox_bytes)
        self._one_shot((_blocks(units), 1, 1), x, units, self._peers)
        return x

    def two_shot(self, x: Tensor) -> Tensor:
        """Do the same in two trips with fewer bytes."""
        units = _units(x, self.two_shot_bytes)
        self._two_shot((_blocks(-(-units // self._num_ranks)), 1, 1), x, units, self._peers)
        return x

    def add_rms_norm(
        self,
        deltas: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        *,
        slot_weights: Tensor | None = None,
        out: Tensor | None = None,
        expert_out: Tensor | None = None,
    ) -> Tensor:
        """Sum deltas over slots and ranks, add the sum and the bias to the residual stream, and norm it.

        Shapes and meaning as `kernels.triton.norm.add_rms_norm`; `takes_tokens` says how many.
        """
        tokens, hidden = residual.shape
        if out is None:
            out = torch.empty((tokens, hidden), dtype=torch.bfloat16, device=residual.device)
        nothing = 0  # a null pointer
        self._add_norm(
            (tokens, 1, 1),
            deltas,
            _pointer(slot_weights),
            deltas.shape[1] if deltas.dim() == 3 else 1,
            _pointer(bias),
            residual,
            weight,
            eps,
            out,
            _pointer(expert_out),
            nothing if expert_out is None else expert_out.shape[1],
            self._peers,
        )
        return out


class _NullPointer(ctypes.Structure):
    _fields_ = (("value", ctypes.c_void_p),)


def _pointer(tensor: Tensor | None) -> Tensor | ctypes.Structure:
    return _NullPointer(None) if tensor is None else tensor


def _units(x: Tensor, most_bytes: int) -> int:
    if x.dtype != torch.bfloat16 or not x.is_contiguous() or x.nbytes % UNIT_BYTES or x.data_ptr() % UNIT_BYTES:
        raise KernelError("all-reduce: contiguous bf16 in units of 16 bytes")
    if x.nbytes > most_bytes:
        raise KernelError(f"all-reduce: {x.nbytes} bytes, at most {most_bytes}")
    return x.nbytes // UNIT_BYTES


def _blocks(units: int) -> int:
    return max(1, min(SUM_BLOCKS, -(-units // THREADS)))
