"""`hlaunch doctor`: examine hosts and the fabric between them. Knows the form of a report, not the checks."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands import invocation_of
from launcher.errors import UsageError
from launcher.exit_codes import ExitCode
from launcher.sizes import counted

if TYPE_CHECKING:
    from launcher.console import Console
    from launcher.fabric.facts import NodeFacts
    from launcher.fabric.finding import Finding
    from launcher.fabric.remote import Reach, Unreachable
    from launcher.fabric.target import Target


def register(app: typer.Typer) -> None:
    @app.command("doctor")
    def doctor(
        ctx: typer.Context,
        model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A model's name or alias.")] = None,
        cluster: Annotated[str | None, typer.Option("--cluster", metavar="NAME", help="A declared cluster.")] = None,
        node: Annotated[str | None, typer.Option("--node", metavar="NAME", help="One node of the cluster.")] = None,
        active: Annotated[bool, typer.Option("--active", help="Also sum 1 MiB with two ranks per pair.")] = False,
        print_firewall: Annotated[
            bool, typer.Option("--print-firewall", help="Print the firewall lines of each node, and nothing else.")
        ] = False,
        tool: Annotated[str, typer.Option("--firewall", metavar="TOOL", help="iptables, nft or ufw.")] = "iptables",
        container: Annotated[
            str | None, typer.Option("--container", metavar="NAME", help="Look inside this container of each node.")
        ] = None,
        is_inside: Annotated[
            bool, typer.Option("--inside", help="Look inside the containers of the running MODEL.")
        ] = False,
        deadline: Annotated[
            float | None,
            typer.Option("--deadline", metavar="SECONDS", min=1, max=600, help="For each node (20) and pair (30)."),
        ] = None,
        root: Annotated[
            Path | None, typer.Option("--root", metavar="FOLDER", help="Read FOLDER/<node> instead of the hosts.")
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Examine the hosts of a cluster, or this one; exit 5 on an error."""
        from launcher.fabric.finding import has_errors
        from launcher.fabric.target import find_target

        invocation = invocation_of(ctx)
        console = invocation.console
        target = find_target(invocation, model, cluster, node)
        if print_firewall:
            _firewall(console, target, tool, as_json=as_json)
            return
        if active and root is not None:
            raise UsageError("--active needs real hosts, --root reads files", hint="leave one of them out")
        if is_inside and target.entry is None:
            raise UsageError(
                "--inside needs a MODEL, whose containers it looks into", hint="hlaunch ps shows what runs"
            )
        began = time.monotonic()
        from launcher.fabric.remote import Reach

        launch = target.entry.name if is_inside and target.entry is not None else None
        reach = Reach.by(invocation.environ, container=container, launch=launch, local_python=sys.executable)
        read = _read(target, reach, deadline, root)
        found = _judge(target, read)
        if active:
            found = _with_active(target, read, found, reach, deadline)
        seconds = time.monotonic() - began
        if as_json:
            nodes = {item.name: _node_fact(read[item.name]) for item in target.nodes}
            facts = {"cluster": target.cluster.name, "seconds": round(seconds, 3), "nodes": nodes}
            console.json({**facts, "findings": [item.as_dict() for item in found]})
        else:
            _report(console, target, read, found, seconds)
        if has_errors(found):
            raise typer.Exit(ExitCode.PREFLIGHT)


def _firewall(console: Console, target: Target, tool: str, *, as_json: bool) -> None:
    from launcher.fabric.firewall import TOOLS, firewall_lines

    chosen = next((known for known in TOOLS if known == tool), None)
    if chosen is None:
        raise UsageError(f"no firewall tool '{tool}'", hint=f"one of: {', '.join(TOOLS)}")
    lines = {node.name: firewall_lines(target.cluster, node, chosen) for node in target.nodes}
    if as_json:
        console.json({"cluster": target.cluster.name, "tool": chosen, "nodes": lines})
        return
    for line in (line for of_node in lines.values() for line in of_node):
        console.data(line)


def _read(
    target: Target, reach: Reach, deadline: float | None, root: Path | None
) -> dict[str, NodeFacts | Unreachable]:
    from launcher.fabric.remote import NODE_SECONDS, read_cluster, read_tree

    if root is not None:
        return {node.name: read_tree(root / node.name) for node in target.nodes}
    return read_cluster(target.cluster, target.nodes, reach, seconds=deadline or NODE_SECONDS)


def _judge(target: Target, read: dict[str, NodeFacts | Unreachable]) -> list[Finding]:
    from launcher.fabric.doctor import diagnose
    from launcher.fabric.target import declared_sources, sources_of

    sources = sources_of(target, {}) if target.entry is not None else declared_sources(target)
    return diagnose(target.cluster, read, target.need, sources=sources)


def _with_active(
    target: Target, read: dict[str, NodeFacts | Unreachable], found: list[Finding], reach: Reach, deadline: float | None
) -> list[Finding]:
    """Add the two-rank check of every pair whose both ends were read."""
    from launcher.fabric.active import SECONDS, all_reduce_check
    from launcher.fabric.facts import NodeFacts
    from launcher.fabric.finding import ordered

    facts = {name: answer for name, answer in read.items() if isinstance(answer, NodeFacts)}
    return ordered([*found, *all_reduce_check(target.cluster, facts, reach, seconds=deadline or SECONDS)])


def _node_fact(answer: NodeFacts | Unreachable) -> dict[str, object]:
    from launcher.fabric.facts import NodeFacts

    if not isinstance(answer, NodeFacts):
        return {"read": False, "reason": answer.reason}
    return {
        "read": True,
        "hostname": answer.hostname,
        "kernel": answer.kernel,
        "python": answer.python,
        "gpus": [gpu.name for gpu in answer.gpus],
        "hcas": [hca.name for hca in answer.hcas],
        "versions": dict(answer.versions),
    }


def _report(
    console: Console,
    target: Target,
    read: dict[str, NodeFacts | Unreachable],
    found: list[Finding],
    seconds: float,
) -> None:
    from launcher.fabric.printing import node_row, print_findings, summary

    rows = [node_row(node, read[node.name]) for node in target.nodes]
    console.table(("NODE", "ADDRESS", "INTERFACE", "RDMA", "GPUS", ">MTU", ">CLOCK"), rows)
    if found:
        console.data()
    print_findings(console, found)
    console.note(f"{summary(found)} on {counted(len(target.nodes), 'node')}, {seconds:.1f} s")
