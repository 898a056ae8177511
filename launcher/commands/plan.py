"""`hlaunch plan`: what a start would do, before anything starts. Knows the order of its sections, nothing else."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.commands import Invocation, invocation_of
from launcher.sizes import counted

if TYPE_CHECKING:
    from engine.placement import Remark
    from launcher.console import Console
    from launcher.plan import LaunchPlan
    from launcher.plan.cluster_plan import ClusterPlan
    from launcher.plan.diff import Change
    from launcher.plan.picture import Picture
    from launcher.registry import ResolvedEntry


def register(app: typer.Typer) -> None:
    @app.command("plan")
    def plan(
        ctx: typer.Context,
        name: Annotated[str, typer.Argument(metavar="NAME", help="A model's name or alias.")],
        overrides: Annotated[
            list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may repeat.")
        ] = None,
        cluster: Annotated[str | None, typer.Option("--cluster", metavar="NAME", help="Plan for this cluster.")] = None,
        inventory: Annotated[
            list[Path] | None,
            typer.Option("--inventory", metavar="FILE", help="A saved inventory in place of this host; may repeat."),
        ] = None,
        svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Write the drawing as SVG.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
        full: Annotated[
            bool, typer.Option("--full", help="Also variables of every node, firewall lines, engine.json.")
        ] = False,
        diff: Annotated[bool, typer.Option("--diff", help="Show what would change, against what runs.")] = False,
        against: Annotated[
            Path | None, typer.Option("--against", metavar="DIR", help="With --diff: against rendered files.")
        ] = None,
        detailed: Annotated[
            bool, typer.Option("--detailed-exitcode", help="With --diff: exit 10 when something would change.")
        ] = False,
    ) -> int:
        """Show what a start would do: placement, topology, memory, ports, command. Starts nothing."""
        from launcher.errors import UsageError
        from launcher.plan.gather import plan_for

        if (against or detailed) and not diff:
            raise UsageError("--against and --detailed-exitcode go with --diff", hint="add --diff")
        invocation = invocation_of(ctx)
        made = plan_for(invocation, name, list(overrides or []), cluster, list(inventory or []))
        console = invocation.console
        if svg is not None:
            write_svg(console, picture_of_any(made), svg)
        if diff:
            return _diff(invocation, made, against, as_json=as_json, detailed=detailed)
        return show_plan(console, made, as_json=as_json, is_full=full)


def show_plan(console: Console, plan: LaunchPlan | ClusterPlan, *, as_json: bool, is_full: bool = False) -> int:
    """Print either kind of plan, all of it or in brief; return the exit code of its first problem, or 0."""
    if as_json:
        console.json(data_of(plan))
    else:
        _print(console, plan, picture_of_any(plan), is_full=is_full)
    return conclude(console, plan)


def picture_of_any(plan: LaunchPlan | ClusterPlan) -> Picture | None:
    """Gather the drawing of either kind of plan."""
    from launcher.plan.cluster_plan import ClusterPlan
    from launcher.plan.picture import picture_of_cluster, picture_of_launch

    return picture_of_cluster(plan) if isinstance(plan, ClusterPlan) else picture_of_launch(plan)


def data_of(plan: LaunchPlan | ClusterPlan) -> dict[str, Any]:
    """Either kind of plan as plain values."""
    from launcher.plan.cluster_data import cluster_plan_data
    from launcher.plan.cluster_plan import ClusterPlan
    from launcher.plan.drawing import plan_data

    return cluster_plan_data(plan) if isinstance(plan, ClusterPlan) else plan_data(plan)


def conclude(console: Console, plan: LaunchPlan | ClusterPlan) -> int:
    """Print notes, what `up` would miss, and the problems; return the exit code of the first problem, or 0."""
    for note in plan.notes:
        console.note(f"note: {note}")
    for blocker in plan.blockers:
        console.warning(f"up would stop here: {blocker.message}", hint=blocker.hint)
    # The first problem decides the exit code, so its cause is the last line.
    for problem in reversed(plan.problems):
        for line in problem.details:
            console.note(f"  {line}")
        if problem.hint:
            console.note(f"hint: {problem.hint}")
        console.error(problem.message)
    return int(plan.problems[0].exit_code) if plan.problems else 0


def show_picture(console: Console, picture: Picture) -> None:
    """Print placement, topology, memory and remarks."""
    placement_table(console, picture)
    console.data()
    console.heading("topology")
    show_topology(console, picture)
    console.data()
    console.heading("memory")
    show_memory(console, picture)
    show_remarks(console, picture.remarks)


def placement_table(console: Console, picture: Picture) -> None:
    from launcher.plan.picture import rank_span, span

    placement = picture.placement
    nics = {rank: names for node in picture.nodes for rank, names in node.nics.items()}
    # On one node nothing leaves it; where nobody knows an interface, there is nothing to say.
    has_nics = len(placement.nodes) > 1 and any(nics.values())
    rows = []
    for rank in placement.ranks:
        place = f"{rank.dp_rank}/{rank.pp_rank}/{rank.tp_rank}"
        experts = rank_span(range(*rank.experts)) if placement.expert_parallel else f"units {span(rank.mlp_units)}"
        if rank.copied_experts:
            experts += f" + copies of {rank_span(rank.copied_experts)}"
        row = [str(rank.rank), rank.node, rank.device, place, span(rank.layers), span(rank.kv_heads), experts]
        rows.append([*row, ", ".join(nics.get(rank.rank, ()))] if has_nics else row)
    columns = (">RANK", "NODE", "DEVICE", "DP/PP/TP", "LAYERS", "KV HEADS", "EXPERTS")
    console.table(
        (*columns, "NIC") if has_nics else columns,
        rows,
        title=f"placement: {placement.sizes}, {counted(placement.world_size, 'rank')}",
    )
    if picture.placement.kv_links:
        _kv_table(console, picture)


def _kv_table(console: Console, picture: Picture) -> None:
    from launcher.plan.picture import span

    console.data()
    rows = [
        (
            f"{flow.source} to {flow.target}",
            f"{route.source} to {route.target}",
            span(route.layers),
            span(route.kv_heads),
            flow.link.name,
            f"{flow.bytes_per_token / 1000:.2f} kB",
        )
        for flow in picture.kv_flows()
        for route in flow.routes
    ]
    columns = ("ENGINE", "RANK", "LAYERS", "KV HEADS", "OVER", ">PER TOKEN")
    console.table(columns, rows, title="KV blocks move between engines")


def show_topology(console: Console, picture: Picture) -> None:
    from launcher.plan.topology import plain, topology_lines

    for line in topology_lines(picture):
        console.data(line if can_draw() else plain(line))


def show_memory(console: Console, picture: Picture) -> None:
    from launcher.plan.topology import memory_lines, plain

    for line in memory_lines(picture):
        console.data(line if can_draw() else plain(line))


def show_remarks(console: Console, remarks: Sequence[Remark]) -> None:
    """Print warnings with their hints, and infos."""
    for remark in remarks:
        if remark.severity == "warning":
            console.warning(f"{remark.message} [{remark.code}]", hint=remark.hint)
        else:
            console.info(f"{remark.message} [{remark.code}]", hint=remark.hint)


def can_draw() -> bool:
    """Whether stdout's encoding has box characters."""
    try:
        "╭█═".encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except (UnicodeError, LookupError):
        return False
    return True


