"""The whole examination of a cluster: facts of every node in, one sorted list of findings out.

Pure, apart from the reading that `examine` asks `remote` for. Knows: which checks run on what. Refuses to know: how a
finding is printed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.fabric import catalogue
from launcher.fabric.checks_cluster import cluster_findings
from launcher.fabric.checks_host import host_findings
from launcher.fabric.checks_rdma import rdma_findings
from launcher.fabric.context import NodeContext
from launcher.fabric.environment import node_environment
from launcher.fabric.facts import NodeFacts
from launcher.fabric.finding import Finding, finding, ordered
from launcher.fabric.lint import lint
from launcher.fabric.ports import pinned_ports
from launcher.fabric.remote import Unreachable
from launcher.fabric.sources import Place, Source, registry_sources
from launcher.registry.cluster import Cluster, Node


@dataclass(frozen=True, slots=True)
class Need:
    """What a model asks of its nodes: a share of their memory (0: no model) and a port for its API."""

    memory_share: float = 0.0
    api_port: int | None = None


NOTHING = Need()


def diagnose(
    cluster: Cluster,
    read: Mapping[str, NodeFacts | Unreachable],
    need: Need = NOTHING,
    *,
    sources: Sequence[Source] | None = None,
) -> list[Finding]:
    """Judge what was read of a cluster; errors first. Nodes absent from `read` are not judged.

    `sources` are those of the registry with their lines; None: the bare values of the cluster.
    """
    found: list[Finding] = []
    contexts: list[NodeContext] = []
    for node in cluster.nodes:
        answer = read.get(node.name)
        if isinstance(answer, Unreachable):
            found.append(
                finding(
                    "node-unreachable",
                    subject=node.ssh or node.ip,
                    where=node.name,
                    evidence=answer.reason,
                    fix=answer.fix,
                )
            )
        elif answer is not None:
            contexts.append(_context(cluster, node, answer, need))
    for context in contexts:
        found += rdma_findings(context)
        found += host_findings(context)
    if contexts:
        found += cluster_findings(contexts)
        facts = {context.name: context.facts for context in contexts}
        declared = registry_sources(cluster) if sources is None else sources
        found += lint(
            [*declared, *_sources(cluster, contexts)], cluster=cluster, facts=facts, nccl_version=_nccl(facts)
        )
    return ordered(found)


def _nccl(facts: Mapping[str, NodeFacts]) -> str:
    """Return the oldest NCCL that a node has, so that what only newer ones know is said; else the usual release."""
    versions = [
        version for fact in facts.values() for name, version in fact.versions.items() if name.startswith("nvidia-nccl")
    ]
    return min(versions, key=catalogue.release, default=catalogue.HOST_NCCL)


def _context(cluster: Cluster, node: Node, facts: NodeFacts, need: Need) -> NodeContext:
    total = node.gpu_memory_bytes or facts.memory_total_bytes
    ports = pinned_ports(cluster, node, need.api_port)
    return NodeContext(cluster, node, facts, int(need.memory_share * total), ports)


def _sources(cluster: Cluster, contexts: Sequence[NodeContext]) -> list[Source]:
    """List where variables stand beside the registry: each host's own, and what the fabric renders."""
    found = []
    for context in contexts:
        place: Place = "image" if context.facts.is_container else "process"
        label = f"{'container' if context.facts.is_container else 'login'} on {context.name}"
        own = _own(context) if context.facts.is_container else dict(context.facts.environ)
        found.append(Source(label, place, own, context.name))
        rendered = node_environment(cluster, context.node, {}, context.facts)
        values = {item.name: item.value for item in rendered if item.origin.startswith(("fabric", "preset"))}
        found.append(Source(f"fabric of '{cluster.name}'", "fabric", values, context.name))
    return found


def _own(context: NodeContext) -> dict[str, str]:
    """Return what a container has beyond what we render into it."""
    rendered = {item.name for item in node_environment(context.cluster, context.node, {}, context.facts)}
    return {name: value for name, value in context.facts.environ.items() if name not in rendered}
