"""Puts the readers' answers into one object and prints it as JSON."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
from pathlib import Path
from typing import Any

from launcher.fabric.collector.files import read_text
from launcher.fabric.collector.host import (
    cdi_missing,
    driver,
    environment,
    ephemeral_ports,
    has_library,
    kernel,
    limits,
    meminfo,
    nccl_files,
    numa_nodes,
    oom_kills,
    process_environ,
    remove_ipc,
    shm_bytes,
    tools,
    versions,
)
from launcher.fabric.collector.infiniband import acs_redirecting, device_nodes, gpus, hcas, verbs
from launcher.fabric.collector.network import hostname_addresses, listening, netdevs, paths

FACTS_VERSION = 1


def collect(root: Path = Path("/"), peers: list[str] | None = None, mtu: int = 0, address: str = "") -> dict[str, Any]:
    """Read the host under `root`; takes up to 2 s per silent peer.

    `peers` are pinged with packets of `mtu` bytes; 0: as large as the interface that carries `address` sends them.
    """
    environ = process_environ(root)
    memory = meminfo(root)
    total = memory.get("MemTotal", 0)
    rdma_devices = hcas(root)
    gpu_devices = gpus(root)
    interfaces = netdevs(root)
    own = [netdev["mtu"] for netdev in interfaces if address in [item.split("/")[0] for item in netdev["addresses"]]]
    ways = [bdf for device in rdma_devices + gpu_devices for bdf in device["path"]]
    return {
        "facts_version": FACTS_VERSION,
        "hostname": socket.gethostname() if str(root) == "/" else read_text(root / "etc/hostname").strip(),
        "hostname_addresses": hostname_addresses(root),
        "kernel": kernel(root),
        "python": platform.python_version(),
        "user_id": os.getuid(),
        "is_container": (root / ".dockerenv").exists() or (root / "run/.containerenv").exists(),
        "limits": limits(root),
        "memory_total_bytes": total,
        "memory_available_bytes": memory.get("MemAvailable", total),
        "shm_bytes": shm_bytes(root, total),
        "numa_nodes": numa_nodes(root),
        "netdevs": interfaces,
        "hcas": rdma_devices,
        "verbs": verbs(root),
        "device_nodes": device_nodes(root),
        "has_libibverbs": has_library(root, "libibverbs.so.1"),
        "gpus": gpu_devices,
        "driver": driver(root),
        "acs_redirecting": acs_redirecting(root, ways),
        "environ": environment(environ),
        "nccl_files": nccl_files(root, environ),
        "listening": listening(root),
        "ephemeral_ports": ephemeral_ports(root),
        "versions": versions(root),
        "tools": tools(root),
        "cdi_missing": cdi_missing(root),
        "remove_ipc": remove_ipc(root),
        "oom_kills": oom_kills(root),
        "paths": paths(root, peers or [], mtu or (own or [1500])[0]),
        "time": time.time(),
    }


def run(settings: dict[str, Any]) -> None:
    """Collect by the settings (root, peers, mtu, address) and print one line of JSON."""
    facts = collect(
        Path(settings.get("root", "/")), settings.get("peers"), settings.get("mtu", 0), settings.get("address", "")
    )
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()
