"""Fixture trees: what a healthy host shows in sysfs, procfs, /dev and /etc, and how to break one thing of it."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

EMPTY_GID = "0000:0000:0000:0000:0000:0000:0000:0000"
FUNCTIONS = (
    ("rocep1s0f0", "enP2p1s0f0np0", "0000:01:00.0", "192.168.100"),
    ("roceP2p1s0f0", "enP2p1s0f0np1", "0002:01:00.0", "192.168.101"),
)


def write(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def mapped_gid(ip: str) -> str:
    a, b, c, d = (int(part) for part in ip.split("."))
    return f"0000:0000:0000:0000:0000:ffff:{a:02x}{b:02x}:{c:02x}{d:02x}"


class Tree:
    """One host. Every method writes real paths, so that the collector reads it as it reads a machine."""

    def __init__(self, root: Path, number: int) -> None:
        self.root, self.number = root.resolve(), number

    def path(self, *parts: str) -> Path:
        return self.root.joinpath(*parts)

    def set(self, path: str, text: str | bytes) -> None:
        write(self.root / path, text)

    def remove(self, path: str) -> None:
        target = self.root / path
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink()

    def device(self, bdf: str, bridge: str) -> Path:
        """A PCI function below a bridge, also by its address under /sys/bus."""
        path = self.path("sys/devices", f"pci{bdf[:7]}", f"{bdf[:4]}:{bridge}", bdf)
        path.mkdir(parents=True, exist_ok=True)
        for item in (path, path.parent):
            link(self.path("sys/bus/pci/devices", item.name), item)
        return path

    def netdev(
        self, name: str, *, mtu: int = 9000, state: str = "up", port: str = "p0", device: Path | None = None
    ) -> None:
        folder = self.path("sys/class/net", name)
        for leaf, text in (("mtu", str(mtu)), ("operstate", state), ("speed", "200000"), ("carrier", "1")):
            write(folder / leaf, text + "\n")
        write(folder / "phys_port_name", port + "\n")
        if device is not None:
            link(folder / "device", device)
            (device / "net" / name).mkdir(parents=True, exist_ok=True)

    def addresses(self, pairs: list[tuple[str, str]]) -> None:
        """Give interfaces an address each, all with /24."""
        trie = "Local:\n" + "".join(
            f"     |-- {ip}\n        /32 host LOCAL\n" for ip in ("127.0.0.1", *(ip for _, ip in pairs))
        )
        rows = ["Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT"]
        for name, ip in pairs:
            network = (
                struct.pack("<I", int.from_bytes(bytes(int(p) for p in (*ip.split(".")[:3], "0")), "big")).hex().upper()
            )
            rows.append(f"{name}\t{network}\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0")
        self.set("proc/net/fib_trie", trie)
        self.set("proc/net/route", "\n".join(rows) + "\n")

    def hca(self, name: str, device: Path, netdev: str, ip: str, *, guid: str = "b8ce:f603:0001:0000") -> None:
        folder = self.path("sys/class/infiniband", name)
        write(folder / "sys_image_guid", guid + "\n")
        link(folder / "device", device)
        for leaf, text in (
            ("numa_node", "-1"),
            ("current_link_speed", "32.0 GT/s PCIe"),
            ("current_link_width", "4"),
            ("max_link_speed", "32.0 GT/s PCIe"),
            ("max_link_width", "4"),
        ):
            write(device / leaf, text + "\n")
        port = f"sys/class/infiniband/{name}/ports/1"
        for leaf, text in (
            ("state", "4: ACTIVE"),
            ("phys_state", "5: LinkUp"),
            ("link_layer", "Ethernet"),
            ("rate", "200 Gb/sec (4X HDR)"),
            ("counters/port_xmit_data", "1000"),
            ("counters/port_rcv_data", "1000"),
            ("hw_counters/packet_seq_err", "0"),
            ("hw_counters/local_ack_timeout_err", "0"),
        ):
            self.set(f"{port}/{leaf}", text + "\n")
        link_local = "fe80:0000:0000:0000:4ebb:47ff:fe00:0001"
        for index, (gid, kind) in enumerate(
            (
                (link_local, "IB/RoCE v1"),
                (link_local, "RoCE v2"),
                (mapped_gid(ip), "IB/RoCE v1"),
                (mapped_gid(ip), "RoCE v2"),
            )
        ):
            self.gid(name, index, gid, kind, netdev)
        self.gid(name, 4, EMPTY_GID, "", "")

    def gid(self, hca: str, index: int, gid: str, kind: str, netdev: str) -> None:
        port = f"sys/class/infiniband/{hca}/ports/1"
        self.set(f"{port}/gids/{index}", gid + "\n")
        self.set(f"{port}/gid_attrs/types/{index}", kind + "\n")
        self.set(f"{port}/gid_attrs/ndevs/{index}", netdev + "\n")

    def clear_gids(self, hca: str) -> None:
        for leaf in ("gids", "gid_attrs"):
            self.remove(f"sys/class/infiniband/{hca}/ports/1/{leaf}")

    def program(self, name: str, text: str) -> None:
        """A program of the host that prints a text."""
        path = self.path("usr/bin", name)
        write(path, f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def listen(self, port: int, pid: int, command: str) -> None:
        """A process that listens on a port."""
        inode = str(70000 + port)
        nobody = "00000000:00000000 00:00000000 00000000     0        0"
        row = f"   0: 00000000:{port:04X} 00000000:0000 0A {nobody} {inode} 1 0 100 0"
        head = self.path("proc/net/tcp")
        write(head, (head.read_text() if head.exists() else "  sl  local_address\n") + row + "\n")
        write(self.path("proc", str(pid), "cmdline"), command.replace(" ", "\0"))
        folder = self.path("proc", str(pid), "fd")
        folder.mkdir(parents=True, exist_ok=True)
        os.symlink(f"socket:[{inode}]", folder / "3")

    def package(self, name: str, version: str) -> None:
        folder = self.path("usr/lib/python3/dist-packages", f"{name}-{version}.dist-info")
        write(folder / "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def acs_config(control: int) -> bytes:
    """A configuration space whose first extended capability is ACS."""
    data = bytearray(4096)
    data[0x100:0x104] = (0x000D | 1 << 16).to_bytes(4, "little")
    data[0x106:0x108] = control.to_bytes(2, "little")
    return bytes(data)


def healthy(root: Path, number: int, *, gpu: str = "NVIDIA GB10") -> Tree:
    """A host of a pair: one GPU, one cable with two functions, RoCE v2 on both, everything as it should be."""
    tree = Tree(root, number)
    for hca, netdev, bdf, subnet in FUNCTIONS:
        device = tree.device(bdf, "00:00.0")
        tree.netdev(netdev, device=device)
        tree.hca(hca, device, netdev, f"{subnet}.{number}", guid=f"b8ce:f603:0001:000{number}")
        write(device.parent / "config", acs_config(0))
    tree.addresses([(netdev, f"{subnet}.{number}") for _, netdev, _, subnet in FUNCTIONS])
    tree.netdev("lo", mtu=65536, state="unknown", port="")
    for i, (hca, _, _, _) in enumerate(FUNCTIONS):
        tree.set(f"sys/class/infiniband_verbs/uverbs{i}/ibdev", hca + "\n")
        tree.set(f"dev/infiniband/uverbs{i}", "")
    tree.set("dev/infiniband/rdma_cm", "")
    tree.set("usr/lib/aarch64-linux-gnu/libibverbs.so.1", "")
    gpu_device = tree.device("000f:01:00.0", "00:01.0")
    write(gpu_device / "numa_node", "-1\n")
    tree.set("proc/driver/nvidia/gpus/000f:01:00.0/information", f"Model: \t {gpu}\nIRQ: 1\n")
    tree.set(
        "proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.95.05  Release Build\n",
    )
    tree.set("proc/sys/kernel/osrelease", "6.14.0-1013-nvidia\n")
    tree.set("proc/sys/net/ipv4/ip_local_port_range", "32768\t60999\n")
    tree.set("proc/meminfo", "MemTotal:       125500000 kB\nMemAvailable:   118000000 kB\n")
    tree.set("proc/mounts", "tmpfs /dev/shm tmpfs rw,nosuid,nodev 0 0\n")
    tree.set(
        "proc/self/limits",
        "Limit                     Soft Limit           Hard Limit           Units     \n"
        "Max stack size            8388608              unlimited            bytes     \n"
        "Max open files            1048576              1048576              files     \n"
        "Max locked memory         unlimited            unlimited            bytes     \n",
    )
    tree.set("proc/net/tcp", "  sl  local_address rem_address   st\n")
    tree.set("etc/hostname", f"spark-0{number}\n")
    tree.set("etc/hosts", f"127.0.0.1 localhost\n192.168.100.{number} spark-0{number}\n")
    tree.path("sys/devices/system/node/node0").mkdir(parents=True)
    tree.package("ray", "2.60.0")
    tree.package("torch", "2.11.0")
    tree.program("docker", 'case "$1" in version) echo 28.1.1;; compose) echo 2.40.3;; esac')
    tree.program("nvidia-ctk", "echo 'NVIDIA Container Toolkit CLI version 1.17.9'")
    return tree
