"""What a figure needs to be comparable: the device by its own name, driver, clocks as found, versions, copy bandwidth.

Refuses to know: what is measured. Nothing here changes a setting of the device.
"""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("hlaunch", "torch", "triton", "cupy-cuda13x", "numpy")
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


def describe_device(device: str) -> dict[str, Any]:
    """Describe `cpu` or `cuda:N`: name, what it computes with, driver, clocks as found."""
    if device.startswith("cuda"):
        index = torch.device(device).index or 0
        facts = torch.cuda.get_device_properties(index)
        return {
            "kind": "cuda",
            "name": facts.name,
            "memory_bytes": facts.total_memory,
            "multiprocessors": facts.multi_processor_count,
            **_nvidia_smi(index),
        }
    return {"kind": "cpu", "name": _cpu_name(), "cores": torch.get_num_threads(), "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Give the versions of what computes."""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def copy_bandwidth(device: str, repeats: int = 5) -> float:
    """Measure a copy on the device, read and write counted: bytes per second, the best of `repeats`."""
    size = _COPY_BYTES["cuda" if device.startswith("cuda") else "cpu"]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(repeats + 1):
        if source.is_cuda:
            torch.cuda.synchronize(source.device)
        begin = time.perf_counter()
        target.copy_(source)
        if source.is_cuda:
            torch.cuda.synchronize(source.device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size / best


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _nvidia_smi(index: int) -> dict[str, str]:
    keys = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(keys)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return {key.replace(".", "_"): value for key, value in zip(keys, values, strict=False)}
