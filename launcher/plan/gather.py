"""From a command line's names to a plan: which cluster, whose inventories, one host or several.

The planning commands share it. Effects: reads the registry's entry, saved inventories, the model's small files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import UsageError
from launcher.plan.inventory import Inventory, read_inventory
from launcher.plan.inventory.values import MAX_JSON_BYTES
from launcher.registry import resolve_cluster
from launcher.registry.types import ResolvedEntry

if TYPE_CHECKING:
    from launcher.commands import Invocation
    from launcher.plan.cluster_plan import ClusterPlan
    from launcher.plan.launch_plan import LaunchPlan
    from launcher.registry.cluster import Cluster


def resolved(invocation: Invocation, name: str, overrides: Sequence[str], cluster: str | None) -> ResolvedEntry:
    """Resolve an entry; `cluster` goes over the entry's own. Raises: as `registry.resolve`."""
    return invocation.resolve(name, [*overrides, *([f"cluster={cluster}"] if cluster else [])])


def cluster_of(invocation: Invocation, entry: ResolvedEntry) -> Cluster | None:
    """Return the cluster that an entry runs on, None for this host."""
    if entry.cluster_name is None:
        return None
    return resolve_cluster(invocation.load_registry(), entry.cluster_name, invocation.environ, entry)


def saved_inventories(paths: Sequence[Path]) -> dict[str, Inventory]:
    """Read saved inventories by node name. Raises: InventoryError, UsageError for a file that cannot be read."""
    found: dict[str, Inventory] = {}
    for path in paths:
        try:
            with path.open("rb") as file:
                text = file.read(MAX_JSON_BYTES + 1).decode(errors="replace")
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        inventory = Inventory.from_json(text, str(path))
        found[inventory.node] = replace(inventory, source=f"saved in {path}")
    return found


def one_inventory(paths: Sequence[Path]) -> Inventory:
    """Return this host's inventory, or the one that was saved. Raises: UsageError for several."""
    if not paths:
        return read_inventory()
    if len(paths) > 1:
        raise UsageError("several inventories need a cluster", hint="add --cluster NAME")
    return next(iter(saved_inventories(paths).values()))


def inventories_for(cluster: Cluster, paths: Sequence[Path]) -> Mapping[str, Inventory]:
    """Read saved inventories for the nodes of a cluster. Raises: UsageError for one of another node."""
    saved = saved_inventories(paths)
    names = [node.name for node in cluster.nodes]
    for name, inventory in saved.items():
        if name not in names:
            raise UsageError(
                f"{inventory.source.removeprefix('saved in ')}: node {name} is not in cluster {cluster.name}",
                hint=f"its nodes: {', '.join(names)}",
            )
    return saved


def plan_for(
    invocation: Invocation, name: str, overrides: Sequence[str], cluster_name: str | None, paths: Sequence[Path]
) -> LaunchPlan | ClusterPlan:
    """Make the plan of an entry: on its cluster, else on this host or the saved one. Says its warnings."""
    plan = _plan_of(invocation, name, overrides, cluster_name, paths)
    invocation.console.issues(plan.warnings)
    return plan


def _plan_of(
    invocation: Invocation, name: str, overrides: Sequence[str], cluster_name: str | None, paths: Sequence[Path]
) -> LaunchPlan | ClusterPlan:
    entry = resolved(invocation, name, overrides, cluster_name)
    cluster = cluster_of(invocation, entry)
    if cluster is not None:
        from launcher.plan.cluster_plan import make_cluster_plan

        return make_cluster_plan(entry, cluster, invocation.environ, inventories=inventories_for(cluster, paths))
    from launcher.plan.launch_plan import make_plan
    from launcher.supervise.instance import InstanceFolder, state_root

    folder = InstanceFolder(state_root(invocation.environ), entry.name)
    return make_plan(entry, one_inventory(paths), invocation.environ, folder.path)
