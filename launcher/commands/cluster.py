"""What `up`, `down`, `ps`, `logs` and `status` do when a launch has a cluster: words and tables, nothing else.

Knows: columns, phases as people see them. Refuses to know: nodes, ssh, Docker (`launcher.supervise.cluster_run`).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.commands import Invocation
from launcher.commands.ps import uptime
from launcher.errors import EngineFailed, HlaunchError, PreflightError, UsageError
from launcher.sizes import counted

if TYPE_CHECKING:
    from launcher.commands.log_view import LogView
    from launcher.console import Console, PhaseView
    from launcher.plan.cluster_plan import ClusterPlan
    from launcher.supervise.cluster_run import ClusterRun, NodeSaid
    from launcher.supervise.instance import InstanceFolder


def up(
    invocation: Invocation,
    plan: ClusterPlan,
    runtime: str,
    options: Sequence[str],
    *,
    is_replacing: bool,
    is_agreed: bool,
) -> int:
    """Start a launch on its cluster and return when it is ready; the nodes go on by themselves.

    `options` are the words of this start, for `restart`. At a terminal what runs is replaced only when the person
    agrees, or has (`is_agreed`).
    """
    from launcher.commands.restart import remember
    from launcher.exit_codes import ExitCode
    from launcher.supervise.cluster_run import read_run
    from launcher.supervise.instance import InstanceFolder, state_root
    from launcher.supervise.runtimes import RUNTIMES

    if runtime not in RUNTIMES:
        raise UsageError(f"no such runtime: {runtime}", hint=f"runtimes: {', '.join(RUNTIMES)}")
    plan.check()
    folder = InstanceFolder(state_root(invocation.environ), plan.name)
    folder.create()
    lock = _take_lock(invocation.console, folder, is_replacing)
    try:
        if (running := read_run(folder)) is not None:
            if not is_replacing:
                raise in_the_way(running)
            if not _agree(invocation, plan, folder, is_agreed=is_agreed):
                invocation.console.note("nothing was changed")
                return ExitCode.INTERRUPTED
            # What is left would be in the way of what starts.
            down(invocation.console, folder, running, invocation.environ)
        remember(invocation, folder, plan.entry, options)
        return _start_on(invocation, plan, runtime, folder)
    finally:
        os.close(lock)


def in_the_way(run: ClusterRun) -> PreflightError:
    """Refuse a start of a name that runs on a cluster and may not be replaced."""
    return PreflightError(
        f"{run.name} is running on cluster {run.cluster}", hint=f"run: hlaunch down {run.name}, or add --replace"
    )


def _take_lock(console: Console, folder: InstanceFolder, is_replacing: bool) -> int:
    """Become the one that starts this name: two would lay their files into the same folders.

    What runs of it on this host, whose launcher has the lock, is stopped when it may be replaced.
    Raises: PreflightError.
    """
    from launcher.supervise.stopping import stop_instance

    if (lock := folder.try_lock()) is not None:
        return lock
    state = folder.read()
    is_here = state is not None and state.is_alive
    if is_here and is_replacing:
        console.data(f"{folder.name}: {stop_instance(folder).value}")
        if (lock := folder.try_lock()) is not None:
            return lock
    if is_here:
        raise PreflightError(
            f"{folder.name} is running on this host", hint=f"run: hlaunch down {folder.name}, or add --replace"
        )
    raise PreflightError(
        f"another `hlaunch up` is starting {folder.name}", hint=f"wait for it: hlaunch status {folder.name}"
    )


def _agree(invocation: Invocation, plan: ClusterPlan, folder: InstanceFolder, *, is_agreed: bool) -> bool:
    """Show in which files the new launch differs from the running one; ask where somebody can answer."""
    from launcher.compose.render import render
    from launcher.plan.diff import diff_files
    from launcher.supervise.running_files import files_folder

    changes = diff_files(render(plan), files_folder(folder))
    rows = [(item.action, item.path, item.reason) for item in changes if item.action != "none"]
    for action, path, reason in rows:
        invocation.console.note(f"{action:<8}  {path}  ({reason})")
    if not rows:
        invocation.console.note("nothing differs from what runs")
    invocation.console.note(f"line by line: hlaunch plan {plan.name} --diff")
    if is_agreed or not sys.stdin.isatty():
        return True
    invocation.console.note(f"{plan.name} is stopped and started again; go on? [y/N]")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _start_on(invocation: Invocation, plan: ClusterPlan, runtime: str, folder: InstanceFolder) -> int:
    from launcher.exit_codes import ExitCode
    from launcher.fabric.transports import summary
    from launcher.supervise.cluster_run import start
    from launcher.supervise.runtimes import RUNTIMES

    console, began = invocation.console, time.monotonic()
    for node in plan.nodes:
        ranks = counted(len(node.ranks), "rank") if node.ranks else "no rank"
        console.note(f"{node.name} ({'head' if node.is_head else 'worker'}, {node.node.ip}): {ranks}, by {runtime}")
    width = max(len(node.name) for node in plan.nodes)
    try:
        with console.phases(width + 8) as view:
            phases = _Phases(view, width)
            run = start(plan, RUNTIMES[runtime], folder, invocation.environ, phases.take, console.note)
    except HlaunchError:
        for label in phases.unfinished():
            console.note(f"  {label} was not over")
        raise
    except KeyboardInterrupt:
        console.note(f"detached; the nodes go on. stop with: hlaunch down {plan.name}")
        return ExitCode.INTERRUPTED
    if rows := phases.rows([node.name for node in plan.nodes]):
        console.table(("NODE", "PHASE", ">TIME", "DETAIL"), rows)
    console.data(f"{plan.name} is ready at {run.url} on {_count(run)} after {time.monotonic() - began:.1f} s")
    for line in summary(run.transports):
        console.data(f"transport {line}")
    console.note(
        f"stop with: hlaunch down {plan.name}   log: hlaunch logs {plan.name}   nodes: hlaunch status {plan.name}"
    )
    return ExitCode.OK


class _Phases:
    """Every node's phases in one view, each told once. Names of nodes have at most `width` characters."""

    def __init__(self, view: PhaseView, width: int) -> None:
        self._view = view
        self._width = width
        self._told: dict[tuple[str, str], tuple[str, str]] = {}
        self._seconds: dict[tuple[str, str], float] = {}

    def take(self, said: NodeSaid) -> None:
        for phase in said.report.get("phases", ()):
            if not isinstance(phase, dict):
                continue
            key = (said.node.name, str(phase.get("name", "")))
            state, detail = str(phase.get("state", "")), str(phase.get("detail", ""))
            if self._told.get(key) == (state, detail):
                continue
            label = self._label(key)
            if key not in self._told:
                self._view.begin(label)
            self._told[key] = (state, detail)
            seconds, fraction = phase.get("seconds"), phase.get("fraction")
            if state == "end":
                self._seconds[key] = float(seconds) if isinstance(seconds, int | float) else 0.0
                self._view.end(label, self._seconds[key], detail)
            else:
                self._view.progress(label, float(fraction) if isinstance(fraction, int | float) else None, detail)

    def rows(self, nodes: Sequence[str]) -> list[tuple[str, str, str, str]]:
        """One row per phase that is over, node by node; a node's name stands in its first row."""
        rows: list[tuple[str, str, str, str]] = []
        for node in nodes:
            of_node = [key for key in self._told if key[0] == node and key in self._seconds]
            rows += [
                ("" if i else node, key[1], f"{self._seconds[key]:.2f} s", self._told[key][1])
                for i, key in enumerate(of_node)
            ]
        return rows

    def unfinished(self) -> list[str]:
        return [self._label(key) for key in self._told if key not in self._seconds]

    def _label(self, key: tuple[str, str]) -> str:
        return f"{key[0]:<{self._width}} {key[1]}"


