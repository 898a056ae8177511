"""What `plan --full` adds: the variables of every node, firewall lines, the engine's file. All of it can be pasted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.sizes import counted

if TYPE_CHECKING:
    from launcher.console import Console
    from launcher.plan import LaunchPlan
    from launcher.plan.cluster_plan import ClusterPlan
    from launcher.plan.environment import Variable


def environment_line(plan: ClusterPlan | LaunchPlan, variables: dict[str, tuple[Variable, ...]]) -> str:
    """Say how many variables a node gets, and how many findings there are about them."""
    counts = sorted({len(items) for items in variables.values()})
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    found = len(plan.warnings)
    lint = "no finding" if not found else counted(found, "finding")
    return f"{many} variables{' a node' * (len(variables) > 1)}, {lint}"


def variables_of(plan: ClusterPlan | LaunchPlan) -> dict[str, tuple[Variable, ...]]:
    """List variables by node."""
    from launcher.plan.cluster_plan import ClusterPlan

    if isinstance(plan, ClusterPlan):
        return {node.name: node.environment for node in plan.nodes}
    return {plan.inventory.node: plan.environment}


def show_environment(console: Console, variables: dict[str, tuple[Variable, ...]]) -> None:
    """Print variables, those that are the same on all nodes once. Values of secrets are hidden."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for node, items in variables.items():
        for item in items:
            rows.setdefault((item.name, item.shown, item.origin), []).append(node)
    cells = [
        (name, "all" if len(nodes) == len(variables) else ", ".join(nodes), value, origin)
        for (name, value, origin), nodes in sorted(rows.items())
    ]
    if len(variables) == 1:
        console.table(("NAME", "VALUE", "ORIGIN"), [(name, value, origin) for name, _, value, origin in cells])
    else:
        console.table(("NAME", "NODE", "VALUE", "ORIGIN"), cells)


def show_firewall(console: Console, plan: ClusterPlan) -> None:
    """Print the lines that let the nodes reach each other."""
    from launcher.fabric.firewall import firewall_lines

    for node in plan.nodes:
        for line in firewall_lines(plan.cluster, node.node):
            console.data(line)


def show_config(console: Console, plan: ClusterPlan | LaunchPlan) -> None:
    """Print engine.json, of the head where there are several nodes. Digests of keys are hidden."""
    from launcher.plan.cluster_plan import ClusterPlan
    from launcher.plan.settings import shown_config

    config = plan.head.config if isinstance(plan, ClusterPlan) else plan.config
    for line in shown_config(config).splitlines():
        console.data(line)
