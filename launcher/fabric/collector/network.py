"""Interfaces with their addresses, listening ports, and whether full-size packets reach a peer."""

from __future__ import annotations

import array
import fcntl
import os
import re
import socket
import struct
import time
from pathlib import Path
from typing import Any

from launcher.fabric.collector.files import bdf_of, command_output, entries, read_int, read_text

_SIOCGIFCONF = 0x8912
_SIOCGIFNETMASK = 0x891B
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE = 10, 23, 3
_ECHO_REQUEST, _ECHO_REQUEST_V6 = 8, 128
_HEADERS, _HEADERS_V6 = 28, 48
"""Bytes of IP and ICMP headers in front of a ping's payload."""


def netdevs(root: Path) -> list[dict[str, Any]]:
    """Read every interface: size of packets, state, speed, addresses with prefix, PCI function."""
    addresses = _live_addresses() if str(root) == "/" else _file_addresses(root)
    for name, more in _v6_addresses(root).items():
        addresses.setdefault(name, []).extend(more)
    found = []
    for name in entries(root / "sys/class/net"):
        folder = root / "sys/class/net" / name
        if not folder.is_dir():
            continue
        found.append(
            {
                "name": name,
                "mtu": read_int(folder / "mtu", 0),
                "operstate": read_text(folder / "operstate"),
                "carrier": read_int(folder / "carrier", -1),
                "speed_mbps": read_int(folder / "speed", -1),
                "addresses": addresses.get(name, []),
                "bdf": bdf_of(folder / "device"),
                "phys_port_name": read_text(folder / "phys_port_name"),
            }
        )
    return found


def _live_addresses() -> dict[str, list[str]]:
    """Ask the kernel for every IPv4 address of every interface, with its prefix length."""
    found: dict[str, list[str]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        room = bytearray(256 * 40)
        buffer = array.array("B", room)
        address, _ = buffer.buffer_info()
        answer = fcntl.ioctl(asker.fileno(), _SIOCGIFCONF, struct.pack("iL", len(room), address))
        used = struct.unpack("iL", answer)[0]
        raw = buffer.tobytes()[:used]
        for start in range(0, len(raw), 40):
            label = raw[start : start + 16].split(b"\0", 1)[0]
            ip = socket.inet_ntoa(raw[start + 20 : start + 24])
            try:
                mask = fcntl.ioctl(asker.fileno(), _SIOCGIFNETMASK, struct.pack("256s", label))[20:24]
            except OSError:
                continue
            prefix = bin(int.from_bytes(mask, "big")).count("1")
            found.setdefault(label.decode().split(":")[0], []).append("%s/%d" % (ip, prefix))  # noqa: UP031
    return found


def _file_addresses(root: Path) -> dict[str, list[str]]:
    """Find each interface's addresses in procfs: local addresses of the routing trie, subnets of the route table.

    Two interfaces of one subnet cannot be told apart there; then the RoCE GIDs, which name both, decide.
    """
    local = re.findall(r"\|-- (\S+)\s+/32 host LOCAL", read_text(root / "proc/net/fib_trie"))
    by_gid = _gid_addresses(root)
    found: dict[str, list[str]] = {}
    for line in read_text(root / "proc/net/route").splitlines()[1:]:
        fields = line.split()
        if len(fields) < 8 or fields[2] != "00000000" or fields[7] == "00000000":
            continue
        network, mask = (int.from_bytes(bytes.fromhex(fields[i])[::-1], "big") for i in (1, 7))
        for ip in dict.fromkeys(local):
            number = int.from_bytes(socket.inet_aton(ip), "big")
            if number & mask == network and by_gid.get(ip, fields[0]) == fields[0]:
                found.setdefault(fields[0], []).append("%s/%d" % (ip, bin(mask).count("1")))  # noqa: UP031
    if "127.0.0.1" in local:
        found.setdefault("lo", []).append("127.0.0.1/8")
    return found


def _v6_addresses(root: Path) -> dict[str, list[str]]:
    """Find each interface's IPv6 addresses with their prefixes; every interface has a link-local one, left out."""
    found: dict[str, list[str]] = {}
    for line in read_text(root / "proc/net/if_inet6").splitlines():
        fields = line.split()
        if len(fields) < 6 or len(fields[0]) != 32 or fields[3] == "20":
            continue
        try:
            ip, prefix = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(fields[0])), int(fields[2], 16)
        except ValueError:
            continue
        found.setdefault(fields[5], []).append("%s/%d" % (ip, prefix))  # noqa: UP031
    return found


def _gid_addresses(root: Path) -> dict[str, str]:
    """Map an IPv4 address to the interface whose GID carries it."""
    found = {}
    for gids in (root / "sys/class/infiniband").glob("*/ports/*/gids"):
        for index in entries(gids):
            text = read_text(gids / index)
            ndev = read_text(gids.parent / "gid_attrs/ndevs" / index)
            if ndev and text.startswith("0000:0000:0000:0000:0000:ffff:"):
                found[socket.inet_ntoa(bytes.fromhex(text[-9:].replace(":", "")))] = ndev
    return found


