"""The host around the fabric: limits, memory, driver, containers, installed versions, configuration files."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from launcher.fabric.collector.files import command_output, entries, read_int, read_text, under

_LIMITS = {"Max locked memory": "memlock", "Max open files": "nofile", "Max stack size": "stack"}
_SIZES = {"k": 10, "m": 20, "g": 30}
_PACKAGES = ("hlaunch", "torch", "ray", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "libucx-cu12", "libucx-cu13")
_VARIABLES = ("NCCL_", "GLOO_", "UCX_", "RAY_", "TORCH_NCCL_", "TORCH_GLOO_", "NVSHMEM_", "CUDA_", "NVIDIA_", "MASTER_")
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "HLAUNCH_NODE_IP", "TORCH_FR_BUFFER_SIZE")
_LIBRARY_FOLDERS = ("lib", "lib64", "usr/lib", "usr/lib64", "usr/local/lib")


def limits(root: Path) -> dict[str, list[int]]:
    """Return soft and hard limits of this very process; -1 is unlimited."""
    found = {}
    for line in read_text(root / "proc/self/limits").splitlines():
        for label, name in _LIMITS.items():
            if line.startswith(label):
                words = line[len(label) :].split()[:2]
                if len(words) == 2 and all(word == "unlimited" or word.isdigit() for word in words):
                    found[name] = [-1 if word == "unlimited" else int(word) for word in words]
    return found


def meminfo(root: Path) -> dict[str, int]:
    """Return total and available memory in bytes."""
    found = {}
    for line in read_text(root / "proc/meminfo").splitlines():
        match = re.match(r"(MemTotal|MemAvailable):\s*(\d+) kB", line)
        if match:
            found[match.group(1)] = int(match.group(2)) * 1024
    return found


def shm_bytes(root: Path, memory_bytes: int) -> int:
    """Return the size of /dev/shm: the mount's own limit, else the half of memory that tmpfs takes; -1 without one."""
    if str(root) == "/":
        try:
            found = os.statvfs("/dev/shm")
        except OSError:
            return -1
        return found.f_frsize * found.f_blocks
    for line in read_text(root / "proc/mounts").splitlines():
        fields = line.split()
        if len(fields) > 3 and fields[1] == "/dev/shm":
            size = re.search(r"(?:^|,)size=(\d+)([kmg]?)", fields[3])
            return int(size.group(1)) << _SIZES.get(size.group(2), 0) if size else memory_bytes // 2
    return -1


def has_library(root: Path, name: str) -> bool:
    """Say whether the dynamic linker finds a library."""
    if str(root) == "/":
        try:
            ctypes.CDLL(name)
        except OSError:
            return False
        return True
    return any(
        (root / folder / name).exists() or list((root / folder).glob("*/" + name)) for folder in _LIBRARY_FOLDERS
    )


def driver(root: Path) -> dict[str, Any]:
    """Describe the NVIDIA driver: its version, open or not, and what lets a NIC reach GPU memory."""
    text = read_text(root / "proc/driver/nvidia/version")
    version = re.search(r"(\d+\.\d+(?:\.\d+)?)", text.partition("Kernel Module")[2])
    return {
        "version": version.group(1) if version else "",
        "is_open": "Open" in text,
        "has_peermem": (root / "sys/module/nvidia_peermem").is_dir(),
        "has_nv_mem": any(name.startswith("nv_mem") for name in entries(root / "sys/kernel/mm/memory_peers")),
    }


def kernel(root: Path) -> str:
    return read_text(root / "proc/sys/kernel/osrelease")


def ephemeral_ports(root: Path) -> list[int]:
    words = read_text(root / "proc/sys/net/ipv4/ip_local_port_range").split()
    return [int(word) for word in words] if len(words) == 2 else []


