"""Where variables stand, and what each node sees of them in the end.

Pure. Knows: places and their precedence, merging per node. Refuses to know: what is right or wrong (`lint`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from launcher.fabric import catalogue
from launcher.fabric.dotenv import UnreadLine
from launcher.fabric.facts import NodeFacts
from launcher.fabric.finding import Finding, finding
from launcher.registry.cluster import Cluster, Node

Place = Literal["process", "image", "file", "fabric", "model", "cluster", "node"]
"""Lowest precedence first."""

PLACES: tuple[Place, ...] = ("process", "image", "file", "fabric", "model", "cluster", "node")


@dataclass(frozen=True, slots=True)
class Source:
    """Variables from one place. `node` None: they reach every node. `lines` are positions in a file.

    `quoted` are names whose value a file quotes; `unread` are its lines that say nothing, see `DotEnv`.
    """

    label: str
    place: Place
    values: Mapping[str, str]
    node: str | None = None
    lines: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    quoted: frozenset[str] = frozenset()
    unread: Mapping[int, UnreadLine] = field(default_factory=lambda: MappingProxyType({}))

    def at(self, name: str) -> str:
        """Return `label` or `label:line` of a variable."""
        return f"{self.label}:{self.lines[name]}" if name in self.lines else self.label


@dataclass(frozen=True, slots=True)
class Setting:
    """The value that wins on a node, and where it stands."""

    value: str
    source: Source


@dataclass(frozen=True, slots=True)
class NodeView:
    """What one node will see. `node` and `facts` are None for a set of variables without a cluster."""

    settings: Mapping[str, Setting]
    cluster: Cluster | None = None
    node: Node | None = None
    facts: NodeFacts | None = None

    def value(self, name: str) -> str | None:
        found = self.settings.get(name)
        return found.value if found is not None else None


def registry_sources(cluster: Cluster) -> list[Source]:
    """Return what the registry says: the cluster's block, then each node's."""
    found = [Source(f"cluster '{cluster.name}' env", "cluster", cluster.env)]
    found += [Source(f"node '{node.name}' env", "node", node.env, node.name) for node in cluster.nodes]
    return [source for source in found if source.values]


def node_views(
    sources: Sequence[Source], cluster: Cluster | None, facts: Mapping[str, NodeFacts]
) -> tuple[NodeView, ...]:
    """Merge the sources per node by precedence; one nameless view without a cluster."""
    ranked = sorted(sources, key=lambda source: PLACES.index(source.place))
    if cluster is None:
        return (NodeView(_settings(ranked, None)),)
    return tuple(NodeView(_settings(ranked, node.name), cluster, node, facts.get(node.name)) for node in cluster.nodes)


def _settings(ranked: Sequence[Source], node: str | None) -> Mapping[str, Setting]:
    chosen: dict[str, Setting] = {}
    for source in ranked:
        if source.node in (None, node):
            chosen.update({name: Setting(value, source) for name, value in source.values.items()})
    return MappingProxyType(chosen)


def said(code: str, name: str, value: str, source: Source, cause: str = "", fix: str = "") -> Finding:
    """Make a finding about one variable of one source; its value is shown unless it is a secret."""
    shown = catalogue.shown(name, value)
    return finding(code, subject=name, where=source.at(name), evidence=f"{name}={shown}", cause=cause, fix=fix)
