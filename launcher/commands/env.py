"""`hlaunch env`: the fabric's variables of each node, with origin and effect, and what is wrong with them.

Knows: how values, explanations and findings are shown. Refuses to know: how they are made (`launcher.fabric`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands import invocation_of
from launcher.exit_codes import ExitCode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.console import Console
    from launcher.fabric.environment import Variable
    from launcher.fabric.target import Target


def register(app: typer.Typer) -> None:
    @app.command("env")
    def env(
        ctx: typer.Context,
        model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A model's name or alias.")] = None,
        cluster: Annotated[str | None, typer.Option("--cluster", metavar="NAME", help="A declared cluster.")] = None,
        node: Annotated[str | None, typer.Option("--node", metavar="NAME", help="One node of the cluster.")] = None,
        rank: Annotated[
            int | None, typer.Option("--rank", metavar="K", min=0, help="All variables of one rank's process.")
        ] = None,
        explain: Annotated[
            str | None, typer.Option("--explain", metavar="VARIABLE", help="Say what one variable is and does.")
        ] = None,
        do_lint: Annotated[bool, typer.Option("--lint", help="Check every variable; exit 5 on an error.")] = False,
        env_files: Annotated[
            list[Path] | None, typer.Option("--env-file", metavar="PATH", help="A .env file to check; may repeat.")
        ] = None,
        settings: Annotated[
            list[str] | None,
            typer.Option("--set", metavar="NAME=VALUE", help="Write a variable into the registry; may repeat."),
        ] = None,
        is_dry: Annotated[bool, typer.Option("--dry-run", help="With --set: print the difference.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Show the fabric's variables of each node, where each comes from, and what is wrong with them."""
        from launcher.errors import UsageError
        from launcher.fabric.target import find_target

        if is_dry and not settings:
            raise UsageError("--dry-run goes with --set", hint="add --set NAME=VALUE")
        if rank is not None and (model is None or node is not None or settings or explain or do_lint or env_files):
            raise UsageError("--rank goes with a MODEL, and with nothing else", hint="hlaunch env MODEL --rank 0")
        invocation = invocation_of(ctx)
        target = find_target(invocation, model, cluster, node)
        if settings:
            from launcher.commands.env_set import set_variables

            set_variables(invocation, target, node, settings, is_dry=is_dry, as_json=as_json)
        elif rank is not None:
            _show_rank(invocation.console, target, invocation.environ, rank, as_json)
        elif explain is not None:
            _explain(invocation.console, target, invocation.environ, explain, as_json)
        elif do_lint or env_files:
            _lint(invocation.console, target, invocation.environ, env_files or [], as_json)
        else:
            _show(invocation.console, target, invocation.environ, as_json)


def _variables(target: Target, environ: Mapping[str, str]) -> dict[str, tuple[Variable, ...]]:
    from launcher.fabric.target import node_variables

    return {node.name: node_variables(target, node, environ) for node in target.nodes}


def _show_rank(console: Console, target: Target, environ: Mapping[str, str], rank: int, as_json: bool) -> None:
    from launcher.plan.launch_variables import plan_of, rank_variables

    assert target.entry is not None
    plan = plan_of(target.entry, target.cluster if target.declared is not None else None, environ)
    node, said, variables = rank_variables(plan, rank)
    if as_json:
        facts = [_fact(item) for item in variables.values()]
        console.json({"rank": rank, "node": node, "cluster": target.cluster.name, "variables": facts})
        return
    console.table(("NAME", "VALUE", "ORIGIN"), [(item.name, item.shown, item.origin) for item in variables.values()])
    console.note(said)
    for line in _unresolved_of(target, node):
        console.note(line)


def _unresolved_of(target: Target, node: str) -> list[str]:
    """Say what only this node's start fills in."""
    from dataclasses import replace

    from launcher.fabric.target import unresolved

    return unresolved(replace(target, nodes=tuple(item for item in target.nodes if item.name == node)))


