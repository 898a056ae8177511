"""How fast this host reads its memory: a short measurement, kept for later plans.

Measured by libc's `memcmp` over two equal buffers, one pair per core: it only reads, and ctypes lets all cores do so at
once. Takes about a second and 128 MiB a core (at most a quarter of what is free).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path

BUFFER_BYTES = 64 << 20
SECONDS = 0.6


def measure_read_bandwidth(cores: int, available_bytes: int, *, seconds: float = SECONDS) -> float:
    """Measure bytes read per second by `cores` threads together. Blocks for about `seconds`."""
    size = max(1 << 20, min(BUFFER_BYTES, available_bytes // 8 // cores))
    compare = ctypes.CDLL(None).memcmp
    compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    compare.restype = ctypes.c_int
    ready, begin = threading.Barrier(cores + 1), threading.Event()
    rates = [0.0] * cores

    def read(core: int) -> None:
        # Written once, so that every page is real and not the kernel's shared zero page.
        pair = [ctypes.create_string_buffer(b"\x01" * size, size) for _ in range(2)]
        ready.wait()
        begin.wait()
        started = time.perf_counter()
        rounds = 0
        while (passed := time.perf_counter() - started) < seconds:
            compare(pair[0], pair[1], size)
            rounds += 1
        rates[core] = 2 * size * rounds / passed

    threads = [threading.Thread(target=read, args=(core,)) for core in range(cores)]
    for thread in threads:
        thread.start()
    ready.wait()
    begin.set()
    for thread in threads:
        thread.join()
    return sum(rates)


def cache_file(environ: Mapping[str, str], node: str, cpu_name: str, cores: int) -> Path | None:
    """Where the figure of this host, processor and core count is kept; None without a home."""
    base = environ.get("XDG_CACHE_HOME") or (f"{environ['HOME']}/.cache" if environ.get("HOME") else "")
    if not base:
        return None
    key = hashlib.sha256(f"{node}\0{cpu_name}\0{cores}".encode()).hexdigest()[:16]
    return Path(base) / "hlaunch" / f"bandwidth-{key}.json"


def load_bandwidth(path: Path | None) -> float | None:
    """Read a figure that was kept; None when there is none that makes sense."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))["bytes_per_second"] if path is not None else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(value) if isinstance(value, (int, float)) and 1e8 < value < 1e14 else None


def save_bandwidth(path: Path | None, bytes_per_second: float) -> None:
    """Keep a figure. A cache that cannot be written is no error."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"bytes_per_second": round(bytes_per_second)}), encoding="utf-8")
    except OSError:
        return
