"""What carried the bytes: `via …` lines and RDMA counters, turned into one transport per pair of ranks.

Pure. Knows: the two spellings of NCCL 2.28 and 2.30, the same form as the engine's CPU ranks write it, and what the
counters count. Refuses to know: where a log is, how counters are read (`facts`), what to do about it. A line that names
a transport nobody here knows is kept as such, never dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from launcher.fabric.facts import NodeFacts

WORD_BYTES = 4
"""`port_xmit_data` counts words of four bytes."""

_EDGE = re.compile(
    r"(?:Channel (?P<channel>\d+)(?:/\d+)? : )?(?P<source>\d+)\[[0-9a-fx]+\] -> (?P<target>\d+)\[[0-9a-fx]+\]"
    r"(?: \[(?P<side>send|receive)\])? via (?P<way>\S.*?)(?: comm 0x.*)?\s*$"
)
_NET = re.compile(r"NET/(?P<net>[^/]+?)/(?P<device>\d+)(?:\(\d+\))?(?P<gdr>/GDRDMA)?(?:\(PCI\))?(?:/Shared)?$")
_GLOO = re.compile(r"NET/Gloo/(?P<addresses>[0-9A-Fa-f.:,]+|unknown)$")
_MEMBERS = re.compile(r"(?P<process>[^\s:]+:\d+): NCCL's ranks are (?P<ranks>\d+(?: \d+)*)\s*$")
_SPEAKER = re.compile(r"(?P<process>[^\s:]+:\d+):\d+ \[\d+\] NCCL ")
_USING = re.compile(r"Using network (?P<net>\S+)|Assigned NET plugin (?P<plugin>\S+) to comm")
_DEVICE = re.compile(r"NET/IB : Using (?P<devices>.*?)(?:; OOB (?P<oob>\S+?):.*)?$")
_HCA = re.compile(r"\[(?P<index>\d+)\](?P<name>[^:\s]+):(?P<port>\d+)/(?P<layer>RoCE|IB)")
_FALLBACK = ("NET/IB : No device found", "Failed to initialize any NET plugin")


class Transport(StrEnum):
    """What an edge between two ranks is made of."""

    P2P = "P2P"
    SHM = "shared memory"
    RDMA = "RDMA"
    RDMA_GDR = "RDMA with GPUDirect"
    SOCKET = "TCP"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Edge:
    """One connection of a channel. `way` is NCCL's own word for it; `device` the NIC's index, None within a host.

    `addresses` are the local ones of a rank that uses TCP by Gloo.
    """

    source: int
    target: int
    transport: Transport
    way: str
    device: int | None = None
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Network:
    """What NCCL said at start: the net it chose, the HCAs it found, the interface of its bootstrap."""

    chosen: str | None
    hcas: tuple[str, ...]
    link_layers: frozenset[str]
    out_of_band: str | None
    complaints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Attestation:
    """The transport in use per pair of ranks, lower rank first; `unknown` lines are those that name a new way.

    A pair that uses several transports has the slowest one here, because it decides.
    """

    pairs: Mapping[tuple[int, int], Transport]
    edges: tuple[Edge, ...]
    network: Network
    unknown: tuple[str, ...]

    def describe(self) -> str:
        """Put into one line what the log of a node says: the net, its HCAs, its bootstrap, the pairs of ranks."""
        network = self.network
        parts = [f"net {network.chosen}"] if network.chosen else []
        if network.hcas:
            layers = f" ({', '.join(sorted(network.link_layers))})" if network.link_layers else ""
            parts.append(f"HCAs {', '.join(network.hcas)}{layers}")
        if network.out_of_band:
            parts.append(f"bootstrap on {network.out_of_band}")
        parts += [f"ranks {low}-{high} {transport}" for (low, high), transport in self.pairs.items()]
        parts += network.complaints
        return "; ".join(parts)


_SLOWNESS = (
    Transport.P2P,
    Transport.SHM,
    Transport.RDMA_GDR,
    Transport.RDMA,
    Transport.SOCKET,
    Transport.UNKNOWN,
)


def slowest(transports: Iterable[Transport]) -> Transport:
    """Return the one that decides how fast a pair is."""
    return max(transports, key=_SLOWNESS.index)


def edges_of(lines: Iterable[str]) -> tuple[Edge, ...]:
    """Return every edge that the log of one node names, in order, each once.

    NCCL's ranks are those of its communicator; where a process has said which ranks these are, they are translated.
    """
    found: dict[Edge, None] = {}
    members: dict[str, list[int]] = {}
    for line in lines:
        if (told := _MEMBERS.search(line)) is not None:
            members[told["process"]] = [int(rank) for rank in told["ranks"].split()]
            continue
        match = _EDGE.search(line)
        if match is not None:
            speaker = _SPEAKER.search(line)
            ranks = members.get(speaker["process"], []) if speaker is not None else []
            source, target = (_member(ranks, int(match[end])) for end in ("source", "target"))
            found[_edge(source, target, match["way"])] = None
    return tuple(found)


def _member(ranks: list[int], number: int) -> int:
    return ranks[number] if number < len(ranks) else number


def _edge(source: int, target: int, way: str) -> Edge:
    gloo = _GLOO.match(way)
    if gloo is not None:
        known = () if gloo["addresses"] == "unknown" else tuple(gloo["addresses"].split(","))
        return Edge(source, target, Transport.SOCKET, way, None, known)
    transport, device = _transport(way)
    return Edge(source, target, transport, way, device)


def _transport(way: str) -> tuple[Transport, int | None]:
    if way.startswith("P2P/"):
        return Transport.P2P, None
    if way.startswith("SHM/"):
        return Transport.SHM, None
    net = _NET.match(way)
    if net is None:
        return Transport.UNKNOWN, None
    device = int(net["device"])
    name = net["net"].lower()
    if name == "socket":
        return Transport.SOCKET, device
    # Plugins name themselves (IBext_v8, AWS Libfabric); only InfiniBand's own family is known to be RDMA.
    if name.startswith("ib"):
        return (Transport.RDMA_GDR if net["gdr"] else Transport.RDMA), device
    return Transport.UNKNOWN, device


def network_of(lines: Iterable[str]) -> Network:
    """Return what the log says about the net, over all ranks of one node."""
    chosen: str | None = None
    hcas: dict[str, None] = {}
    layers: set[str] = set()
    out_of_band: str | None = None
    complaints: dict[str, None] = {}
    for line in lines:
        using = _USING.search(line)
        if using is not None:
            chosen = using["net"] or using["plugin"]
        device = _DEVICE.search(line)
        if device is not None:
            for hca in _HCA.finditer(device["devices"]):
                hcas[hca["name"]] = None
                layers.add(hca["layer"])
            out_of_band = device["oob"] or out_of_band
        for fragment in _FALLBACK:
            if fragment in line:
                complaints[fragment] = None
    return Network(chosen, tuple(hcas), frozenset(layers), out_of_band, tuple(complaints))


def attest(lines: Iterable[str]) -> Attestation:
    """Judge the logs of all ranks of a launch, in any order."""
    kept = list(lines)
    edges = edges_of(kept)
    pairs: dict[tuple[int, int], Transport] = {}
    for edge in edges:
        pair = (min(edge.source, edge.target), max(edge.source, edge.target))
        pairs[pair] = slowest((pairs.get(pair, Transport.P2P), edge.transport))
    unknown = tuple(dict.fromkeys(edge.way for edge in edges if edge.transport is Transport.UNKNOWN))
    return Attestation(dict(sorted(pairs.items())), edges, network_of(kept), unknown)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one HCA carried between two looks, in bytes, and the errors of its transport in that time."""

    hca: str
    sent_bytes: int
    received_bytes: int
    errors: Mapping[str, int]


def traffic_between(before: NodeFacts, after: NodeFacts) -> tuple[Traffic, ...]:
    """Compare the RDMA counters of a node; HCAs that appeared or went are left out, a wrapped counter counts as 0."""
    found = []
    for hca in after.hcas:
        earlier = before.hca(hca.name)
        if earlier is None:
            continue
        old = {(port.port, name): value for port in earlier.ports for name, value in port.counters.items()}
        delta: dict[str, int] = {}
        for port in hca.ports:
            for name, value in port.counters.items():
                delta[name] = delta.get(name, 0) + max(0, value - old.get((port.port, name), value))
        sent, received = delta.pop("port_xmit_data", 0), delta.pop("port_rcv_data", 0)
        errors = {name: value for name, value in sorted(delta.items()) if value}
        found.append(Traffic(hca.name, sent * WORD_BYTES, received * WORD_BYTES, errors))
    return tuple(found)


def carried_by_rdma(traffic: Iterable[Traffic], expected_bytes: int) -> bool:
    """Say whether the counters prove that at least half of what was sent went through the HCAs.

    Half, because both ranks' share of an all-reduce depends on the algorithm; TCP leaves these counters where they are.
    """
    return sum(item.sent_bytes for item in traffic) * 2 >= expected_bytes > 0
