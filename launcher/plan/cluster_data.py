"""A cluster's plan as plain values, for `--json`. Apart from `drawing`, so that a start on one host never loads it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from launcher.plan.cluster_plan import ClusterPlan
from launcher.plan.drawing import entry_values, error_data, memory_data
from launcher.plan.picture import nics_of
from launcher.plan.settings import shown_config


def cluster_plan_data(plan: ClusterPlan) -> dict[str, Any]:
    """A cluster's plan as plain values, for `--json`. Variables named like secrets are hidden."""
    return {
        "name": plan.name,
        "model": plan.entry.model,
        "cluster": plan.cluster.name,
        "executor": plan.executor,
        "digest": plan.digest,
        "values": entry_values(plan.entry),
        "placement": None if plan.placement is None else json.loads(plan.placement.to_json()),
        "memory": [{**memory_data(memory), "node": node.name} for node in plan.nodes for memory in node.memory],
        "nodes": [
            {
                "name": node.name,
                "role": node.node.role,
                "ip": node.node.ip,
                "ranks": [rank.rank for rank in node.ranks],
                "nics": {str(rank.rank): list(nics_of(inventory, rank)) for rank in node.ranks},
                "ports": [asdict(port) for port in node.ports],
                "environment": {item.name: {"value": item.shown, "origin": item.origin} for item in node.environment},
                "engine_config": json.loads(shown_config(node.config)),
            }
            for node, inventory in zip(plan.nodes, plan.inventories, strict=True)
        ],
        "unused_nodes": list(plan.unused),
        "remarks": [asdict(remark) for remark in plan.remarks],
        "notes": list(plan.notes),
        "warnings": [issue.as_dict() for issue in plan.warnings],
        "problems": [error_data(error) for error in plan.problems],
        "blockers": [error_data(error) for error in plan.blockers],
    }