def listening(root: Path) -> list[dict[str, Any]]:
    """List the TCP ports that somebody listens on, with the process where we may see it."""
    owners = _socket_owners(root)
    found = {}
    for name in ("tcp", "tcp6"):
        for line in read_text(root / "proc/net" / name).splitlines()[1:]:
            fields = line.split()
            if len(fields) < 10 or fields[3] != "0A":
                continue
            port = int(fields[1].rpartition(":")[2], 16)
            pid, command = owners.get(fields[9], (0, ""))
            if port not in found or pid:
                found[port] = {"port": port, "pid": pid, "command": command}
    return [found[port] for port in sorted(found)]


def _socket_owners(root: Path) -> dict[str, tuple[int, str]]:
    """Map a socket's inode to its process."""
    found = {}
    for pid in entries(root / "proc"):
        if not pid.isdigit():
            continue
        folder = root / "proc" / pid
        command = ""
        for fd in entries(folder / "fd"):
            try:
                target = os.readlink(str(folder / "fd" / fd))
            except OSError:
                continue
            if target.startswith("socket:["):
                command = (
                    command or read_text(folder / "cmdline").replace("\0", " ").strip() or read_text(folder / "comm")
                )
                found[target[8:-1]] = (int(pid), command[:120])
    return found


def hostname_addresses(root: Path) -> list[str]:
    """Return what this host's own name resolves to, as Gloo will see it."""
    if str(root) == "/":
        try:
            infos = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET, socket.SOCK_STREAM)
        except OSError:
            return []
        return sorted({str(info[4][0]) for info in infos})
    name = read_text(root / "etc/hostname").strip()
    rows = [line.split("#")[0].split() for line in read_text(root / "etc/hosts").splitlines()]
    return [row[0] for row in rows if len(row) > 1 and name in row[1:] and ":" not in row[0]]


def probe_path(root: Path, peer: str, payload_bytes: int, seconds: float = 1.0) -> dict[str, Any]:
    """Send one ping that may not be fragmented; say what became of it.

    Verdicts: ok, too-long (this host refuses the size), lost (no answer), unreachable, unknown (may not ping).
    """
    result: dict[str, Any] = {"peer": peer, "bytes": payload_bytes, "verdict": "unknown", "detail": ""}
    if str(root) != "/":
        return result
    for kind in (socket.SOCK_RAW, socket.SOCK_DGRAM):
        try:
            if _is_v6(peer):
                pinger = socket.socket(socket.AF_INET6, kind, socket.IPPROTO_ICMPV6)
            else:
                pinger = socket.socket(socket.AF_INET, kind, socket.IPPROTO_ICMP)
        except OSError as error:
            result["detail"] = str(error)
            continue
        with pinger:
            result["verdict"], result["detail"] = _ping(pinger, peer, payload_bytes, seconds)
        return result
    return _ping_program(root, result, seconds)


def _is_v6(peer: str) -> bool:
    return ":" in peer


def _ping(pinger: socket.socket, peer: str, payload_bytes: int, seconds: float) -> tuple[str, str]:
    token = os.urandom(8)
    number = int.from_bytes(token[:2], "big")
    payload = token + b"\0" * max(0, payload_bytes - len(token))
    if _is_v6(peer):
        # The kernel fills in the checksum, which covers addresses that it alone knows.
        packet = struct.pack("!BBHHH", _ECHO_REQUEST_V6, 0, 0, number, 1) + payload
        pinger.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)
    else:
        packet = struct.pack("!BBHHH", _ECHO_REQUEST, 0, 0, number, 1) + payload
        packet = struct.pack("!BBHHH", _ECHO_REQUEST, 0, _checksum(packet), number, 1) + payload
        pinger.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
    deadline = time.monotonic() + seconds
    try:
        pinger.sendto(packet, (peer, 0))
        while True:
            pinger.settimeout(max(0.01, deadline - time.monotonic()))
            answer = pinger.recv(65535)
            # Raw sockets see every echo reply of the host; ours carries the token.
            if token in answer:
                return "ok", ""
            if time.monotonic() > deadline:
                return "lost", "no answer within %.1f s" % seconds  # noqa: UP031
    except socket.timeout:  # noqa: UP041 - its name before Python 3.10
        return "lost", "no answer within %.1f s" % seconds  # noqa: UP031
    except OSError as error:
        return ("too-long" if error.errno == 90 else "unreachable"), str(error.strerror)


def _ping_program(root: Path, result: dict[str, Any], seconds: float) -> dict[str, Any]:
    size, peer = str(result["bytes"]), str(result["peer"])
    if not command_output(root, "ping", "-V"):
        result["detail"] = "may not open an ICMP socket, and there is no ping: " + str(result["detail"])
        return result
    wait = str(max(1, int(seconds)))
    answer = command_output(root, "ping", "-n", "-q", "-c", "1", "-W", wait, "-M", "do", "-s", size, peer)
    result["verdict"] = "ok" if answer else "lost"
    return result


def _checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))  # noqa: UP031
    total = (total >> 16) + (total & 0xFFFF)
    return int(~(total + (total >> 16)) & 0xFFFF)


def paths(root: Path, peers: list[str], mtu: int) -> list[dict[str, Any]]:
    """Probe each peer with a small packet, then with the largest that fits `mtu`."""
    found = []
    for peer in peers:
        small = probe_path(root, peer, 56)
        found.append(small)
        if small["verdict"] == "ok" and mtu > 84:
            found.append(probe_path(root, peer, mtu - (_HEADERS_V6 if _is_v6(peer) else _HEADERS)))
    return found
