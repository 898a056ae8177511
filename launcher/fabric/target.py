"""What `env` and `doctor` look at: a cluster (declared, or this host alone), a model if one was named, its sources.

Knows: how a command line names a cluster, and where variables of the registry stand in the file. Refuses to know:
hosts.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.commands import Invocation
from launcher.errors import UsageError
from launcher.fabric import catalogue
from launcher.fabric.doctor import NOTHING, Need
from launcher.fabric.dotenv import read_dotenv
from launcher.fabric.environment import Variable, node_environment
from launcher.fabric.selection import platform_of
from launcher.fabric.sources import Source
from launcher.registry import DeclaredCluster, Layer, Registry, ResolvedEntry, Setting, resolve, resolve_cluster
from launcher.registry.cluster import Cluster, Node
from launcher.registry.resolving import find_cluster, unknown_name

THIS_HOST = "this-host"
_OF_CLUSTER = (Layer.CLUSTER, Layer.NODE)


@dataclass(frozen=True, slots=True)
class Target:
    """`nodes` are those asked for, all without `--node`. `declared` is None for this host alone."""

    cluster: Cluster
    nodes: tuple[Node, ...]
    entry: ResolvedEntry | None = None
    registry: Registry | None = None
    declared: DeclaredCluster | None = None

    @property
    def need(self) -> Need:
        """What the model asks of each node."""
        if self.entry is None:
            return NOTHING
        return Need(self.entry.number_or_none("gpu-memory-utilization") or 0.0, self.entry.integer("port"))


def find_target(invocation: Invocation, model: str | None, cluster: str | None, node: str | None) -> Target:
    """Resolve names of the command line. Raises: RegistryError; UnknownName for a model, cluster or node.

    The cluster is the named one, else `HLAUNCH_CLUSTER`, else the model's own, else the one with the named node, else
    this host alone. Without a model, a cluster and a node no registry is needed.
    """
    name = cluster or invocation.environ.get("HLAUNCH_CLUSTER") or None
    if model is None and name is None and node in (None, socket.gethostname()):
        return _chosen(this_host(), node)
    registry = invocation.load_registry()
    if model is None and name is None and node is not None:
        name = _cluster_with(registry, node)
    entry = None
    if model is not None:
        entry = resolve(registry, model, invocation.environ)
        invocation.console.issues(entry.issues)
        name = name or entry.cluster_name
    if name is None:
        return _chosen(this_host(), node, entry, registry)
    found = resolve_cluster(registry, name, invocation.environ, entry)
    return _chosen(found, node, entry, registry, find_cluster(registry, name))


def _cluster_with(registry: Registry, node: str) -> str:
    """Name the cluster that has a node; of several the defaults'. Raises: UnknownName; UsageError when it is open."""
    names = {name: [item.name for item in declared.cluster.nodes] for name, declared in registry.clusters.items()}
    found = [name for name, nodes in names.items() if node in nodes]
    usual = registry.defaults.settings.get("cluster")
    if usual is not None and usual.value in found:
        return str(usual.value)
    if not found:
        known = [item for nodes in names.values() for item in nodes]
        raise unknown_name("node", node, known, f"the clusters of {registry.source}")
    if len(found) > 1:
        raise UsageError(f"node {node} is in several clusters", hint=f"add --cluster {' or --cluster '.join(found)}")
    return found[0]


def this_host() -> Cluster:
    """A cluster of one: this machine, reached without ssh."""
    return Cluster(THIS_HOST, (Node(socket.gethostname(), "head", "127.0.0.1"),))


def _chosen(
    cluster: Cluster,
    node: str | None,
    entry: ResolvedEntry | None = None,
    registry: Registry | None = None,
    declared: DeclaredCluster | None = None,
) -> Target:
    nodes = cluster.nodes
    if node is not None:
        nodes = tuple(item for item in cluster.nodes if item.name == node)
        if not nodes:
            raise unknown_name("node", node, [item.name for item in cluster.nodes], f"cluster '{cluster.name}'")
    return Target(cluster, nodes, entry, registry, declared)


