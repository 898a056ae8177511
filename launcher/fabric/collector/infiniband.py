"""RDMA as sysfs shows it: HCAs, ports, GIDs, counters, verbs devices, and the PCI way to them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from launcher.fabric.collector.files import bdf_of, bridges_of, entries, leaf_number, read_int, read_text

_COUNTERS = ("port_xmit_data", "port_rcv_data")
_HW_COUNTERS = (
    "packet_seq_err",
    "local_ack_timeout_err",
    "rnr_nak_retry_err",
    "out_of_sequence",
    "np_cnp_sent",
)
_EMPTY_GID = "0000:0000:0000:0000:0000:0000:0000:0000"
_ACS_REDIRECT = 0x0D
"""Bits of the ACS control register that send peer-to-peer packets up to the CPU: SV, RR, CR."""


def hcas(root: Path) -> list[dict[str, Any]]:
    """Read every RDMA device with its ports."""
    found = []
    for name in sorted(
        entries(root / "sys/class/infiniband"), key=lambda text: (text.rstrip("0123456789"), leaf_number(text))
    ):
        folder = root / "sys/class/infiniband" / name
        device = folder / "device"
        found.append(
            {
                "name": name,
                "sys_image_guid": read_text(folder / "sys_image_guid"),
                "firmware": read_text(folder / "fw_ver"),
                "bdf": bdf_of(device),
                "path": bridges_of(device),
                "numa_node": read_int(device / "numa_node", -1),
                "link_speed": read_text(device / "current_link_speed"),
                "link_width": read_int(device / "current_link_width", 0),
                "max_link_speed": read_text(device / "max_link_speed"),
                "max_link_width": read_int(device / "max_link_width", 0),
                "netdevs": entries(device / "net"),
                "ports": [_port(folder / "ports" / port) for port in entries(folder / "ports")],
            }
        )
    return found


def _port(folder: Path) -> dict[str, Any]:
    rate = re.match(r"([\d.]+)", read_text(folder / "rate"))
    return {
        "port": leaf_number(folder.name),
        "state": read_text(folder / "state").partition(":")[2].strip(),
        "phys_state": read_text(folder / "phys_state").partition(":")[2].strip(),
        "link_layer": read_text(folder / "link_layer"),
        "rate_gbps": float(rate.group(1)) if rate else 0.0,
        "gids": _gids(folder),
        "counters": _counters(folder),
    }


def _gids(folder: Path) -> list[dict[str, Any]]:
    """List the populated entries of a port's GID table; an index of the table that is empty is left out."""
    found = []
    for name in sorted(entries(folder / "gids"), key=leaf_number):
        gid = read_text(folder / "gids" / name)
        if gid and gid != _EMPTY_GID:
            found.append(
                {
                    "index": leaf_number(name),
                    "gid": gid,
                    "type": read_text(folder / "gid_attrs/types" / name),
                    "ndev": read_text(folder / "gid_attrs/ndevs" / name),
                }
            )
    return found


def _counters(folder: Path) -> dict[str, int]:
    found = {}
    for group, names in (("counters", _COUNTERS), ("hw_counters", _HW_COUNTERS)):
        for name in names:
            value = read_int(folder / group / name, -1)
            if value >= 0:
                found[name] = value
    return found


def verbs(root: Path) -> list[dict[str, str]]:
    """Map each verbs device to its HCA."""
    folder = root / "sys/class/infiniband_verbs"
    return [
        {"name": name, "hca": read_text(folder / name / "ibdev")}
        for name in entries(folder)
        if name.startswith("uverbs")
    ]


def device_nodes(root: Path) -> list[str]:
    """List what this process can open under /dev/infiniband."""
    return entries(root / "dev/infiniband")


def gpus(root: Path) -> list[dict[str, Any]]:
    """List NVIDIA GPUs by the driver's files, else by PCI class; with their PCI way and NUMA node."""
    found = []
    folders = entries(root / "proc/driver/nvidia/gpus")
    if not folders:
        folders = [bdf for bdf in entries(root / "sys/bus/pci/devices") if _is_gpu(root / "sys/bus/pci/devices" / bdf)]
    for index, bdf in enumerate(folders):
        device = root / "sys/bus/pci/devices" / bdf
        text = read_text(root / "proc/driver/nvidia/gpus" / bdf / "information")
        model = re.search(r"^Model:\s*(.+)$", text, re.MULTILINE)
        found.append(
            {
                "index": index,
                "name": model.group(1).strip() if model else "NVIDIA GPU",
                "bdf": bdf,
                "path": bridges_of(device),
                "numa_node": read_int(device / "numa_node", -1),
            }
        )
    return found


def _is_gpu(device: Path) -> bool:
    return read_text(device / "vendor") == "0x10de" and read_text(device / "class")[:6] in ("0x0300", "0x0302")


def acs_redirecting(root: Path, bdfs: list[str]) -> list[str] | None:
    """Return the bridges that redirect peer-to-peer packets; None when their configuration space may not be read."""
    found = []
    is_readable = False
    for bdf in sorted(set(bdfs)):
        control = _acs_control(root / "sys/bus/pci/devices" / bdf / "config")
        if control is None:
            continue
        is_readable = True
        if control & _ACS_REDIRECT:
            found.append(bdf)
    return found if is_readable else None


def _acs_control(path: Path) -> int | None:
    """Walk the extended capabilities of a PCI function; only root sees past the first 64 bytes. 0: it has no ACS."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if len(data) < 4096:
        return None
    offset = 0x100
    for _ in range(64):
        header = int.from_bytes(data[offset : offset + 4], "little")
        if header & 0xFFFF == 0x000D:
            return int.from_bytes(data[offset + 6 : offset + 8], "little")
        offset = header >> 20
        if offset < 0x100 or offset > 4092:
            return 0
    return 0
