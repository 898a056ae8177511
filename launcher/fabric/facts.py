"""What the collector found on one node, as typed values.

Knows: the collector's JSON and small questions about it (which HCA has which address). Refuses to know: what is wrong.
The JSON comes from another machine, so every field is read with its type and a default; a list of odd things becomes
a short list, never an exception.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

FACTS_VERSION = 1
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@-]{0,63}")


class BadFacts(ValueError):
    """The text is not what the collector prints."""


@dataclass(frozen=True, slots=True)
class Gid:
    index: int
    gid: str
    type: str
    netdev: str

    @property
    def ipv4(self) -> str | None:
        """The address of an IPv4-mapped GID, None for any other."""
        address = self._address
        return str(address.ipv4_mapped) if address is not None and address.ipv4_mapped is not None else None

    @property
    def short(self) -> str:
        """The GID as a person writes it: `fe80::1`, or the address it maps."""
        return self.ipv4 or (self.gid if self._address is None else self._address.compressed)

    @property
    def is_v2(self) -> bool:
        return self.type == "RoCE v2"

    @property
    def is_link_local(self) -> bool:
        return self._address is not None and self._address.is_link_local

    @property
    def _address(self) -> ipaddress.IPv6Address | None:
        try:
            return ipaddress.IPv6Address(self.gid)
        except ValueError:
            return None


@dataclass(frozen=True, slots=True)
class Port:
    port: int
    state: str
    phys_state: str
    link_layer: str
    rate_gbps: float
    gids: tuple[Gid, ...]
    counters: Mapping[str, int]

    @property
    def is_active(self) -> bool:
        return self.state == "ACTIVE"


@dataclass(frozen=True, slots=True)
class Hca:
    name: str
    sys_image_guid: str
    bdf: str
    path: tuple[str, ...]
    numa_node: int
    link_speed: str
    link_width: int
    max_link_speed: str
    max_link_width: int
    netdevs: tuple[str, ...]
    ports: tuple[Port, ...]

    @property
    def is_active(self) -> bool:
        return any(port.is_active for port in self.ports)

    @property
    def addresses(self) -> tuple[str, ...]:
        """IPv4 addresses of its RoCE v2 GIDs."""
        return tuple(gid.ipv4 for port in self.ports for gid in port.gids if gid.is_v2 and gid.ipv4 is not None)

    @property
    def is_ethernet(self) -> bool:
        return any(port.link_layer == "Ethernet" for port in self.ports)


@dataclass(frozen=True, slots=True)
class Netdev:
    name: str
    mtu: int
    operstate: str
    carrier: int
    speed_mbps: int
    addresses: tuple[str, ...]
    bdf: str
    phys_port_name: str

    @property
    def ips(self) -> tuple[str, ...]:
        return tuple(address.partition("/")[0] for address in self.addresses)

    @property
    def is_running(self) -> bool:
        # Loopback and tunnels have no state of their own; the state of others lags behind the carrier by a second.
        return self.operstate in ("up", "unknown") or self.carrier == 1


@dataclass(frozen=True, slots=True)
class HostGpu:
    index: int
    name: str
    bdf: str
    path: tuple[str, ...]
    numa_node: int


@dataclass(frozen=True, slots=True)
class Listener:
    port: int
    pid: int
    command: str


@dataclass(frozen=True, slots=True)
class PathProbe:
    peer: str
    size_bytes: int
    verdict: str
    detail: str


@dataclass(frozen=True, slots=True)
class Driver:
    version: str = ""
    is_open: bool = False
    has_peermem: bool = False
    has_nv_mem: bool = False


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One host as read. Sizes in bytes, -1 where nobody could say. `skew_seconds`: see `node_facts`."""

    hostname: str
    hostname_addresses: tuple[str, ...]
    kernel: str
    python: str
    user_id: int
    is_container: bool
    limits: Mapping[str, tuple[int, int]]
    memory_total_bytes: int
    memory_available_bytes: int
    shm_bytes: int
    numa_nodes: int
    netdevs: tuple[Netdev, ...]
    hcas: tuple[Hca, ...]
    verbs: Mapping[str, str]
    device_nodes: tuple[str, ...]
    has_libibverbs: bool
    gpus: tuple[HostGpu, ...]
    driver: Driver
    acs_redirecting: tuple[str, ...] | None
    environ: Mapping[str, str]
    nccl_files: Mapping[str, tuple[str, ...]]
    listening: tuple[Listener, ...]
    ephemeral_ports: tuple[int, int] | None
    versions: Mapping[str, str]
    tools: Mapping[str, str]
    cdi_missing: tuple[str, ...]
    remove_ipc: str
    oom_kills: int
    paths: tuple[PathProbe, ...]
    skew_seconds: float | None = None

    def netdev(self, name: str) -> Netdev | None:
        return next((netdev for netdev in self.netdevs if netdev.name == name), None)

    def netdev_with(self, ip: str) -> Netdev | None:
        """Return the interface that carries an address, however it is written; all of 127/8 is loopback's."""
        try:
            address = ipaddress.ip_address(ip)
        except ValueError:
            return None
        known = "127.0.0.1" if address.version == 4 and address.is_loopback else address.compressed
        return next((netdev for netdev in self.netdevs if known in netdev.ips), None)

    def hca(self, name: str) -> Hca | None:
        return next((hca for hca in self.hcas if hca.name == name), None)

    def twins(self, hca: Hca) -> tuple[Hca, ...]:
        """Return the other PCI functions of the same cable: same card, same physical port."""
        mine = self._cable(hca)
        if not mine[0]:
            return ()
        return tuple(other for other in self.hcas if other.name != hca.name and self._cable(other) == mine)

    def _cable(self, hca: Hca) -> tuple[str, str]:
        names = [netdev.phys_port_name for netdev in self.netdevs if netdev.name in hca.netdevs]
        return hca.sys_image_guid, names[0] if names else ""

    @property
    def is_unified_memory(self) -> bool:
        return any("GB10" in gpu.name for gpu in self.gpus)


