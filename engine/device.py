"""Pinned memory, events and streams of a device; on a CPU, where work is done when asked for, ones that never wait."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch
from torch import Tensor

GPU_CAPABILITY = 9  # Hopper: the kernels use its matrix instructions


def default_device() -> str:
    """Name the device to take when none is asked for: the first CUDA GPU that the kernels serve, else the CPU."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability(0)[0] == GPU_CAPABILITY:
        return "cuda:0"
    return "cpu"


def count_gpus() -> int:
    """Count the CUDA devices that this process sees; 0 without CUDA or its driver."""
    return torch.cuda.device_count() if torch.version.cuda is not None else 0


class Event(Protocol):
    """A point in a device's queue."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Any) -> float: ...


class _HostEvent:
    def __init__(self) -> None:
        self._at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _HostEvent) -> float:
        return 1e3 * (end._at - self._at)


def new_event(device: torch.device, *, is_timed: bool = False) -> Event:
    """Make an event; `elapsed_time` in milliseconds needs timed ones."""
    if device.type != "cuda":
        return _HostEvent()
    cuda: Any = torch.cuda  # its classes have no types
    event: Event = cuda.Event(enable_timing=is_timed)
    return event


class CopyStream:
    """A queue of its own for copies; `with stream:` sends them there."""

    def __init__(self, device: torch.device) -> None:
        cuda: Any = torch.cuda
        self._stream: Any = cuda.Stream(device) if device.type == "cuda" else None
        self._entered: Any = None

    def __enter__(self) -> None:
        if self._stream is not None:
            self._entered = torch.cuda.stream(self._stream)
            self._entered.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._entered is not None:
            self._entered.__exit__(*error)

    def synchronize(self) -> None:
        """Wait for all copies sent."""
        if self._stream is not None:
            self._stream.synchronize()


def pinned_buffer(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a host tensor [size] that copies to and from `device` without waiting."""
    return torch.empty(size, dtype=dtype, pin_memory=device.type == "cuda")