def down(console: Console, folder: InstanceFolder, run: ClusterRun, environ: Mapping[str, str]) -> None:
    """End a launch on all nodes. Raises: EngineFailed naming what is left."""
    from launcher.supervise.cluster_run import stop

    left = stop(run, folder, environ, console.note)
    if left:
        raise EngineFailed(f"{run.name}: not everything is gone", details=left, hint=f"again: hlaunch down {run.name}")
    console.data(f"{run.name}: stopped on {_count(run)}, nothing is left")


def _count(run: ClusterRun) -> str:
    return counted(len(run.nodes), "node")


def facts(run: ClusterRun, environ: Mapping[str, str]) -> dict[str, Any]:
    """One launch with what each of its nodes says now, and what connects its ranks by the record."""
    from launcher.footprint import cpu_share
    from launcher.supervise.cluster_run import ask_all
    from launcher.supervise.status import Ready

    reports = ask_all(run, environ)
    nodes = [{"name": node.name, "role": node.role, "ip": node.ip, **_of(reports[node.name])} for node in run.nodes]
    states = {str(node["state"]) for node in nodes}
    head = reports[run.head.name]
    if states == {"ready"}:
        state = "ready"
    elif head.get("state") in ("starting", "restarting", "failed"):
        state = str(head["state"])
    else:
        state = "degraded" if head.get("url") else "down"
    ready = Ready(run.url, run.model, 0.0, head.get("facts") or {})
    return {
        "name": run.name, "model": run.model, "cluster": run.cluster, "runtime": run.runtime, "state": state,
        "url": run.url, "plan": run.plan, "nodes": nodes, "transports": [pair.to_data() for pair in run.transports],
        "num_nodes": len(run.nodes), "cpu_share": cpu_share(run.placement), "context_tokens": ready.context_tokens,
        "uptime_seconds": head.get("uptime_seconds"),
    }  # fmt: skip