def parse_facts(text: str | bytes) -> dict[str, Any]:
    """Return the JSON object of a collector's output, its last line. Raises: BadFacts."""
    lines = (text.decode("utf-8", "replace") if isinstance(text, bytes) else text).strip().splitlines()
    for line in reversed(lines):
        if line.startswith("{"):
            try:
                raw = json.loads(line)
            except ValueError as error:
                raise BadFacts(f"not JSON: {error}") from error
            if isinstance(raw, dict) and raw.get("facts_version") == FACTS_VERSION:
                return raw
            raise BadFacts("facts of another version of hlaunch")
    raise BadFacts(lines[-1][:200] if lines else "no output")


def node_facts(raw: Mapping[str, Any], *, skew_seconds: float | None = None) -> NodeFacts:
    """Type the collector's object. `skew_seconds` is the least by which the far clock differs from ours."""
    read = _Reader(raw)
    limits = {name: _pair(value) for name, value in read.mapping("limits").items()}
    ephemeral = raw.get("ephemeral_ports")
    acs = raw.get("acs_redirecting")
    driver = _Reader(read.mapping("driver"))
    return NodeFacts(
        hostname=read.text("hostname"),
        hostname_addresses=read.texts("hostname_addresses"),
        kernel=read.text("kernel"),
        python=read.text("python"),
        user_id=read.whole("user_id"),
        is_container=bool(raw.get("is_container")),
        limits=MappingProxyType({name: pair for name, pair in limits.items() if pair is not None}),
        memory_total_bytes=read.whole("memory_total_bytes", 0),
        memory_available_bytes=read.whole("memory_available_bytes", 0),
        shm_bytes=read.whole("shm_bytes"),
        numa_nodes=read.whole("numa_nodes", 1),
        netdevs=tuple(_netdev(item) for item in read.items("netdevs")),
        hcas=tuple(_hca(item) for item in read.items("hcas")),
        verbs=MappingProxyType({item.text("hca"): item.text("name") for item in read.items("verbs")}),
        device_nodes=read.texts("device_nodes"),
        has_libibverbs=bool(raw.get("has_libibverbs")),
        gpus=tuple(
            HostGpu(
                item.whole("index"), item.text("name"), item.text("bdf"), item.texts("path"), item.whole("numa_node")
            )
            for item in read.items("gpus")
        ),
        driver=Driver(
            driver.text("version"), driver.flag("is_open"), driver.flag("has_peermem"), driver.flag("has_nv_mem")
        ),
        acs_redirecting=None if acs is None else read.names("acs_redirecting"),
        environ=read.strings("environ"),
        nccl_files=MappingProxyType(
            {name: tuple(str(line) for line in lines) for name, lines in read.mapping("nccl_files").items()}
        ),
        listening=tuple(
            Listener(item.whole("port"), item.whole("pid", 0), item.text("command")) for item in read.items("listening")
        ),
        ephemeral_ports=_pair(ephemeral),
        versions=read.strings("versions"),
        tools=read.strings("tools"),
        cdi_missing=read.texts("cdi_missing"),
        remove_ipc=read.text("remove_ipc"),
        oom_kills=read.whole("oom_kills"),
        paths=tuple(
            PathProbe(item.text("peer"), item.whole("bytes"), item.text("verdict"), item.text("detail"))
            for item in read.items("paths")
        ),
        skew_seconds=skew_seconds,
    )