def write_svg(console: Console, picture: Picture | None, path: Path) -> None:
    """Write the drawing. Raises: PreflightError when there is none, or the file cannot be written."""
    from launcher.errors import PreflightError
    from launcher.plan.svg import svg_text

    if picture is None:
        raise PreflightError("there is no placement to draw", hint="see the plan without --svg for the reason")
    try:
        path.write_text(svg_text(picture), encoding="utf-8")
    except OSError as error:
        raise PreflightError(f"cannot write {path}: {error.strerror}") from error
    console.note(f"drawing written to {path}")


def _print(console: Console, plan: LaunchPlan | ClusterPlan, picture: Picture | None, *, is_full: bool) -> None:
    from launcher.commands import plan_full
    from launcher.plan.cluster_plan import ClusterPlan

    entry = plan.entry
    console.table(("KEY", "VALUE", "ORIGIN"), entry_rows(entry), title=f"{plan.name}: what is set")
    note_registry(console, entry)
    console.data()
    if picture is None:
        console.data("no placement: the problem stands below")
    else:
        show_picture(console, picture)
    console.data()
    variables = plan_full.variables_of(plan)
    if is_full or isinstance(plan, ClusterPlan):
        console.heading(f"environment: {plan_full.environment_line(plan, variables)}")
        if is_full:
            plan_full.show_environment(console, variables)
        console.data()
    if isinstance(plan, ClusterPlan):
        _print_cluster(console, plan, is_full=is_full)
    else:
        _print_launch(console, plan)
    if is_full:
        console.data()
        console.heading("engine.json")
        plan_full.show_config(console, plan)
    else:
        more = ", firewall lines" if isinstance(plan, ClusterPlan) else ""
        console.note(f"variables, engine.json{more}: hlaunch plan {plan.name} --full")


def entry_rows(entry: ResolvedEntry, *, with_defaults: bool = False) -> list[tuple[str, str, str]]:
    """One row for each key that something sets, or for all of them: key, value, origin."""
    from launcher.registry.keys import KEYS, show_value

    return [
        (key, str(item.value) if key not in KEYS else show_value(KEYS[key], item.value), item.origin.brief())
        for key, item in entry.values.items()
        if with_defaults or entry.is_set(key)
    ]


