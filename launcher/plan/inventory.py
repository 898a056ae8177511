"""What this machine has: cores, memory within its cgroup, GPUs. Read under a root, so that a fixture tree tests it.

Knows: procfs, sysfs, cgroup v1 and v2. Refuses to know: torch, CUDA, what a model needs. Nothing here blocks or
starts anything; what cannot be read counts as absent.
"""

from __future__ import annotations

import math
import os
import socket
from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT = 1 << 60
"""cgroup v1 says "no limit" with a number near 2^63."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as the driver's files show it; `memory_bytes` is 0 when only the vendor's library could tell."""

    index: int
    name: str
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Inventory:
    """One machine. Units: bytes. `memory_available_bytes` already respects cgroup limits."""

    node: str
    cpu_name: str
    cpu_cores: int
    numa_nodes: int
    memory_total_bytes: int
    memory_available_bytes: int
    gpus: tuple[Gpu, ...] = ()


def read_inventory(root: Path = Path("/")) -> Inventory:
    """Read the machine under `root`; `/` is this one."""
    total, available = _meminfo(root)
    limit, used = _cgroup_memory(root)
    if limit < total:
        total = limit
        available = min(available, max(0, limit - used))
    return Inventory(
        node=socket.gethostname(),
        cpu_name=_cpu_name(root),
        cpu_cores=_cpu_cores(root),
        numa_nodes=max(1, len(list((root / "sys/devices/system/node").glob("node[0-9]*")))),
        memory_total_bytes=total,
        memory_available_bytes=available,
        gpus=_gpus(root),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _meminfo(root: Path) -> tuple[int, int]:
    fields: dict[str, int] = {}
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        number = rest.split()
        if number and number[0].isdigit():
            fields[name] = int(number[0]) * 1024
    total = fields.get("MemTotal", 0)
    return total, fields.get("MemAvailable", fields.get("MemFree", total))


def _cgroup_paths(root: Path) -> dict[str, str]:
    """Map each controller to this process's group; the unified hierarchy has the empty name."""
    paths = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            for controller in parts[1].split(","):
                paths[controller] = parts[2]
    return paths


def _ancestors(base: Path, group: str) -> list[Path]:
    """The folders from a group up to the mount; inside a container the path may be absent, then the mount counts."""
    folder = base / group.lstrip("/")
    folders = [base]
    while folder != base and base in folder.parents:
        folders.append(folder)
        folder = folder.parent
    return [folder for folder in folders if folder.is_dir()]


def _cgroup_memory(root: Path) -> tuple[int, int]:
    """Return (limit, used) of the tightest enclosing group; reclaimable page cache does not count as used."""
    mount = root / "sys/fs/cgroup"
    paths = _cgroup_paths(root)
    best = (_NO_LIMIT, 0)
    forms = (
        (mount, paths.get("", "/"), "memory.max", "memory.current", "inactive_file"),
        (
            mount / "memory",
            paths.get("memory", "/"),
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    )
    for base, group, limit_name, used_name, cache_name in forms:
        for folder in _ancestors(base, group):
            limit_text, used_text = _read(folder / limit_name).strip(), _read(folder / used_name).strip()
            if not limit_text.isdigit() or int(limit_text) >= _NO_LIMIT:
                continue
            used = int(used_text) if used_text.isdigit() else 0
            used = max(0, used - _stat_field(folder / "memory.stat", cache_name))
            # The tightest group is the one that leaves least, not the one with the lowest limit.
            if int(limit_text) - used < best[0] - best[1]:
                best = (int(limit_text), used)
    return best


def _stat_field(path: Path, name: str) -> int:
    for line in _read(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdigit():
            return int(value)
    return 0


def _cpu_cores(root: Path) -> int:
    """Cores this process may use: its affinity, cut by the cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if root == Path("/") else _read(root / "proc/cpuinfo").count("processor\t")
    mount = root / "sys/fs/cgroup"
    paths = _cgroup_paths(root)
    for folder in _ancestors(mount, paths.get("", "/")):
        quota = _read(folder / "cpu.max").split()
        if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit():
            cores = min(cores, math.ceil(int(quota[0]) / int(quota[1])))
    for folder in _ancestors(mount / "cpu", paths.get("cpu", "/")):
        quota_text, period_text = (
            _read(folder / "cpu.cfs_quota_us").strip(),
            _read(folder / "cpu.cfs_period_us").strip(),
        )
        if quota_text.isdigit() and period_text.isdigit() and int(period_text):
            cores = min(cores, math.ceil(int(quota_text) / int(period_text)))
    return max(1, cores)


def _cpu_name(root: Path) -> str:
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return "CPU"


def _gpus(root: Path) -> tuple[Gpu, ...]:
    """NVIDIA GPUs by the driver's own listing; memory sizes need NVML, which the CUDA executor will bring."""
    gpus = []
    folders = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    for index, path in enumerate(folders):
        name = "NVIDIA GPU"
        for line in _read(path).splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "Model":
                name = value.strip()
        gpus.append(Gpu(index, name))
    return tuple(gpus)