class _Reader:
    """Reads fields of an object whose maker we do not trust."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw

    def text(self, name: str) -> str:
        value = self._raw.get(name)
        return value if isinstance(value, str) else ""

    def name(self, name: str) -> str:
        """Read a device's name. Fixes are commands that people paste, so a name is a plain word or `?`."""
        value = self.text(name)
        return value if _WORD.fullmatch(value) else "?"

    def names(self, name: str) -> tuple[str, ...]:
        return tuple(value for value in self.texts(name) if _WORD.fullmatch(value))

    def whole(self, name: str, default: int = -1) -> int:
        value = self._raw.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) else default

    def number(self, name: str) -> float:
        value = self._raw.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0

    def flag(self, name: str) -> bool:
        return self._raw.get(name) is True

    def texts(self, name: str) -> tuple[str, ...]:
        value = self._raw.get(name)
        return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self._raw.get(name)
        return value if isinstance(value, dict) else {}

    def strings(self, name: str) -> Mapping[str, str]:
        return MappingProxyType({key: value for key, value in self.mapping(name).items() if isinstance(value, str)})

    def items(self, name: str) -> Iterator[_Reader]:
        value = self._raw.get(name)
        for item in value if isinstance(value, list) else []:
            if isinstance(item, dict):
                yield _Reader(item)


def _pair(value: object) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(item, int) for item in value):
        return value[0], value[1]
    return None


def _netdev(item: _Reader) -> Netdev:
    return Netdev(
        item.name("name"),
        item.whole("mtu", 0),
        item.text("operstate"),
        item.whole("carrier"),
        item.whole("speed_mbps"),
        item.texts("addresses"),
        item.text("bdf"),
        item.text("phys_port_name"),
    )


def _hca(item: _Reader) -> Hca:
    return Hca(
        item.name("name"),
        item.text("sys_image_guid"),
        item.text("bdf"),
        item.texts("path"),
        item.whole("numa_node"),
        item.text("link_speed"),
        item.whole("link_width", 0),
        item.text("max_link_speed"),
        item.whole("max_link_width", 0),
        item.names("netdevs"),
        tuple(_port(port) for port in item.items("ports")),
    )


def _port(item: _Reader) -> Port:
    counters = {name: value for name, value in item.mapping("counters").items() if isinstance(value, int)}
    return Port(
        item.whole("port", 1),
        item.text("state"),
        item.text("phys_state"),
        item.text("link_layer"),
        item.number("rate_gbps"),
        tuple(
            Gid(gid.whole("index"), gid.text("gid"), gid.text("type"), gid.text("ndev")) for gid in item.items("gids")
        ),
        MappingProxyType(counters),
    )
