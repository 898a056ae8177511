"""This host: cores, memory within its cgroup, NUMA nodes, GPUs, NICs; read under a root, so that a fixture tree tests.

Knows: procfs, sysfs, cgroup v1 and v2, which CUDA the installed torch was built for. Refuses to know: torch itself.
"""

from __future__ import annotations

import math
import os
import re
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launcher.plan.inventory.network import read_nics, read_rdma_ports
from launcher.plan.inventory.nvml import GpuReading, load_nvml, read_gpus
from launcher.plan.inventory.values import Finding, Gpu, Inventory, NumaNode

_NO_LIMIT = 1 << 60
"""cgroup v1 says "no limit" with a number near 2^63."""


_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 bf16",
    "avx512_fp16": "AVX-512 fp16",
    "amx_tile": "AMX",
    "amx_bf16": "AMX bf16",
    "amx_int8": "AMX int8",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "bf16",
    "i8mm": "int8 matmul",
}
"""Flags of /proc/cpuinfo that matter to kernels, and how they are called."""


def read_inventory(root: Path = Path("/"), nvml: Any = None) -> Inventory:
    """Read the machine under `root`; `/` is this one. `nvml` replaces the package nvidia-ml-py, for tests."""
    whole_total, whole_available = total, available = _meminfo(root)
    limit, used = _cgroup_memory(root)
    if limit < total:
        total = limit
        available = min(available, max(0, limit - used))
    ports = read_rdma_ports(root)
    numa = _numa(root)
    reading = _gpus(root, nvml, (whole_total, min(whole_available, available)))
    return Inventory(
        node=socket.gethostname(),
        cpu_name=_cpu_name(root),
        cpu_cores=_cpu_cores(root),
        numa_nodes=max(1, len(numa)),
        memory_total_bytes=total,
        memory_available_bytes=available,
        gpus=reading.gpus,
        cpu_features=_cpu_features(root),
        numa=numa,
        nics=read_nics(root, ports),
        rdma_ports=ports,
        driver_version=reading.driver_version,
        torch_cuda=torch_cuda_version(),
        findings=reading.findings,
    )


def torch_cuda_version() -> str | None:
    """Return the CUDA version that torch was built for, from its version file; torch is not imported.

    None: no torch. Empty: a build without CUDA.
    """
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    found = re.search(r"^cuda\b[^=]*=\s*'([\d.]+)'", _read(Path(spec.origin).with_name("version.py")), re.MULTILINE)
    return found[1] if found else ""


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


def _cpu_features(root: Path) -> tuple[str, ...]:
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags = set(value.split())
            return tuple(shown for flag, shown in _FEATURES.items() if flag in flags)
    return ()


def _numa(root: Path) -> tuple[NumaNode, ...]:
    nodes: list[NumaNode] = []
    folders = (root / "sys/devices/system/node").glob("node[0-9]*")
    for folder in sorted(folders, key=lambda path: int(path.name[4:]) if path.name[4:].isdigit() else 0):
        sizes = {
            name: int(kib) * 1024 for name, kib in re.findall(r"Node \d+ (\w+):\s+(\d+) kB", _read(folder / "meminfo"))
        }
        nodes.append(
            NumaNode(
                index=int(folder.name[4:]) if folder.name[4:].isdigit() else len(nodes),
                cores=parse_cores(_read(folder / "cpulist")),
                memory_bytes=sizes.get("MemTotal", 0),
                free_bytes=sizes.get("MemFree", 0),
            )
        )
    return tuple(nodes)


def parse_cores(text: str) -> tuple[int, ...]:
    """Read the kernel's list of cores: `0-3,8` is 0, 1, 2, 3, 8."""
    cores: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            cores += range(int(first), int(last if last.isdigit() else first) + 1)
    return tuple(cores)


def _gpus(root: Path, nvml: Any, unified_memory: tuple[int, int]) -> GpuReading:
    """NVIDIA GPUs by NVML; where it is missing, by the driver's own listing, without sizes."""
    listed = _listed_gpus(root)
    module = nvml if nvml is not None else load_nvml() if root == Path("/") else None
    if module is not None and (nvml is not None or listed):
        reading = read_gpus(module, unified_memory)
        return reading if reading.gpus else GpuReading(listed, reading.driver_version, reading.findings)
    if not listed:
        return GpuReading()
    finding = Finding(
        "nvml-missing",
        f"{len(listed)} x NVIDIA GPU here, whose memory and capability cannot be read without nvidia-ml-py",
        "run: pip install nvidia-ml-py",
    )
    return GpuReading(listed, _listed_driver(root), (finding,))


def _listed_gpus(root: Path) -> tuple[Gpu, ...]:
    gpus = []
    folders = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    for index, path in enumerate(folders):
        name = "NVIDIA GPU"
        for line in _read(path).splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "Model":
                name = value.strip()
        gpus.append(Gpu(index, name, bus_id=path.parent.name.lower()))
    return tuple(gpus)


def _listed_driver(root: Path) -> str:
    found = re.search(r"NVRM version:.*?\b(\d+\.\d+(?:\.\d+)?)\b", _read(root / "proc/driver/nvidia/version"))
    return found[1] if found else ""
