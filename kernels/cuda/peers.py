"""Memory on the GPUs of one host that every rank maps of every other: `cudaMalloc` and IPC handles, no multicast.

Knows: CUDA's runtime, through CuPy. Refuses to know: how handles travel from rank to rank, and what lies in the memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from kernels.contract import KernelError


class PeerMemory:
    """Zeroed memory of this rank on the current device, and, once `open` was called, that of its peers.

    `pointers[r]` is rank r's memory as this process sees it. The memory must outlive every kernel of any rank that uses
    it. Raises: KernelError when the devices cannot reach each other.
    """

    def __init__(self, num_bytes: int) -> None:
        self._runtime: Any = importlib.import_module("cupy").cuda.runtime
        self._own: int = self._runtime.malloc(num_bytes)
        self._runtime.memset(self._own, 0, num_bytes)
        self._runtime.deviceSynchronize()
        self.num_bytes = num_bytes
        self.pointers: tuple[int, ...] = ()
        self._opened: list[int] = []

    @property
    def handle(self) -> bytes:
        """What a peer needs to map this memory."""
        return bytes(self._runtime.ipcGetMemHandle(self._own))

    def open(self, rank: int, handles: Sequence[bytes]) -> None:
        """Map the peers' memory; `handles` are all ranks', this one's at `rank`."""
        pointers = []
        try:
            for peer, handle in enumerate(handles):
                if peer == rank:
                    pointers.append(self._own)
                else:
                    pointers.append(self._runtime.ipcOpenMemHandle(handle))
                    self._opened.append(pointers[-1])
        except self._runtime.CUDARuntimeError as error:
            raise KernelError(f"a GPU cannot map its peer's memory: {error}") from error
        self.pointers = tuple(pointers)

    def close(self) -> None:
        """Unmap the peers' memory and give the own one back; every rank must have stopped using it."""
        for pointer in self._opened:
            self._runtime.ipcCloseMemHandle(pointer)
        self._opened.clear()
        if self._own:
            self._runtime.free(self._own)
            self._own = 0


def can_reach(device: int, peers: Sequence[int]) -> bool:
    """Whether a device may map the memory of others of this host."""
    runtime: Any = importlib.import_module("cupy").cuda.runtime
    return all(peer == device or runtime.deviceCanAccessPeer(device, peer) for peer in peers)
