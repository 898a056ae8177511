"""The node's own look at its fabric, right before it starts: what `auto` means here, whether the declared is there.

Knows: which variables only a host can fill in, which faults make a start pointless, the versions that must agree.
Refuses to know: how a host is read (`launcher.fabric.collector`), Ray, the engine.

The machine that renders a plan may be a laptop: interfaces, HCAs and GIDs are read where they are, and again at every
start, since a GID moves when an address does. What the plan or the node's own environment sets is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import PreflightError
from launcher.fabric import catalogue
from launcher.fabric.checks_host import host_findings
from launcher.fabric.checks_rdma import rdma_findings
from launcher.fabric.context import NodeContext
from launcher.fabric.environment import as_mapping, node_environment
from launcher.fabric.facts import NodeFacts
from launcher.fabric.finding import Finding, ordered
from launcher.fabric.remote import Unreachable, read_tree
from launcher.registry.cluster import Cluster, Fabric, Node

FATAL_HERE = frozenset({"ifname-absent", "node-ip-absent", "link-down"})
"""With one of these no other node can reach this one, whatever the fabric is."""


@dataclass(frozen=True, slots=True)
class NodeFabric:
    """What a node must know to fill in `auto`: its cluster's fabric, and what was declared of itself."""

    platform: str = "auto"
    fabric: Fabric = Fabric()
    ifname: str | None = None
    hcas: tuple[str, ...] = ()
    gid_index: int | None = None

    @classmethod
    def of(cls, cluster: Cluster, node: Node) -> NodeFabric:
        return cls(cluster.platform, cluster.fabric, node.ifname, node.hcas, node.gid_index)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> NodeFabric:
        """Read what `dataclasses.asdict` made. Raises: TypeError, KeyError for anything else."""
        fabric = Fabric(**{**data["fabric"], "hcas": tuple(data["fabric"]["hcas"])})
        return cls(**{**data, "fabric": fabric, "hcas": tuple(data["hcas"])})

    def cluster(self, name: str, node: str, role: str, ip: str, gpus: int) -> Cluster:
        """Make a cluster of this one node, as the fabric's rules look at it."""
        own = Node(node, role, ip, gpus=gpus, ifname=self.ifname, hcas=self.hcas, gid_index=self.gid_index)
        return Cluster(name, (own,), platform=self.platform, fabric=self.fabric)


@dataclass(frozen=True, slots=True)
class OwnNode:
    """What was found: variables to add, what to say of them, versions by name."""

    environment: Mapping[str, str] = field(default_factory=dict)
    said: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def look(cluster: Cluster, environ: Mapping[str, str], *, root: Path = Path("/")) -> OwnNode:
    """Read this host for the one node of `cluster`.

    Raises: PreflightError when the declared fabric is not here, with the first fault, its evidence and its fix.
    """
    facts = read_tree(root)
    if isinstance(facts, Unreachable):
        raise PreflightError(f"this host cannot be read: {facts.reason}", hint=facts.fix)
    node = cluster.nodes[0]
    faults = fatal_faults(cluster, node, facts)
    if faults:
        first = faults[0]
        raise PreflightError(
            f"{first.subject}: {first.cause} ({first.evidence})",
            details=[f"{fault.code} {fault.subject}: {fault.evidence}" for fault in faults[1:]],
            hint=f"{first.fix}; all of it: hlaunch doctor",
        )
    measured = measured_variables(cluster, node, facts, environ)
    said = tuple(f"{name}={value}, as measured here" for name, value in measured.items())
    return OwnNode(measured, said, {**facts.versions, "python": facts.python, "driver": facts.driver.version})


def fatal_faults(cluster: Cluster, node: Node, facts: NodeFacts) -> list[Finding]:
    """List the faults with which a start would end in a hang; RDMA's only where it is required."""
    context = NodeContext(cluster, node, facts)
    found = [item for item in host_findings(context) if item.code in FATAL_HERE and item.severity == "error"]
    if context.needs_rdma:
        found += [item for item in rdma_findings(context) if item.severity == "error"]
    return ordered(found)


def measured_variables(cluster: Cluster, node: Node, facts: NodeFacts, environ: Mapping[str, str]) -> dict[str, str]:
    """Return what only the facts of this host tell, in name order; names that are set already are left out."""
    declared = as_mapping(node_environment(cluster, node, {}))
    known = as_mapping(node_environment(cluster, node, {}, facts))
    return {name: value for name, value in known.items() if name not in declared and name not in environ}


def shown_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the fabric in name order, as they may be printed."""
    return {name: catalogue.shown(name, environ[name]) for name in sorted(environ) if catalogue.is_ours_to_judge(name)}
