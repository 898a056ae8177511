"""What differs when a rank's device is the CPU: threads and memory."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import psutil
import torch

from engine.process import threads_per_rank

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")


def use_threads(wanted: int) -> int:
    """Set torch's thread count to `wanted`; when 0 to the cores this process may use, less one. Returns the count.

    The one left over is for the process that serves HTTP: threads of a parallel region wait for the last of them, so
    a core that is wanted elsewhere would stop all (measured: 5 ms a step instead of 1).
    """
    count = wanted or threads_per_rank()
    torch.set_num_threads(count)
    return count


def available_memory() -> int:
    """Bytes that this process may still take: the machine's, or what the container's limit leaves if that is less."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
        if limit != "max":
            available = min(available, max(0, int(limit) - int(_CGROUP_USED.read_text())))
    except (OSError, ValueError):
        pass  # no cgroup v2: the machine's own figure stands
    return available


def give_back_freed() -> None:
    """Have the allocator return what was freed: after loading that is a tenth of a small model, in holes.

    Takes milliseconds; does nothing where the C library cannot.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