def sources_of(target: Target, environ: Mapping[str, str], env_files: Sequence[Path] = ()) -> list[Source]:
    """List where variables stand, with lines: this process, `.env` files, the env of model, cluster and nodes."""
    found = [Source("process environment", "process", _judged(environ))]
    for path in env_files:
        dotenv = read_dotenv(path)
        found.append(
            Source(str(path), "file", dotenv.values, lines=dotenv.lines, quoted=dotenv.quoted, unread=dotenv.unread)
        )
    if target.entry is not None:
        # A resolved entry already holds what its cluster says; that has lines of its own below.
        kept = {name: item for name, item in target.entry.env.items() if item.value is not None}
        values = {name: str(item.value) for name, item in kept.items() if item.origin.layer not in _OF_CLUSTER}
        found.append(Source(f"env of '{target.entry.name}'", "model", values))
    found += declared_sources(target)
    return [source for source in found if source.values or source.unread]


def declared_sources(target: Target) -> list[Source]:
    """List what the registry's cluster says, each block with its lines in the file."""
    if target.declared is None or target.registry is None:
        return []
    file = target.registry.source
    found = [_declared(file, target.declared.env)]
    found += [_declared(file, settings, node) for node, settings in target.declared.node_env.items()]
    return [source for source in found if source.values]


def _judged(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if catalogue.is_ours_to_judge(name)}


def _declared(file: str, settings: Mapping[str, Setting], node: str | None = None) -> Source:
    kept = {name: setting for name, setting in settings.items() if setting.value is not None}
    return Source(
        file,
        "cluster" if node is None else "node",
        {name: str(setting.value) for name, setting in kept.items()},
        node,
        {name: setting.mark.line for name, setting in kept.items()},
    )


def node_variables(target: Target, node: Node, environ: Mapping[str, str]) -> tuple[Variable, ...]:
    """List a node's variables of the fabric, the model's env among them where the cluster says nothing."""
    found = {item.name: item for item in node_environment(target.cluster, node, environ)}
    declared = {*target.cluster.env, *node.env}
    for name, setting in (target.entry.env if target.entry is not None else {}).items():
        if name in declared or setting.value is None or not catalogue.is_ours_to_judge(name):
            continue
        below = found.get(name)
        shadowed = () if below is None else (replace(below, shadowed=()), *below.shadowed)
        found[name] = Variable(name, str(setting.value), str(setting.origin), shadowed)
    return tuple(found[name] for name in sorted(found))


def explanation(name: str) -> dict[str, str]:
    """Say what a name is, as label and text. Raises: UsageError for a name of no family, with the nearest ones."""
    row = catalogue.find(name)
    if row is not None:
        return {
            "effect": row.effect,
            "read by": row.owner,
            "legal": row.kind.describe(),
            "default": row.default,
            "scope": catalogue.SCOPE_WORDS[row.scope],
            "since": row.since,
            "gone after": row.until,
            "source": row.source,
        }
    if name in catalogue.TORCH_ALIASES:
        return {"effect": "an old name that PyTorch still reads", "instead": catalogue.TORCH_ALIASES[name]}
    dead = catalogue.find_dead(name)
    if dead is not None:
        return {"effect": f"none: {name} {dead.truth}", "instead": dead.instead}
    near = catalogue.suggestions(name)
    hint = f"did you mean {' or '.join(near)}?" if near else "hlaunch env lists what is set"
    raise UsageError(f"no release known here reads '{name}'", hint=hint)


def filled_at_start(cluster: Cluster, node: Node) -> frozenset[str]:
    """Name what only the node's own start can tell: variables that the plan leaves to it."""
    found = set() if node.ifname is not None else {"GLOO_SOCKET_IFNAME"}
    if platform_of(cluster, node) != "cpu":
        found |= {"NCCL_SOCKET_IFNAME"} if node.ifname is None else set()
        if cluster.fabric.rdma != "off":
            found |= {"NCCL_IB_HCA"} if not (node.hcas or cluster.fabric.hcas) else set()
            is_pinned = cluster.fabric.gid_index == "auto-pin" and node.gid_index is None
            found |= {"NCCL_IB_GID_INDEX"} if is_pinned else set()
    return frozenset(found)


def unresolved(target: Target) -> list[str]:
    """Say what only the hosts know, so that a value missing from the list is not taken for one that nobody sets."""
    if target.declared is None:
        return []
    left = {node.name: filled_at_start(target.cluster, node) for node in target.nodes}
    found = []
    nameless = [name for name, variables in left.items() if "GLOO_SOCKET_IFNAME" in variables]
    if nameless:
        found.append(
            f"{', '.join(nameless)}: the interface is the one that carries the node's ip, filled in there at each start"
        )
    auto = [name for name, variables in left.items() if "NCCL_IB_HCA" in variables]
    if auto:
        found.append(f"{', '.join(auto)}: the HCAs are the ACTIVE ones of the subnet, filled in there at each start")
    return found
