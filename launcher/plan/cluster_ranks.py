"""Ranks on the nodes of a cluster: who starts them, and what the engine is told of nodes and addresses.

Knows: how a placement on declared nodes becomes the engine's configuration, and what of it cannot run yet. Refuses to
know: how ranks are started (the engine's executors), where Ray's token lies (`launcher.compose`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from engine.config import EngineConfig, NodesConfig
from engine.placement import Placement
from launcher.addresses import host_and_port
from launcher.errors import HlaunchError, PreflightError
from launcher.plan.placing import with_placement
from launcher.registry.cluster import Cluster
from launcher.registry.types import ResolvedEntry

ExecutorName = Literal["inline", "multiproc", "multinode", "ray", "ray-cgraph"]
PLACEMENT_TIMEOUT_SECONDS = 300.0
"""As long as nodes get to join: a node that comes back within it finds its engine waiting."""


def executor_of(entry: ResolvedEntry, cluster: Cluster, placement: Placement | None) -> ExecutorName:
    """Say who runs the ranks: what the entry asks for, else the least that reaches all of them."""
    asked = entry.text("distributed-executor-backend")
    is_elsewhere = placement is not None and any(node != cluster.head.name for node in placement.nodes)
    if asked == "ray-cgraph":
        return "ray-cgraph"
    if asked == "ray":
        return "ray"
    if asked == "uni":
        return "inline"
    if is_elsewhere:
        return "ray" if asked == "auto" and cluster.ray is not None else "multinode"
    return "inline" if placement is None or placement.is_single_rank else "multiproc"


def with_ranks(config: EngineConfig, cluster: Cluster, placement: Placement, executor: ExecutorName) -> EngineConfig:
    """Hand the placement to the engine, with the nodes' names and addresses, the head's first."""
    if executor == "inline":
        return config
    config = replace(with_placement(config, placement), node_address=cluster.head.ip)
    others = [node for node in cluster.nodes if node.name != cluster.head.name and node.name in placement.nodes]
    nodes = (cluster.head, *others)
    is_ray = executor in ("ray", "ray-cgraph")
    if executor == "multiproc" or (len(nodes) == 1 and not is_ray):
        return replace(config, nodes=NodesConfig(names=(cluster.head.name,), head_host=cluster.head.ip))
    return replace(
        config,
        executor="ray-cgraph" if executor == "ray-cgraph" else "ray" if is_ray else "multinode",
        nodes=NodesConfig(
            names=tuple(node.name for node in nodes),
            addresses=tuple(node.ip for node in nodes),
            head_host=cluster.head.ip,
            ray_address=_ray_address(cluster) if is_ray else "",
            placement_timeout_seconds=PLACEMENT_TIMEOUT_SECONDS,
        ),
    )


def _ray_address(cluster: Cluster) -> str:
    return host_and_port(cluster.head.ip, cluster.ray.port if cluster.ray is not None else 6379)


def rank_problems(placement: Placement, executor: ExecutorName) -> tuple[HlaunchError, ...]:
    """List what no node could run, whoever starts it."""
    if executor != "ray-cgraph" or all(rank.backend == "cpu" for rank in placement.ranks):
        return ()
    message = f"{placement.sizes}: distributed-executor-backend ray-cgraph runs CPU ranks, and these are on GPUs"
    return (PreflightError(message, hint="use distributed-executor-backend ray or auto"),)


def rank_blockers(placement: Placement, executor: ExecutorName, cluster: Cluster) -> tuple[HlaunchError, ...]:
    """List what keeps these ranks from starting on a cluster, each with what is possible instead."""
    found: list[HlaunchError] = []
    by_hand = "start each node by hand: hlaunch up NAME --nnodes N"
    if executor == "multinode" and cluster.ray is None:
        found.append(
            PreflightError(
                f"{placement.sizes}: ranks on several nodes of a cluster are started by Ray, which it does not declare",
                hint=f"add `ray: {{}}` to the cluster; without Ray, {by_hand}",
            )
        )
    elif executor == "multinode":
        found.append(
            PreflightError(
                f"{placement.sizes}: distributed-executor-backend mp starts no ranks on other nodes of a cluster",
                hint=f"use ray or auto, as the cluster declares Ray; with mp, {by_hand}",
            )
        )
    if any(len({rank.backend for rank in placement.engine(dp)}) > 1 for dp in range(placement.data_parallel_size)):
        found.append(
            PreflightError(
                f"{placement.sizes}: CPU and GPU ranks of one engine are planned, and do not run together yet",
                hint="leave placement.cpu-ranks away",
            )
        )
    return tuple(found)
