"""Planning: inventory of the machine + resolved entry -> LaunchPlan. Pure values; only reads, never starts.

plan = make_plan(entry, read_inventory(), os.environ, instance_folder(state_root(os.environ), entry.name))
plan.check()                                         # raises the first reason not to start
plan.config.to_json(), plan.argv, plan.environment_mapping
"""

from __future__ import annotations

from launcher.plan.fit import FitReport, Limits, Suggestion, report_fit
from launcher.plan.inventory import Gpu, Inventory, read_inventory
from launcher.plan.launch_plan import LaunchPlan, engine_argv, make_plan

__all__ = [
    "FitReport",
    "Gpu",
    "Inventory",
    "LaunchPlan",
    "Limits",
    "Suggestion",
    "engine_argv",
    "make_plan",
    "read_inventory",
    "report_fit",
]
