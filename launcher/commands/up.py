"""`hlaunch up`: plan, check, start, show the phases, serve. Knows the order of these steps and what the user sees.

Imports are late on purpose: the engine's own imports are the longest part of a start, so nothing that only draws is
loaded before the engine runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands import Invocation, invocation_of
from launcher.commands.launch_view import LaunchView

if TYPE_CHECKING:
    from engine.config import NodesConfig
    from launcher.console import Console
    from launcher.plan import LaunchPlan
    from launcher.registry import ResolvedEntry
    from launcher.supervise.instance import InstanceFolder
    from launcher.supervise.spec import LaunchSpec
    from launcher.supervise.supervisor import Outcome


def register(app: typer.Typer) -> None:
    @app.command("up")
    def up(
        ctx: typer.Context,
        name: Annotated[str, typer.Argument(metavar="NAME", help="A model's name or alias.")],
        overrides: Annotated[
            list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may repeat.")
        ] = None,
        port: Annotated[int | None, typer.Option("--port", help="TCP port; 0 takes a free one.")] = None,
        is_agreed: Annotated[bool, typer.Option("--yes", "-y", help="With --replace: do not ask.")] = False,
        detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when ready; stop with: down.")] = False,
        replace: Annotated[bool, typer.Option("--replace", help="Stop a running one of this name first.")] = False,
        is_transient: Annotated[bool, typer.Option("--transient", hidden=True)] = False,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, start nothing.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON.")] = False,
        cluster: Annotated[str | None, typer.Option("--cluster", metavar="NAME", help="Run on this cluster.")] = None,
        runtime: Annotated[str, typer.Option("--runtime", help="On a cluster: compose or process.")] = "compose",
        nnodes: Annotated[int, typer.Option("--nnodes", metavar="N", help="Nodes that serve it together.")] = 1,
        node_rank: Annotated[
            int | None, typer.Option("--node-rank", metavar="R", help="Which of them this is; 0 is the head.")
        ] = None,
        head_addr: Annotated[
            str | None, typer.Option("--head-addr", metavar="HOST[:PORT]", help="Where the others join the head.")
        ] = None,
        node_addr: Annotated[
            str | None, typer.Option("--node-addr", metavar="HOST", help="This node's address there; never the head's.")
        ] = None,
    ) -> int:
        """Start a model and serve it until Ctrl-C."""
        from launcher.errors import UsageError

        if as_json and not dry_run:
            raise UsageError("--json goes with --dry-run", hint="add --dry-run")
        invocation = invocation_of(ctx)
        chosen = [*(overrides or []), *([f"cluster={cluster}"] if cluster else [])]
        nodes = None
        if nnodes != 1 or node_rank is not None or head_addr is not None or node_addr is not None:
            from launcher.plan.joined_nodes import parse_nodes

            nodes = parse_nodes(nnodes, node_rank, head_addr, node_addr)
        if _has_cluster(invocation, name, chosen):
            if nodes is not None:
                raise UsageError(
                    f"{name} runs on a cluster, which says its nodes itself",
                    hint="leave --nnodes away, or --set cluster=none",
                )
            if port == 0:
                raise UsageError(
                    f"{name} runs on a cluster, where nobody looks for a free port", hint="say which one: --port 8000"
                )
            if port is not None:
                chosen.append(f"port={port}")
            from launcher.commands import cluster as on_cluster
            from launcher.commands.render import cluster_plan_for

            on_nodes = cluster_plan_for(invocation, name, chosen, None)
            if dry_run:
                from launcher.commands.plan import show_plan

                return show_plan(invocation.console, on_nodes, as_json=as_json)
            words = [*_settings(chosen), "--runtime", runtime, "--yes"]
            return on_cluster.up(invocation, on_nodes, runtime, words, is_replacing=replace, is_agreed=is_agreed)
        if (source := ctx.get_parameter_source("runtime")) is not None and source.name != "DEFAULT":
            raise UsageError(f"--runtime is for a cluster, and {name} has none", hint="add --cluster NAME")
        plan = _plan(invocation, name, list(overrides or []), port, nodes, is_replacing=replace)
        if dry_run:
            from launcher.commands.dry_run import dry_run as show

            return show(invocation.console, plan, as_json=as_json)
        words = [*_settings(chosen), "--port", str(plan.config.server.port), "--detach"]
        for option, value in (("--node-rank", node_rank), ("--head-addr", head_addr), ("--node-addr", node_addr)):
            words += [option, str(value)] if value is not None else []
        remember_it = partial(_remember, invocation, plan.entry, [*words, "--nnodes", str(nnodes)])
        return launch(
            invocation.console,
            plan,
            is_detached=detach,
            is_replacing=replace,
            on_lock=remember_it,
            is_transient=is_transient,
        )


def _has_cluster(invocation: Invocation, name: str, overrides: list[str]) -> bool:
    """Look without a word: whoever plans resolves again, and says the warnings."""
    from launcher.registry import resolve

    return resolve(invocation.load_registry(), name, invocation.environ, overrides).cluster_name is not None


def _settings(chosen: Sequence[str]) -> list[str]:
    return [part for item in chosen for part in ("--set", item)]


def _remember(invocation: Invocation, entry: ResolvedEntry, words: Sequence[str], folder: InstanceFolder) -> None:
    from launcher.commands.restart import remember

    remember(invocation, folder, entry, words)


def _plan(
    invocation: Invocation,
    name: str,
    overrides: list[str],
    port: int | None,
    nodes: NodesConfig | None = None,
    *,
    is_replacing: bool = False,
) -> LaunchPlan:
    from launcher.plan import make_plan, read_inventory
    from launcher.supervise.instance import InstanceFolder, state_root

    entry = invocation.resolve(name, overrides if port in (None, 0) else [*overrides, f"port={port}"])
    if port == 0:
        from launcher.supervise.ports import free_port

        entry = invocation.resolve(name, [*overrides, f"port={free_port(entry.text('host'))}"])
    folder = InstanceFolder(state_root(invocation.environ), entry.name)
    inventory = read_inventory()
    if is_replacing:
        from launcher.commands.replacing import inventory_without

        # What runs holds the memory that its successor gets.
        inventory = inventory_without(inventory, folder)
    plan = make_plan(entry, inventory, invocation.environ, folder.path, nodes=nodes)
    invocation.console.issues(plan.warnings)
    return plan


def launch(
    console: Console,
    plan: LaunchPlan,
    *,
    is_detached: bool,
    is_replacing: bool,
    on_lock: Callable[[InstanceFolder], None] = lambda _: None,
    is_transient: bool = False,
) -> int:
    """Start what was planned and return the exit code: when it has ended, or when it is ready and detached.

    Raises: HlaunchError; its message is the cause and the last thing to print.
    """
    from launcher.plan.drawing import base_url
    from launcher.plan.joined_nodes import head_to_join
    from launcher.supervise.instance import InstanceFolder
    from launcher.supervise.ports import check_port
    from launcher.supervise.procfs import own_age_seconds
    from launcher.supervise.spec import LaunchSpec

    began = time.monotonic() - own_age_seconds()
    plan.check()
    folder = InstanceFolder(plan.instance_folder.parent.parent, plan.name)
    folder.create()
    if is_replacing and plan.is_head and not _is_served_at(folder, plan.config.server.port):
        check_port(plan.config.server.host, plan.config.server.port)
    lock_fd = _take_lock(console, folder, is_replacing)
    on_lock(folder)
    ready_timeout_seconds = plan.ready_timeout_seconds
    if plan.is_head:
        check_port(plan.config.server.host, plan.config.server.port)
    if plan.config.has_other_nodes:
        # The nodes' own deadline comes first, since it can name who is missing.
        ready_timeout_seconds += plan.config.nodes.join_timeout_seconds
    spec = LaunchSpec(
        name=plan.name,
        model=plan.entry.model,
        url=base_url(plan) if plan.is_head else "",
        argv=plan.argv[: plan.argv.index("--status-fd")],
        working_folder=str(plan.working_folder),
        config_text=plan.config.to_json(),
        ready_timeout_seconds=ready_timeout_seconds,
        drain_timeout_seconds=plan.config.server.drain_timeout_seconds,
        environment=plan.environment_mapping,
        head_addr=head_to_join(plan.config.nodes),
    )
    view = LaunchView(console, plan, is_detached, is_transient=is_transient)
    try:
        outcome = _run(spec, folder, lock_fd, view, began, is_detached)
    finally:
        has_kept_up = view.close()
    if not has_kept_up:
        # Nobody reads our stderr: any further write, the interpreter's own flush included, would wait for ever.
        os._exit(int(outcome.exit_code))
    return _conclude(console, view, outcome)


def _run(
    spec: LaunchSpec, folder: InstanceFolder, lock_fd: int, view: LaunchView, began: float, is_detached: bool
) -> Outcome:
    if is_detached:
        from launcher.supervise.detached import start_detached

        return start_detached(spec, folder, lock_fd, view, began)
    from launcher.supervise.supervisor import Supervisor

    return Supervisor(spec, folder, view, launched_at=began).run()


def _is_served_at(folder: InstanceFolder, port: int) -> bool:
    """Whether the port is that of the launch that is replaced."""
    from urllib.parse import urlsplit

    state = folder.read()
    return state is not None and state.is_alive and urlsplit(state.url).port == port


def _take_lock(console: Console, folder: InstanceFolder, is_replacing: bool) -> int:
    """Become the one launcher of this name, and clear what a dead one left.

    Raises: PreflightError when a live one has it.
    """
    from launcher.errors import PreflightError
    from launcher.supervise.stopping import clean_stale, stop_instance

    lock_fd = folder.try_lock()
    if lock_fd is None and is_replacing:
        console.data(f"{folder.name}: {stop_instance(folder).value}")
        deadline = time.monotonic() + 5
        while (lock_fd := folder.try_lock()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
    state = folder.read()
    if lock_fd is None:
        where = f" (pid {state.launcher.pid}, {state.url or f'head {state.head_addr}'})" if state is not None else ""
        raise PreflightError(
            f"{folder.name} is already running{where}", hint=f"run: hlaunch down {folder.name}, or add --replace"
        )
    if state is not None:
        clean_stale(folder, state)
    try:
        _leave_cluster(console, folder, is_replacing)
    except BaseException:
        os.close(lock_fd)
        raise
    return lock_fd


def _leave_cluster(console: Console, folder: InstanceFolder, is_replacing: bool) -> None:
    """End a launch of this name that is on a cluster: the entry may have named one when it was started.

    Raises: PreflightError when it may not be replaced; HlaunchError naming what is left of it.
    """
    if not folder.cluster_file.exists():
        return
    from launcher.commands import cluster
    from launcher.supervise.cluster_run import read_run

    if (run := read_run(folder)) is None:
        return
    if not is_replacing:
        raise cluster.in_the_way(run)
    cluster.down(console, folder, run, os.environ)


def _conclude(console: Console, view: LaunchView, outcome: Outcome) -> int:
    """Turn an end into an exit code. Log tail and hint of a failure come first: the cause is the last line."""
    if not outcome.cause:
        if outcome.was_ready and not view.is_detached:
            console.note("stopped")
        return int(outcome.exit_code)
    from launcher.errors import EngineFailed
    from launcher.fabric.log_lines import worst
    from launcher.redaction import Redaction

    view.fail()
    shown = _without_stacks(outcome)
    if shown:
        console.note("last lines of the engine's log:")
    redaction = Redaction(os.environ)
    for line in shown:
        console.quote(f"  | {redaction.line(line)}")
    if len(shown) < len(outcome.log_tail):
        console.note(f"the whole log: hlaunch logs {view.name}")
    for found in worst(outcome.log_tail):
        console.note(f"{found.severity}[{found.code}]: {found.cause}; fix: {found.fix or 'hlaunch doctor'}")
    if outcome.hint:
        console.note(f"hint: {outcome.hint}")
    raise EngineFailed(redaction.line(outcome.cause), exit_code=int(outcome.exit_code))


def _without_stacks(outcome: Outcome) -> list[str]:
    """Leave out of the log's end what says no more than the cause: it again, and stacks of errors that are ours."""
    again = (f"hint: {outcome.hint}", f"error: {outcome.cause.rpartition('phase ')[2].partition(': ')[2]}")
    kept: list[str] = []
    stack: list[str] = []
    # The end of a log may begin inside a stack.
    is_stack = outcome.log_tail[:1] != () and outcome.log_tail[0].startswith(" ")
    for line in outcome.log_tail:
        if line.startswith("Traceback (most recent call last):") or (is_stack and line.startswith(" ")):
            is_stack = True
            stack.append(line)
        elif is_stack:
            # The first line that is not indented is the error, which ends its stack.
            kept += [] if line.startswith("engine.") else [*stack, line]
            is_stack, stack = False, []
        elif line.strip() and line not in again:
            kept.append(line)
    return [*kept, *stack]