def note_registry(console: Console, entry: ResolvedEntry) -> None:
    """Say where the registry is when origins were shown without its folder."""
    if any(item.origin.brief() != str(item.origin) for item in entry.values.values()):
        console.note(f"registry: {entry.registry}")


def _print_launch(console: Console, plan: LaunchPlan) -> None:
    from launcher.plan.drawing import base_url

    console.heading("ports")
    console.data(f"api  {plan.config.server.port}/tcp on {plan.config.server.host}  {base_url(plan)}")
    if plan.model is None:
        return
    console.data()
    console.heading(f"what would run (in {plan.working_folder})")
    console.data(shlex.join(plan.argv))


def _print_cluster(console: Console, plan: ClusterPlan, *, is_full: bool) -> None:
    from launcher.commands.plan_full import show_firewall

    rows = [
        (node.name, port.name, str(port), port.address, port.reached_from) for node in plan.nodes for port in node.ports
    ]
    console.table(("NODE", "PORT", "TCP", "LISTENS ON", "REACHED FROM"), rows, title="ports")
    console.data()
    if is_full:
        console.heading("firewall")
        show_firewall(console, plan)
        console.data()
    if plan.model is None:
        return
    console.heading(f"what would run ({plan.executor} executor, plan {plan.digest[:12]})")
    for node in plan.nodes:
        ranks = counted(len(node.ranks), "rank") if node.ranks else "no ranks, serves"
        where = f" over ssh {node.node.ssh}" if node.node.ssh else ""
        console.data(f"{node.name}: python -m launcher.node {node.role}, {ranks}{where}")
    for name in plan.unused:
        console.data(f"{name}: not used")


def _diff(
    invocation: Invocation, plan: LaunchPlan | ClusterPlan, against: Path | None, *, as_json: bool, detailed: bool
) -> int:
    from launcher.exit_codes import ExitCode
    from launcher.plan.diff import has_changes

    plan.check_problems()
    changes = _changes(invocation, plan, against)
    if as_json:
        invocation.console.json(
            [{"path": item.path, "action": item.action, "reason": item.reason, "diff": item.lines} for item in changes]
        )
    else:
        show_changes(invocation.console, changes)
    return int(ExitCode.PLAN_CHANGED) if detailed and has_changes(changes) else int(ExitCode.OK)


def show_changes(console: Console, changes: tuple[Change, ...]) -> None:
    """Print each file's action with its reason, then the differing lines."""
    rows = [(item.action, item.path, item.reason) for item in changes]
    console.table(("ACTION", "FILE", "REASON"), rows)
    for item in changes:
        if item.lines:
            console.data()
        console.difference(item.lines)


def _changes(invocation: Invocation, plan: LaunchPlan | ClusterPlan, against: Path | None) -> tuple[Change, ...]:
    from launcher.errors import UsageError
    from launcher.plan.cluster_plan import ClusterPlan
    from launcher.plan.diff import diff_files, diff_text

    if isinstance(plan, ClusterPlan):
        from launcher.compose.render import render

        if against is None:
            against = _what_runs(invocation, plan)
        elif not against.is_dir():
            raise UsageError(f"{against} is no folder", hint=f"run: hlaunch render {plan.name} -o {against}")
        return diff_files(render(plan), against)
    from launcher.plan.launch_plan import CONFIG_FILE

    if against is not None:
        raise UsageError(f"{plan.name} runs on this host: nothing is rendered for it", hint="leave --against out")
    running = plan.instance_folder / CONFIG_FILE
    old = running.read_text(encoding="utf-8", errors="replace") if running.is_file() else None
    return (diff_text(f"{plan.name}/{CONFIG_FILE}", old, plan.config.to_json()),)


def _what_runs(invocation: Invocation, plan: ClusterPlan) -> Path:
    """Say against what a plan of a cluster is compared, and return the folder with its files."""
    from launcher.supervise.cluster_run import read_run
    from launcher.supervise.instance import InstanceFolder, state_root
    from launcher.supervise.running_files import files_folder

    folder = InstanceFolder(state_root(invocation.environ), plan.name)
    run = read_run(folder)
    if run is None:
        invocation.console.note(f"{plan.name} does not run: all is new; against rendered files: --against DIR")
        # There is no such folder, and so no file.
        return folder.path / "nothing"
    is_same = "the same as" if run.plan == plan.digest else "other than"
    invocation.console.note(f"plan {plan.digest[:12]} is {is_same} what runs on cluster {run.cluster}, {run.plan[:12]}")
    return files_folder(folder)
