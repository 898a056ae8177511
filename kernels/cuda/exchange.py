"""What the decode kernels are handed to sum over the ranks of a host inside themselves; see exchange.cuh.

Knows: the layout of `Exchange` and of the mailboxes. Refuses to know: what is summed.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

from kernels.cuda.peers import PeerMemory

MAIL_ROWS = 16
TURN_ROWS = 256
MOST_RANKS = 8


def mail_bytes(num_ranks: int, hidden: int) -> int:
    """Bytes of one rank's mailboxes: two of each sender, for parts of the residual stream and for tokens."""
    return 2 * num_ranks * 8 * (MAIL_ROWS * hidden + 2 * TURN_ROWS)


@cache
def exchange_type(num_ranks: int) -> type[ctypes.Structure]:
    """Give `Exchange` of exchange.cuh for a number of ranks."""

    class ExchangeArguments(ctypes.Structure):
        _fields_ = (
            ("mail", ctypes.c_void_p * num_ranks),
            ("number", ctypes.c_void_p),
            ("turns", ctypes.c_void_p),
            ("rank", ctypes.c_int),
        )

    return ExchangeArguments


class Exchange:
    """A rank's place among the ranks that sum inside their kernels.

    All of them launch the same kernels in the same order. `memory` holds `mail_bytes` of each rank. `first_token` is
    where this rank's rows of lm_head begin.
    """

    def __init__(self, rank: int, memory: PeerMemory, first_token: int, device: torch.device) -> None:
        self.rank, self.num_ranks, self.first_token = rank, len(memory.pointers), first_token
        self._memory = memory
        self._counters = torch.zeros(32 + TURN_ROWS, dtype=torch.int32, device=device)
        mail = (ctypes.c_void_p * self.num_ranks)(*memory.pointers)
        counters = self._counters.data_ptr()
        make: Any = exchange_type(self.num_ranks)
        self.arguments: ctypes.Structure = make(mail, counters, counters + 4 * 32, rank)
