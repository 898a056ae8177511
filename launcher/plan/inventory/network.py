"""Network interfaces and RDMA ports, from sysfs under a root. Refuses to know: NCCL, which of them should be used."""

from __future__ import annotations

import fcntl
import ipaddress
import re
import socket
import struct
from pathlib import Path

from launcher.plan.inventory.values import Nic, RdmaPort

_VIRTUAL = re.compile(r"(lo|docker\d+|br-.*|veth.*|ifb\d+|dummy\d+|virbr\d+|tun\d+|tap\d+|cni\d+|flannel.*|cali.*)$")
_RATE = re.compile(r"([\d.]+)\s*Gb/sec")


def read_text(path: Path) -> str:
    """Return a small file's text, stripped; empty when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except (OSError, ValueError):
        return ""


def read_number(path: Path) -> int | None:
    """Return a file's whole number, None when there is none."""
    text = read_text(path)
    return int(text) if text.lstrip("-").isdigit() else None


def numa_of(device: Path) -> int | None:
    """Return the NUMA node of a device folder; the kernel writes -1 where there is only one."""
    number = read_number(device / "numa_node")
    return number if number is not None and number >= 0 else None


def read_rdma_ports(root: Path) -> tuple[RdmaPort, ...]:
    """List the ports of all RDMA devices, active or not."""
    ports = []
    for device in sorted((root / "sys/class/infiniband").glob("*")):
        for port in sorted((device / "ports").glob("*")):
            # "4: ACTIVE"
            state = read_text(port / "state").partition(":")[2].strip()
            rate = _RATE.search(read_text(port / "rate"))
            number = int(port.name) if port.name.isdigit() else 0
            ports.append(
                RdmaPort(
                    device=device.name,
                    port=number,
                    state=state or "UNKNOWN",
                    link_layer=read_text(port / "link_layer"),
                    rate_gbps=float(rate[1]) if rate else 0.0,
                    netdev=_netdev(device, port),
                    numa_node=numa_of(device / "device"),
                )
            )
    return tuple(ports)


def _netdev(device: Path, port: Path) -> str:
    for path in sorted((port / "gid_attrs/ndevs").glob("*")):
        # Unpopulated entries cannot be read.
        if name := read_text(path):
            return name
    names = sorted(path.name for path in (device / "device/net").glob("*"))
    return names[0] if names else ""


def read_nics(root: Path, ports: tuple[RdmaPort, ...]) -> tuple[Nic, ...]:
    """List the interfaces that lead out of this machine. Addresses are known for the running system only."""
    by_netdev = {port.netdev: port.device for port in ports if port.netdev}
    nics = []
    for folder in sorted((root / "sys/class/net").glob("*")):
        if _VIRTUAL.match(folder.name) or not folder.is_dir():
            continue
        speed = read_number(folder / "speed")
        nics.append(
            Nic(
                name=folder.name,
                state=read_text(folder / "operstate"),
                speed_gbps=speed / 1000 if speed is not None and speed > 0 else 0.0,
                mtu=read_number(folder / "mtu") or 0,
                addresses=_addresses(folder.name) if root == Path("/") else (),
                numa_node=numa_of(folder / "device"),
                rdma_device=by_netdev.get(folder.name, ""),
            )
        )
    return tuple(nics)


_SIOCGIFADDR = 0x8915


def _addresses(name: str) -> tuple[str, ...]:
    """The first IPv4 address of an interface, and its global IPv6 ones."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            found.append(socket.inet_ntoa(answer[20:24]))
        except OSError:
            pass  # no IPv4 address
    for line in read_text(Path("/proc/net/if_inet6")).splitlines():
        fields = line.split()
        if len(fields) == 6 and fields[5] == name and fields[3] == "00":
            found.append(str(ipaddress.IPv6Address(int(fields[0], 16))))
    return tuple(found)