def _show(console: Console, target: Target, environ: Mapping[str, str], as_json: bool) -> None:
    from launcher.fabric import catalogue
    from launcher.fabric.target import unresolved

    variables = _variables(target, environ)
    if as_json:
        nodes = {name: [_fact(item) for item in items] for name, items in variables.items()}
        console.json({"cluster": target.cluster.name, "catalogue": catalogue.CATALOGUE_VERSION, "nodes": nodes})
        return
    rows = _rows(variables)
    if len(variables) == 1:
        console.table(("NAME", "VALUE", "ORIGIN"), [(name, value, origin) for name, _, value, origin in rows])
    else:
        console.table(("NAME", "NODE", "VALUE", "ORIGIN"), rows)
    for line in unresolved(target):
        console.note(line)
    console.note("see also: hlaunch env --explain NAME, hlaunch env --lint")


def _rows(variables: dict[str, tuple[Variable, ...]]) -> list[tuple[str, str, str, str]]:
    """One row per name where all nodes agree, else one per node."""
    by_name: dict[str, dict[str, Variable]] = {}
    for node, items in variables.items():
        for item in items:
            by_name.setdefault(item.name, {})[node] = item
    rows = []
    for name in sorted(by_name):
        found = by_name[name]
        first = next(iter(found.values()))
        if len(found) == len(variables) and all(
            (item.value, item.origin) == (first.value, first.origin) for item in found.values()
        ):
            rows.append((name, "all" if len(variables) > 1 else next(iter(found)), first.shown, first.origin))
        else:
            rows += [(name, node, item.shown, item.origin) for node, item in found.items()]
    return rows


def _fact(item: Variable) -> dict[str, object]:
    from launcher.fabric import catalogue

    row = catalogue.find(item.name)
    return {
        "name": item.name,
        "value": item.shown,
        "origin": item.origin,
        "effect": row.effect if row is not None else None,
        "scope": str(row.scope) if row is not None else None,
        "shadowed": [{"value": below.shown, "origin": below.origin} for below in item.shadowed],
    }


def _explain(console: Console, target: Target, environ: Mapping[str, str], name: str, as_json: bool) -> None:
    from launcher.errors import UsageError
    from launcher.fabric.target import explanation, filled_at_start

    values = {
        node: next((item for item in items if item.name == name), None)
        for node, items in _variables(target, environ).items()
    }
    if None in values.values() and target.entry is not None:
        whole = _launch_variables(target, environ)
        values = {node: item or whole.get(node, {}).get(name) for node, item in values.items()}
    try:
        facts = explanation(name)
    except UsageError:
        if not any(values.values()):
            raise
        facts = {"effect": "nothing of the fabric: the program that reads it says it"}
    at_start = {node.name for node in target.nodes if name in filled_at_start(target.cluster, node)}
    at_start &= {node for node, item in values.items() if item is None} if target.declared is not None else set()
    if as_json:
        shown = {node: None if item is None else _fact(item) for node, item in values.items()}
        console.json({"name": name, **facts, "nodes": shown, "filled_at_start": sorted(at_start)})
        return
    rows = [(key, value) for key, value in facts.items() if value]
    for node, item in values.items():
        nothing = "filled in on the node at start" if node in at_start else "unset"
        rows.append((node, item.told if item is not None else nothing))
        rows += [("", f"over {below.told}") for below in (item.shadowed if item else ())]
    console.table((name, ""), rows)


def _launch_variables(target: Target, environ: Mapping[str, str]) -> Mapping[str, Mapping[str, Variable]]:
    """All variables of each node; none where no plan can be made, which `plan` says better."""
    from launcher.errors import HlaunchError
    from launcher.plan.cluster_plan import make_cluster_plan
    from launcher.plan.launch_variables import host_variables, node_variables

    assert target.entry is not None
    if target.declared is None:
        return {target.nodes[0].name: host_variables(target.entry, environ)}
    try:
        return node_variables(make_cluster_plan(target.entry, target.cluster, environ))
    except HlaunchError:
        return {}


def _lint(console: Console, target: Target, environ: Mapping[str, str], files: list[Path], as_json: bool) -> None:
    from launcher.fabric.finding import has_errors
    from launcher.fabric.lint import lint
    from launcher.fabric.printing import print_findings, summary
    from launcher.fabric.target import sources_of

    found = lint(
        sources_of(target, environ, files),
        cluster=target.cluster if target.declared is not None else None,
    )
    if as_json:
        console.json({"findings": [item.as_dict() for item in found]})
    else:
        print_findings(console, found)
        console.note(summary(found))
    if has_errors(found):
        raise typer.Exit(ExitCode.PREFLIGHT)