def _of(report: Mapping[str, Any]) -> dict[str, Any]:
    if not report:
        return {"state": "no answer", "uptime_seconds": None, "events": [], "phases": [], "previous": None}
    kept = (
        "state", "uptime_seconds", "ready_seconds", "url", "cause", "events", "phases", "previous", "versions",
        "environment",
    )  # fmt: skip
    return {name: report.get(name) for name in kept}


def table(console: Console, launches: list[dict[str, Any]]) -> None:
    """One line per node."""
    rows = [
        (
            launch["name"], launch["cluster"], node["name"], node["role"], node["ip"], str(node["state"]),
            launch["url"] if node["role"] == "head" else "",
        )
        for launch in launches
        for node in launch["nodes"]
    ]  # fmt: skip
    console.table(("NAME", "CLUSTER", "NODE", "ROLE", "ADDRESS", "STATE", "ENDPOINT"), rows)


def status(console: Console, launch: dict[str, Any]) -> None:
    """Nodes, then what happened on each, newest last."""
    table(console, [launch])
    rows = []
    for node in launch["nodes"]:
        previous = node.get("previous") or {}
        if previous.get("cause"):
            told = "is started again" if node["state"] == "restarting" else f"restarted {_times(previous)}"
            told = "ended" if node["state"] == "failed" else told
            rows.append((node["name"], "", f"{told}, after: {previous['cause']}"))
        for event in node.get("events") or ():
            rows.append((node["name"], uptime(event.get("age_seconds", 0)), str(event.get("text", ""))))
    if rows:
        console.data()
        console.table(("NODE", ">AGO", "EVENT"), rows)
    transports(console, launch["transports"])


def _times(previous: Mapping[str, Any]) -> str:
    count = previous.get("restarts", 1)
    return "once" if count == 1 else f"{count} times"


def environment(console: Console, launch: dict[str, Any]) -> None:
    """Every variable of the fabric that a node really has; what should be equal and is not is marked."""
    from launcher.fabric import catalogue

    said = {node["name"]: node.get("environment") or {} for node in launch["nodes"]}
    rows = []
    for name in sorted({name for variables in said.values() for name in variables}):
        values = {node: variables.get(name, "-") for node, variables in said.items() if variables}
        row = catalogue.find(name)
        may_differ = row is not None and row.scope in (catalogue.Scope.NODE, catalogue.Scope.RANK)
        if len(set(values.values())) == 1:
            rows.append((name, "all" if len(values) > 1 else next(iter(values)), next(iter(values.values())), ""))
            continue
        mark = "by node" if may_differ else "DIFFERS"
        rows += [(name, node, value, mark) for node, value in values.items()]
    console.table(("NAME", "NODE", "VALUE", "NOTE"), rows)


def transports(console: Console, pairs: list[dict[str, Any]]) -> None:
    """One line per connected pair of ranks; nothing for a launch of one rank."""
    rows = [
        (
            "-".join(map(str, pair["ranks"])),
            " - ".join(dict.fromkeys(pair["nodes"])),
            pair["transport"],
            ", ".join([*pair["ways"][:2], *pair["addresses"]]),
        )
        for pair in pairs
    ]
    if rows:
        console.data()
        console.table(("RANKS", "NODES", "TRANSPORT", "EVIDENCE"), rows)


def logs(
    console: Console, view: LogView, run: ClusterRun, environ: Mapping[str, str], num_lines: int, *, follow: bool
) -> None:
    """Show every node's log, each line with its node's name, and say whose could not be read."""
    from launcher.supervise.cluster_logs import node_lines

    for node, line in node_lines(run.runtime, run.nodes, num_lines, environ, follow=follow):
        if line is not None:
            view.show(line, node)
        else:
            console.warning(f"the log of {node} cannot be read", hint=f"does it answer? hlaunch status {run.name}")
