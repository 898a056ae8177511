"""What differs when a rank's device is the CPU: threads and memory."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import psutil
import torch

from engine.cpu_memory import mapped_bytes
from engine.process import threads_per_rank

# Options of glibc's `mallopt`. What was freed at the top of the heap stays: the next step takes it again.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_MAX_INT = (1 << 31) - 1
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


def settle_allocator(hidden_size: int) -> None:
    """Have this process's C library keep one heap, map what is large by itself, and hold on to what was freed.

    Left alone, glibc gives each thread that allocates heaps of 64 MiB, and learns to cut buffers of up to 32 MiB out of
    them: a step's buffers then left holes of a tenth of a small engine, which no plan can foresee.
    To be called before threads allocate; does nothing where the C library cannot.
    """
    options = ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, mapped_bytes(hidden_size)), (_TRIM_THRESHOLD, _MAX_INT))
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in options:
            mallopt(option, value)


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


def resident_memory() -> int:
    """Bytes of this process that are in memory, files that it has mapped included."""
    return int(psutil.Process().memory_info().rss)


def give_back_freed() -> None:
    """Have the allocator return what was freed: after loading that is a tenth of a small model, in holes.

    Takes milliseconds; does nothing where the C library cannot.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
