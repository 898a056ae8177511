"""All variables of each node of a launch, the container's own among them, as `hlaunch env` explains them.

Knows: which plan and which compose file say it. Refuses to know: what a variable means (`launcher.fabric`), terminals.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from launcher.compose.render import service_environment
from launcher.compose.yaml_text import Interpolated
from launcher.errors import UsageError
from launcher.fabric.environment import Variable
from launcher.plan.cluster_plan import ClusterPlan, NodePlan, make_cluster_plan
from launcher.plan.environment import engine_environment
from launcher.plan.inventory import read_inventory
from launcher.plan.launch_plan import LaunchPlan, make_plan
from launcher.registry.cluster import Cluster
from launcher.registry.types import ResolvedEntry

CONTAINER = "the container (hlaunch render)"


def plan_of(entry: ResolvedEntry, cluster: Cluster | None, environ: Mapping[str, str]) -> ClusterPlan | LaunchPlan:
    """Plan a launch for its variables. Raises: DoesNotFit when values contradict each other."""
    if cluster is not None:
        return make_cluster_plan(entry, cluster, environ)
    return make_plan(entry, read_inventory(), environ, Path(entry.name))


def node_variables(plan: ClusterPlan) -> dict[str, dict[str, Variable]]:
    """Return, by node, every variable that its rendered file holds, by name."""
    return {node.name: _of_node(node, plan.cluster) for node in plan.nodes}


def host_variables(entry: ResolvedEntry, environ: Mapping[str, str]) -> dict[str, Variable]:
    """Return every variable of an engine on this host, by name."""
    found = engine_environment(entry, environ)
    return {item.name: Variable(item.name, item.value, item.origin) for item in found if item.value is not None}


def _of_node(node: NodePlan, cluster: Cluster) -> dict[str, Variable]:
    origins = {item.name: item.origin for item in node.environment}
    found = {}
    for name, value in service_environment(node, cluster).items():
        text = value.text if isinstance(value, Interpolated) else str(value)
        found[name] = Variable(name, text, origins.get(name, CONTAINER))
    return found


def rank_variables(plan: ClusterPlan | LaunchPlan, rank: int) -> tuple[str, str, dict[str, Variable]]:
    """Return the node, a line about the rank, and the variables that its process starts with.

    On a CPU the engine then sets the rank's threads. Raises: UsageError for a rank that the launch has not; the plan's
    own problem when nothing could be placed.
    """
    if plan.placement is None:
        plan.check_problems()
        raise UsageError("nothing tells the ranks of this model", hint=f"run: hlaunch plan {plan.name}")
    ranks = plan.placement.ranks
    if not 0 <= rank < len(ranks):
        known = "rank 0" if len(ranks) == 1 else f"ranks 0 to {len(ranks) - 1}"
        raise UsageError(f"{plan.name} has no rank {rank}", hint=f"it has {known}: hlaunch plan {plan.name}")
    found = ranks[rank]
    said = f"rank {rank}: {found.node}, {found.device}, dp {found.dp_rank} pp {found.pp_rank} tp {found.tp_rank}"
    if isinstance(plan, ClusterPlan):
        return found.node, said, node_variables(plan)[found.node]
    values = {item.name: Variable(item.name, item.value, item.origin) for item in plan.environment if item.value}
    return found.node, said, values