def nccl_files(root: Path, environ: dict[str, str]) -> dict[str, list[str]]:
    """List the settings of NCCL's configuration files, which no `env` ever shows."""
    home = environ.get("HOME", "")
    places = [environ.get("NCCL_CONF_FILE") or (home + "/.nccl.conf" if home else ""), "/etc/nccl.conf"]
    found = {}
    for place in places:
        lines = read_text(under(root, place)).splitlines() if place else []
        settings = [line for line in lines if "=" in line and not line.startswith("#")]
        if settings:
            found[place] = settings
    return found


def environment(environ: dict[str, str]) -> dict[str, str]:
    """Return the variables of the catalogue's families; a token's value never leaves its host."""
    found = {}
    for name, value in environ.items():
        if name.startswith(_VARIABLES) or name in _RANK_VARIABLES:
            found[name] = "(hidden)" if "TOKEN" in name and not name.endswith("_PATH") else value
    return found


def process_environ(root: Path) -> dict[str, str]:
    """Return the environment of this process, or the one that a fixture tree shows for it."""
    if str(root) == "/":
        return dict(os.environ)
    pairs = [pair.partition("=") for pair in read_text(root / "proc/self/environ").split("\0") if pair]
    return {name: value for name, _, value in pairs}


def versions(root: Path) -> dict[str, str]:
    """Return the versions of what must be equal on every node; absent packages are left out."""
    path = sys.path if str(root) == "/" else [str(p) for p in root.glob("usr/lib/python3*/*-packages")]
    found: dict[str, str] = {}
    for item in metadata.distributions(path=path):
        try:
            name, version = item.metadata["Name"] or "", item.metadata["Version"] or ""
        except (OSError, ValueError):  # a package whose files are damaged
            continue
        if name.lower() in _PACKAGES and version:
            found.setdefault(name.lower(), version)
    return found


def tools(root: Path) -> dict[str, str]:
    """Return the versions of Docker's engine, Compose and NVIDIA's container toolkit; absent ones are left out."""
    commands = {
        "docker": ("docker", "version", "--format", "{{.Server.Version}}"),
        "compose": ("docker", "compose", "version", "--short"),
        "toolkit": ("nvidia-ctk", "--version"),
    }
    found = {}
    for name, argv in commands.items():
        match = re.search(r"(\d+\.\d+(?:\.\d+)?)", command_output(root, *argv))
        if match:
            found[name] = match.group(1)
    return found


def cdi_missing(root: Path) -> list[str]:
    """Return host paths that a CDI specification names and that are gone, as after a driver's update."""
    missing = []
    for folder in ("etc/cdi", "var/run/cdi"):
        for name in entries(root / folder):
            text = read_text(root / folder / name)
            for path in re.findall(r"[\"']?hostPath[\"']?\s*:\s*[\"']?(/[^\"'\s,]+)", text):
                if not under(root, path).exists() and path not in missing:
                    missing.append(path)
    return missing


def remove_ipc(root: Path) -> str:
    """Return logind's RemoveIPC, whose own default is yes; empty on a host without logind."""
    if not (root / "etc/systemd/logind.conf").exists() and not (root / "usr/lib/systemd/systemd-logind").exists():
        return ""
    texts = [read_text(root / "etc/systemd/logind.conf")]
    texts += [read_text(path) for path in sorted((root / "etc/systemd/logind.conf.d").glob("*.conf"))]
    values = re.findall(r"^\s*RemoveIPC\s*=\s*(\w+)", "\n".join(texts), re.MULTILINE)
    return str(values[-1]).lower() if values else "yes"


def numa_nodes(root: Path) -> int:
    return max(1, len([name for name in entries(root / "sys/devices/system/node") if re.match(r"^node\d+$", name)]))


def oom_kills(root: Path) -> int:
    """Return how many times this group was killed for memory; -1 when the kernel does not say."""
    match = re.search(r"^oom_kill (\d+)$", read_text(root / "sys/fs/cgroup/memory.events"), re.MULTILINE)
    return int(match.group(1)) if match else read_int(root / "sys/fs/cgroup/memory.oom_kill", -1)
