"""Bytes of a checkpoint to the GPU: several threads read files into pinned buffers, each with a stream of its own.

Knows: files, byte ranges, destinations. Refuses to know: what a tensor is for. Reading from the page cache is bound by
the host's copy into pinned memory, so threads help until the link to the GPU is full.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.device import CopyStream, new_event, pinned_buffer

CHUNK_BYTES = 32 << 20
NUM_BUFFERS = 2  # per thread: one is read into while the other travels
MAX_THREADS = 8


@dataclass(frozen=True, slots=True)
class Copy:
    """One tensor's way: bytes [begin, begin + target.nbytes) of `file` into a contiguous tensor on the GPU."""

    file: Path
    begin: int
    target: Tensor


class _Lane:
    """One thread's stream, pinned buffers and open files."""

    def __init__(self, device: torch.device) -> None:
        self._stream = CopyStream(device)
        self._buffers = [pinned_buffer(CHUNK_BYTES, torch.uint8, device) for _ in range(NUM_BUFFERS)]
        self._arrays: list[Any] = [buffer.numpy() for buffer in self._buffers]
        self._sent = [new_event(device) for _ in range(NUM_BUFFERS)]
        self._turn = 0
        self._files: dict[Path, int] = {}

    def copy(self, file: Path, begin: int, target: Tensor) -> None:
        """Copy `target.nbytes` bytes; returns once they are read, before they have arrived."""
        turn = self._turn = (self._turn + 1) % NUM_BUFFERS
        self._sent[turn].synchronize()
        handle = self._files.get(file)
        if handle is None:
            handle = self._files[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        count = target.numel()
        view = memoryview(self._arrays[turn])[:count]
        done = 0
        while done < count:
            got = os.preadv(handle, [view[done:]], begin + done)
            if not got:
                raise OSError(f"{file}: ends {count - done} bytes too soon")
            done += got
        with self._stream:
            target.copy_(self._buffers[turn][:count], non_blocking=True)
            self._sent[turn].record()

    def close(self) -> None:
        self._stream.synchronize()
        for handle in self._files.values():
            os.close(handle)


def copy_to_gpu(
    copies: Sequence[Copy], device: torch.device, num_threads: int, progress: Callable[[float], None]
) -> None:
    """Carry out all copies; `progress` is called with the fraction of bytes sent. Raises: OSError."""
    if device.type == "cuda":
        # Targets are there by now; what used their memory before must have ended, since lanes do not wait for it.
        torch.cuda.current_stream(device).synchronize()
    pieces: list[tuple[Path, int, Tensor]] = []
    for copy in copies:
        flat = copy.target.view(-1).view(torch.uint8)
        for at in range(0, flat.numel(), CHUNK_BYTES):
            pieces.append((copy.file, copy.begin + at, flat[at : at + CHUNK_BYTES]))
    total = sum(piece[2].numel() for piece in pieces) or 1
    lanes: list[_Lane] = []
    local = threading.local()

    def run(piece: tuple[Path, int, Tensor]) -> int:
        lane: _Lane | None = getattr(local, "lane", None)
        if lane is None:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            lane = local.lane = _Lane(device)
            lanes.append(lane)
        with torch.inference_mode():  # a thread's own state
            lane.copy(*piece)
        return piece[2].numel()

    sent = 0
    try:
        with ThreadPoolExecutor(max(1, min(num_threads, MAX_THREADS)), thread_name_prefix="weights") as pool:
            for done in as_completed([pool.submit(run, piece) for piece in pieces]):
                sent += done.result()
                progress(sent / total)
    finally:
        for lane in lanes:
            lane.close()
