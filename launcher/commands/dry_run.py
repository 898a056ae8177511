"""The dry run of `up`: prints the whole plan and touches nothing. Knows the order of its sections, nothing else."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.console import Console
    from launcher.plan import LaunchPlan


def dry_run(console: Console, plan: LaunchPlan, *, as_json: bool) -> int:
    """Print the plan: entry with origins, memory, placement, environment, engine.json, argv.

    Returns: 0, or the exit code of the first problem, whose cause is then the last line on stderr. What `up` would
    still miss (files, a key) is a warning here.
    """
    from launcher.commands.plan import conclude
    from launcher.plan.drawing import plan_data

    if as_json:
        console.json(plan_data(plan))
    else:
        _print(console, plan)
    return conclude(console, plan)


def _print(console: Console, plan: LaunchPlan) -> None:
    from launcher.commands.plan import (
        entry_rows,
        note_registry,
        picture_of_any,
        placement_table,
        show_memory,
        show_remarks,
        show_topology,
    )
    from launcher.plan.drawing import base_url, fit_lines
    from launcher.plan.joined_nodes import head_to_join
    from launcher.plan.settings import shown_config

    rows = entry_rows(plan.entry, with_defaults=True)
    console.table(("KEY", "VALUE", "ORIGIN"), rows, title=f"{plan.name}: resolved entry")
    note_registry(console, plan.entry)
    console.data()
    console.heading("memory")
    picture = picture_of_any(plan)
    if plan.fit is None and plan.memory and picture is not None:
        show_memory(console, picture)
    elif plan.fit is None:
        where = "the problem stands below" if plan.is_head else "the head places the ranks, and its dry run shows them"
        console.data(f"unknown: {where}")
    else:
        for line in fit_lines(plan.fit):
            console.data(line)
    console.data()
    if picture is not None:
        placement_table(console, picture)
        console.data()
        console.heading("topology")
        show_topology(console, picture)
        show_remarks(console, picture.remarks)
    console.data()
    console.table(
        ("VARIABLE", "VALUE", "ORIGIN"),
        [(item.name, item.shown, item.origin) for item in plan.environment],
        title="environment of the engine",
    )
    console.data()
    console.heading(f"engine.json ({plan.argv[plan.argv.index('--config') + 1]})")
    for line in shown_config(plan.config).splitlines():
        console.raw(line + "\n")
    if plan.model is None:
        return
    console.data()
    console.heading(f"command (in {plan.working_folder}; N is the status pipe)")
    console.data(shlex.join(plan.argv))
    console.data()
    if plan.is_head:
        console.data(f"address: {base_url(plan)}")
    else:
        nodes = plan.config.nodes
        console.data(f"joins: head {head_to_join(nodes)}, as {nodes.names[nodes.rank]}; the head has the address")
