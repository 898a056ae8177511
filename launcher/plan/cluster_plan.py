"""A launch on a declared cluster as one frozen value: what every node runs, with which ranks, memory, ports, variables.

Knows: how an entry and a cluster become one. Refuses to know: compose files, ssh, processes; `launcher.compose` renders
this value, `up` obeys it.
Everything is in a fixed order (nodes as declared, ranks by number, ports and variables by name), and nothing depends on
the clock: the same registry gives the same value, and `digest` names it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

from engine.config import ConfigError, EngineConfig, ModelConfig, load_model_config
from engine.placement import (
    Placement,
    PlacementError,
    RankSpec,
    Remark,
    place,
    remarks,
)
from launcher.errors import DoesNotFit, HlaunchError, Issue, PreflightError
from launcher.fabric.declared import launch_findings, problem_of, warnings_of
from launcher.fabric.environment import node_environment
from launcher.plan import settings
from launcher.plan.borders import weighed
from launcher.plan.cluster_ranks import ExecutorName, executor_of, rank_blockers, rank_problems, with_ranks
from launcher.plan.environment import Variable, engine_environment
from launcher.plan.inventory import Inventory, assumption, declared_inventories
from launcher.plan.known_models import known_model
from launcher.plan.links import between_link
from launcher.plan.node_ports import Port, node_ports, port_clashes
from launcher.plan.placing import entry_sizes, expert_notes, hosts_of, no_placement, placement_options, whole_value
from launcher.plan.rank_memory import (
    MemoryReport,
    RankMemory,
    Sizing,
    ranks_do_not_fit,
    report_memory,
    smallest_fitting_split,
)
from launcher.plan.weights import ModelFiles, find_model_files
from launcher.registry.cluster import Cluster, Node
from launcher.registry.types import Layer, ResolvedEntry
from launcher.registry.values import holds_secret

__all__ = [
    "ClusterPlan",
    "ExecutorName",
    "NodePlan",
    "Port",
    "RankMemory",
    "make_cluster_plan",
]


@dataclass(frozen=True, slots=True)
class NodePlan:
    """What one node runs. `node_rank` counts nodes as declared; ranks may be none on a head that only serves.

    `config` is the engine's configuration on this node: the same on all, but for `device`, which is the node's first
    rank's. `config.to_json()` is the file. `environment` is all that the registry says, sorted by name.
    """

    node: Node
    node_rank: int
    ranks: tuple[RankSpec, ...]
    config: EngineConfig
    environment: tuple[Variable, ...]
    ports: tuple[Port, ...]
    memory: tuple[RankMemory, ...]

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def role(self) -> str:
        """`head` or `worker`."""
        return "head" if self.is_head else "worker"

    @property
    def is_head(self) -> bool:
        return self.node.role == "head"

    @property
    def gpus(self) -> tuple[int, ...]:
        """Indices of the GPUs that ranks of this node use, in rank order."""
        return tuple(int(rank.device.partition(":")[2]) for rank in self.ranks if rank.device.startswith("cuda:"))


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """One launch on a cluster. `problems` make it impossible, `blockers` are repaired outside it (files, secrets).

    `placement` and `model` are None only when a problem says why; `digest` is the SHA-256 of everything that a node
    would see, as hex. `warnings` are about variables. `cluster` and `nodes` are what the launch needs of the declared
    cluster; nodes that it does not use are named in `unused`, and nothing is rendered, started or asked there.
    """

    entry: ResolvedEntry
    cluster: Cluster
    model: ModelConfig | None
    placement: Placement | None
    executor: ExecutorName
    nodes: tuple[NodePlan, ...]
    digest: str
    remarks: tuple[Remark, ...] = ()
    inventories: tuple[Inventory, ...] = ()
    problems: tuple[HlaunchError, ...] = ()
    blockers: tuple[HlaunchError, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[Issue, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def head(self) -> NodePlan:
        return next(node for node in self.nodes if node.is_head)

    @property
    def workers(self) -> tuple[NodePlan, ...]:
        return tuple(node for node in self.nodes if not node.is_head)

    @property
    def ready_timeout_seconds(self) -> float:
        return self.entry.number("ready.timeout")

    def check_problems(self) -> None:
        """Raise the first problem of the plan itself, if there is one."""
        for error in self.problems:
            raise error

    def check(self) -> None:
        """Raise the first reason why the cluster must not start, if there is one."""
        for error in (*self.problems, *self.blockers):
            raise error


def make_cluster_plan(
    entry: ResolvedEntry,
    cluster: Cluster,
    environ: Mapping[str, str],
    *,
    base: Path | None = None,
    inventories: Mapping[str, Inventory] | None = None,
) -> ClusterPlan:
    """Plan the launch of `entry` on `cluster`.

    `inventories` by node name replace what the cluster declares. Reads the model's small files if they are here; starts
    and writes nothing. Raises: DoesNotFit when the entry's values contradict each other.
    """
    hardware = {**declared_inventories(cluster), **(inventories or {})}
    files = find_model_files(entry.model, entry.text_or_none("revision"), environ, base or entry.registry.parent)
    digests, key_error = settings.api_key_digests(entry, environ)
    is_gpu = entry.text("device") != "cpu" and any(hardware[node.name].gpus for node in cluster.nodes)
    config = settings.engine_config(entry, files.folder, digests, "cuda:0" if is_gpu else "cpu")
    problems = list(settings.refusals(entry, config.device))
    blockers: list[HlaunchError] = [error for error in (key_error,) if error is not None]
    model = _model(entry, files, problems)
    sizes = entry_sizes(entry)
    options = placement_options(entry)
    hosts = hosts_of(cluster, hardware, sizes.world, is_gpu=is_gpu, cpu_ranks=options.cpu_ranks * sizes.data)
    placement, report = None, MemoryReport(())
    found: tuple[Remark, ...] = ()
    if model is not None:
        if config.max_model_len > model.max_position_embeddings:
            limit = model.max_position_embeddings
            message = f"max-model-len {config.max_model_len} is above the model's {limit} positions"
            problems.append(DoesNotFit(message, hint=f"add --set max-model-len={limit}, or leave it at auto"))
        try:
            placement = place(model, sizes, hosts, options)
        except PlacementError as error:
            problems.append(no_placement(error, sizes))
    if placement is not None and model is not None:
        spare = whole_value(entry, "ready.min-free-memory", 0)
        sizing = Sizing(config, model, hardware, files.folder, spare)
        report = report_memory(placement, sizing)
        found = _remarks(placement, sizing, cluster)
        if not report.fits:
            more = smallest_fitting_split(placement, sizing, hosts, options)
            problems.append(ranks_do_not_fit(report, (*report.suggestions, *more)))
    executor = executor_of(entry, cluster, placement)
    if placement is not None:
        problems += rank_problems(placement, executor)
        blockers += rank_blockers(placement, executor, cluster)
        config = with_ranks(config, cluster, placement, executor)
    used = _in_use(cluster, placement, is_gpu=is_gpu)
    nodes = tuple(
        _node_plan(entry, used, node, number, config, placement, report) for number, node in enumerate(used.nodes)
    )
    for node in nodes:
        problems += port_clashes(node.name, node.ports)
    lint = launch_findings(entry, cluster)
    if (problem := problem_of(lint)) is not None:
        problems.append(problem)
    return ClusterPlan(
        entry=entry,
        cluster=used,
        model=model,
        placement=placement,
        executor=executor,
        nodes=nodes,
        digest=_digest(entry.model, used, nodes, placement),
        remarks=found,
        inventories=tuple(hardware[node.name] for node in used.nodes),
        unused=tuple(node.name for node in cluster.nodes if node.name not in {item.name for item in used.nodes}),
        problems=tuple(problems),
        blockers=tuple(blockers),
        notes=_notes(entry, config, files, model, _assumption(cluster, hardware, placement)),
        warnings=warnings_of(lint),
    )


def _in_use(cluster: Cluster, placement: Placement | None, *, is_gpu: bool) -> Cluster:
    """Leave out what a launch does not need: nodes without ranks but the head, and for CPU ranks all that GPUs need."""
    if placement is None:
        return cluster
    nodes = [
        node if placement.on_node(node.name) else replace(node, gpus=0)
        for node in cluster.nodes
        if node.role == "head" or placement.on_node(node.name)
    ]
    if is_gpu:
        return replace(cluster, nodes=tuple(nodes))
    return replace(
        cluster,
        nodes=tuple(replace(node, gpus=0, env=_without_nccl(node.env)) for node in nodes),
        platform="cpu",
        fabric=replace(cluster.fabric, rdma="off"),
        env=_without_nccl(cluster.env),
    )


def _without_nccl(env: Mapping[str, str]) -> Mapping[str, str]:
    return MappingProxyType({name: value for name, value in env.items() if not _is_nccl(name)})


def _is_nccl(name: str) -> bool:
    return name.startswith("NCCL_")


def _model(entry: ResolvedEntry, files: ModelFiles, problems: list[HlaunchError]) -> ModelConfig | None:
    if files.folder is not None:
        try:
            return load_model_config(files.folder)
        except ConfigError as error:
            problems.append(PreflightError(str(error), hint=error.hint))
            return None
    model = known_model(entry.model)
    if model is None:
        problems.append(files.absent())
    return model


def _remarks(placement: Placement, sizing: Sizing, cluster: Cluster) -> tuple[Remark, ...]:
    found = remarks(placement, sizing.model, has_rdma=cluster.fabric.rdma != "off")
    return weighed(found, placement, sizing, between_link(cluster, sizing.inventories))


def _node_plan(
    entry: ResolvedEntry,
    cluster: Cluster,
    node: Node,
    number: int,
    config: EngineConfig,
    placement: Placement | None,
    report: MemoryReport,
) -> NodePlan:
    ranks = placement.on_node(node.name) if placement is not None else ()
    numbers = {rank.rank for rank in ranks}
    device = ranks[0].device if ranks and ranks[0].backend == "cuda" else "cpu"
    return NodePlan(
        node=node,
        node_rank=number,
        ranks=ranks,
        config=replace(config, device=device),
        environment=_environment(entry, cluster, node),
        ports=node_ports(cluster, node, config.server.host, config.server.port),
        memory=tuple(item for item in report.ranks if item.rank in numbers),
    )


def _environment(entry: ResolvedEntry, cluster: Cluster, node: Node) -> tuple[Variable, ...]:
    """Join what the engine always gets, the fabric's, and the entry's; what a cluster or node sets by name wins.

    Only a flag of this run (`--set env.NAME=…`) goes over a cluster's and a node's word. Nothing of the shell that
    plans stands here: who renders the same registry gets the same files. A start carries along what may travel.
    """
    chosen = {item.name: item for item in engine_environment(entry, {})}
    if cluster.platform == "cpu":
        of_cluster = {name for name, item in entry.env.items() if item.origin.layer in (Layer.CLUSTER, Layer.NODE)}
        chosen = {name: item for name, item in chosen.items() if not (name in of_cluster and _is_nccl(name))}
    flagged = {name for name, item in entry.env.items() if item.origin.layer is Layer.FLAG}
    declared = {*cluster.env, *node.env} - flagged
    for item in node_environment(cluster, node, {}):
        if item.name not in entry.env or item.name in declared:
            chosen[item.name] = Variable(item.name, item.value, item.origin)
    return tuple(chosen[name] for name in sorted(chosen))


def _travelling(config: EngineConfig, model: str) -> EngineConfig:
    """The configuration without what only this host knows: where the model lies here, digests of keys."""
    return replace(config, model=model, server=replace(config.server, api_key_sha256=()))


def _digest(model: str, cluster: Cluster, nodes: Sequence[NodePlan], placement: Placement | None) -> str:
    """Name everything that a node would see. Values of secrets stay out: a digest of a weak one could be guessed."""
    bare = replace(cluster, env={}, nodes=tuple(replace(node.node, env={}) for node in nodes))
    seen = {
        "cluster": repr(bare),
        "placement": placement.to_json() if placement is not None else None,
        "nodes": [
            {
                "config": _travelling(node.config, model).to_json(),
                "environment": [
                    [item.name, "" if holds_secret(item.name, item.value or "") else item.value]
                    for item in node.environment
                ],
                "ports": [asdict(port) for port in node.ports],
            }
            for node in nodes
        ],
    }
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


def _assumption(cluster: Cluster, hardware: Mapping[str, Inventory], placement: Placement | None) -> str:
    if placement is None:
        return ""
    used = {name: {rank.backend for rank in placement.on_node(name)} for name in placement.nodes}
    return assumption(cluster, hardware, used)


def _notes(
    entry: ResolvedEntry, config: EngineConfig, files: ModelFiles, model: ModelConfig | None, assumed: str
) -> tuple[str, ...]:
    found = [*settings.notes(entry, config.device), *expert_notes(entry, entry_sizes(entry))]
    if files.folder is None and model is not None:
        found.append(f"{entry.model}: no files here, sizes come from the shape; every node needs the files")
    if assumed:
        found.append(assumed)
    return tuple(found)
