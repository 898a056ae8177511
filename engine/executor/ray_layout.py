"""What an engine asks of a Ray cluster, and what of it is missing where: pure functions of a placement and a node list.

Knows: bundles of a placement group, strategies, the `node:ADDRESS` resource by which Ray pins, words for a shortage.
Refuses to know: Ray itself (`ray_cluster` asks it), clocks.

One bundle per node: the ranks of a node stand and fall together, and start as one node host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from engine.placement import Placement, RankSpec

Strategy = Literal["STRICT_SPREAD", "PACK"]
PIN = 0.001
"""What a bundle takes of `node:ADDRESS`, of which every node has 1: a thousand bundles may be pinned to a node."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """What one node must have. `address` empty: any node will do. A CPU rank takes one CPU, a GPU rank one GPU."""

    node: str
    address: str
    ranks: tuple[int, ...]
    num_cpus: int
    num_gpus: int

    @property
    def resources(self) -> dict[str, float]:
        """The bundle as Ray takes it; never empty, since Ray refuses empty bundles."""
        wanted: dict[str, float] = {}
        if self.num_cpus:
            wanted["CPU"] = self.num_cpus
        if self.num_gpus:
            wanted["GPU"] = self.num_gpus
        if self.address:
            wanted[f"node:{self.address}"] = PIN
        return wanted


@dataclass(frozen=True, slots=True)
class Layout:
    """A placement group: bundles in the order of their first rank."""

    bundles: tuple[Bundle, ...]
    strategy: Strategy

    def index(self, node: str) -> int:
        """The bundle of a node of the placement."""
        return [bundle.node for bundle in self.bundles].index(node)


@dataclass(frozen=True, slots=True)
class RayNode:
    """A node as Ray's head knows it: what it has in all, what nobody has taken of it."""

    id: str
    address: str
    is_alive: bool
    total: Mapping[str, float] = field(default_factory=dict)
    available: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shortage:
    """One thing that is missing. `can_come`: waiting may help (a node that joins, others that give back)."""

    node: str
    what: str
    can_come: bool


def lay_out(placement: Placement, engine: int, addresses: Mapping[str, str]) -> Layout:
    """Make the bundles of one engine; `addresses` are of the placement's nodes by name, as far as they are known.

    Several nodes must be different ones, as the placement says (STRICT_SPREAD); what lies on one node is one bundle,
    which cannot be torn apart.
    """
    by_node: dict[str, list[RankSpec]] = {}
    for rank in placement.engine(engine):
        by_node.setdefault(rank.node, []).append(rank)
    bundles = tuple(
        Bundle(
            node=node,
            address=addresses.get(node, ""),
            ranks=tuple(rank.rank for rank in ranks),
            num_cpus=sum(rank.backend == "cpu" for rank in ranks),
            num_gpus=sum(rank.backend == "cuda" for rank in ranks),
        )
        for node, ranks in by_node.items()
    )
    return Layout(bundles, "STRICT_SPREAD" if len(bundles) > 1 else "PACK")


def find_shortages(layout: Layout, nodes: Sequence[RayNode]) -> tuple[Shortage, ...]:
    """List what the cluster lacks for a layout, in the order of its bundles; empty means that it can be placed now."""
    alive = [node for node in nodes if node.is_alive]
    taken: set[str] = set()
    found: list[Shortage] = []
    for bundle in layout.bundles:
        if bundle.address:
            # A node that was restarted stands beside its own ghost for a while: the one with more to give is meant.
            here = [node for node in alive if node.address == bundle.address]
            best = max(here, key=lambda node: _room(node, bundle), default=None)
            if best is not None:
                taken.add(best.id)
            found += _lacking(bundle, best, nodes)
    for bundle in sorted((b for b in layout.bundles if not b.address), key=lambda b: (-b.num_gpus, -b.num_cpus)):
        free = [node for node in alive if node.id not in taken]
        best = max(free, key=lambda node: _room(node, bundle), default=None)
        if best is None:
            words = f"{len(layout.bundles)} different nodes are needed, {len(alive)} are in the Ray cluster"
            found.append(Shortage(bundle.node, words, can_come=True))
            continue
        taken.add(best.id)
        found += _lacking(bundle, best, nodes)
    return tuple(found)


def _room(node: RayNode, bundle: Bundle) -> tuple[bool, bool, float]:
    wanted = {name: amount for name, amount in bundle.resources.items() if not name.startswith("node:")}
    has = [all(of.get(name, 0) >= amount for name, amount in wanted.items()) for of in (node.available, node.total)]
    return has[0], has[1], sum(node.available.get(name, 0) for name in wanted)


def _lacking(bundle: Bundle, node: RayNode | None, nodes: Sequence[RayNode]) -> list[Shortage]:
    if node is None:
        is_ghost = any(other.address == bundle.address for other in nodes)
        words = "is lost" if is_ghost else "is not in the Ray cluster"
        others = sorted({other.address for other in nodes if other.is_alive})
        there = f" (there: {', '.join(others)})" if others else ""
        return [Shortage(bundle.node, f"{bundle.address} {words}{there}", can_come=True)]
    found = []
    for name, amount in (("CPU", bundle.num_cpus), ("GPU", bundle.num_gpus)):
        has, free = node.total.get(name, 0), node.available.get(name, 0)
        if has < amount:
            words = f"{node.address} has {has:g} {_plural(name, has)}, {amount} are needed"
            found.append(Shortage(bundle.node, words, can_come=False))
        elif free < amount:
            words = f"{node.address}: {free:g} of {has:g} {_plural(name, has)} are free, {amount} are needed"
            found.append(Shortage(bundle.node, words, can_come=True))
    return found


def _plural(name: str, count: float) -> str:
    return name if count == 1 else f"{name}s"


def describe_shortages(shortages: Sequence[Shortage]) -> str:
    """Say everything that is missing in one line."""
    return "; ".join(f"{item.node}: {item.what}" for item in shortages)


def needed_and_there(layout: Layout, nodes: Sequence[RayNode]) -> str:
    """Set what a layout needs beside what each node has, as a table for the log."""
    alive = {node.address: node for node in nodes if node.is_alive}
    rows = [("node", "address", "needs", "free", "has")]
    for bundle in layout.bundles:
        node = alive.get(bundle.address)
        rows.append((
            bundle.node,
            bundle.address or "any",
            _amounts({"CPU": bundle.num_cpus, "GPU": bundle.num_gpus}),
            _amounts(node.available) if node is not None else "not there",
            _amounts(node.total) if node is not None else "",
        ))  # fmt: skip
    named = {bundle.address for bundle in layout.bundles}
    rows += [
        ("", node.address, "", _amounts(node.available), _amounts(node.total))
        for address, node in sorted(alive.items())
        if address not in named
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)) or "nothing"
