"""`hlaunch up`: plan, check, start, show the phases, serve. Knows the order of these steps and what the user sees.

Imports are late on purpose: the engine's own imports are the longest part of a start, so nothing that only draws is
loaded before the engine runs.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands import Invocation, invocation_of

if TYPE_CHECKING:
    from engine.config import NodesConfig
    from launcher.console import Console, PhaseView
    from launcher.plan import LaunchPlan
    from launcher.supervise.echo import Echo
    from launcher.supervise.instance import InstanceFolder
    from launcher.supervise.spec import LaunchSpec
    from launcher.supervise.status import Phase, Ready
    from launcher.supervise.supervisor import Outcome
    from launcher.supervise.timeline import Timeline


def register(app: typer.Typer) -> None:
    @app.command("up")
    def up(
        ctx: typer.Context,
        name: Annotated[str, typer.Argument(metavar="NAME", help="A model's name or alias.")],
        overrides: Annotated[
            list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may repeat.")
        ] = None,
        port: Annotated[int | None, typer.Option("--port", help="TCP port; 0 takes a free one.")] = None,
        detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when ready; stop with: down.")] = False,
        replace: Annotated[bool, typer.Option("--replace", help="Stop a running one of this name first.")] = False,
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
            str | None, typer.Option("--node-addr", metavar="HOST", help="This node's address on their network.")
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
            return _up_on_cluster(invocation, name, chosen, runtime, replace=replace, dry_run=dry_run, as_json=as_json)
        plan = _plan(invocation, name, list(overrides or []), port, nodes)
        if dry_run:
            from launcher.commands.dry_run import dry_run as show

            return show(invocation.console, plan, as_json=as_json)
        return launch(invocation.console, plan, is_detached=detach, is_replacing=replace)


def _has_cluster(invocation: Invocation, name: str, overrides: list[str]) -> bool:
    """Look without a word: whoever plans resolves again, and says the warnings."""
    from launcher.registry import resolve

    return resolve(invocation.load_registry(), name, invocation.environ, overrides).cluster_name is not None


def _up_on_cluster(
    invocation: Invocation,
    name: str,
    overrides: list[str],
    runtime: str,
    *,
    replace: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    from launcher.commands import cluster as on_cluster
    from launcher.commands.render import cluster_plan_for

    plan = cluster_plan_for(invocation, name, overrides, None)
    if dry_run:
        from launcher.commands.plan import show_plan

        return show_plan(invocation.console, plan, as_json=as_json)
    return on_cluster.up(invocation, plan, runtime, is_replacing=replace)


def _plan(
    invocation: Invocation, name: str, overrides: list[str], port: int | None, nodes: NodesConfig | None = None
) -> LaunchPlan:
    from launcher.plan import make_plan, read_inventory
    from launcher.supervise.instance import InstanceFolder, state_root

    entry = invocation.resolve(name, overrides if port in (None, 0) else [*overrides, f"port={port}"])
    if port == 0:
        from launcher.supervise.ports import free_port

        entry = invocation.resolve(name, [*overrides, f"port={free_port(entry.text('host'))}"])
    folder = InstanceFolder(state_root(invocation.environ), entry.name)
    plan = make_plan(entry, read_inventory(), invocation.environ, folder.path, nodes=nodes)
    invocation.console.issues(plan.warnings)
    return plan


def launch(console: Console, plan: LaunchPlan, *, is_detached: bool, is_replacing: bool) -> int:
    """Start what was planned and return the exit code: when it has ended, or when it is ready and detached.

    Raises: HlaunchError; its message is the cause and the last thing to print.
    """
    from launcher.plan.drawing import base_url
    from launcher.plan.joined_nodes import head_url
    from launcher.supervise.instance import InstanceFolder
    from launcher.supervise.ports import check_port
    from launcher.supervise.procfs import own_age_seconds
    from launcher.supervise.spec import LaunchSpec

    began = time.monotonic() - own_age_seconds()
    plan.check()
    folder = InstanceFolder(plan.instance_folder.parent.parent, plan.name)
    folder.create()
    lock_fd = _take_lock(folder, is_replacing)
    ready_timeout_seconds = plan.ready_timeout_seconds
    if plan.is_head:
        check_port(plan.config.server.host, plan.config.server.port)
    if plan.config.has_other_nodes:
        # The nodes' own deadline comes first, since it can name who is missing.
        ready_timeout_seconds += plan.config.nodes.join_timeout_seconds
    spec = LaunchSpec(
        name=plan.name,
        model=plan.entry.model,
        url=base_url(plan) if plan.is_head else head_url(plan.config.nodes, plan.config.server.port),
        argv=plan.argv[: plan.argv.index("--status-fd")],
        working_folder=str(plan.working_folder),
        config_text=plan.config.to_json(),
        ready_timeout_seconds=ready_timeout_seconds,
        drain_timeout_seconds=plan.config.server.drain_timeout_seconds,
        environment=plan.environment_mapping,
    )
    view = LaunchView(console, plan, is_detached)
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


def _take_lock(folder: InstanceFolder, is_replacing: bool) -> int:
    """Become the one launcher of this name, and clear what a dead one left.

    Raises: PreflightError when a live one has it.
    """
    from launcher.errors import PreflightError
    from launcher.supervise.stopping import clean_stale, stop_instance

    lock_fd = folder.try_lock()
    if lock_fd is None and is_replacing:
        stop_instance(folder)
        deadline = time.monotonic() + 5
        while (lock_fd := folder.try_lock()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
    state = folder.read()
    if lock_fd is None:
        where = f" (pid {state.launcher.pid}, {state.url})" if state is not None else ""
        raise PreflightError(
            f"{folder.name} is already running{where}", hint=f"run: hlaunch down {folder.name}, or add --replace"
        )
    if state is not None:
        clean_stale(folder, state)
    return lock_fd


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


class LaunchView:
    """What the user sees of a launch; a `Listener` of the supervisor."""

    def __init__(self, console: Console, plan: LaunchPlan, is_detached: bool) -> None:
        from launcher.supervise.status import LineSplitter

        self.is_detached = is_detached
        self._console = console
        self._plan = plan
        self._view: PhaseView | None = None
        self._began: dict[str, float] = {}
        self._echo: Echo | None = None
        self._lines = LineSplitter()

    @property
    def name(self) -> str:
        return self._plan.name

    def started(self, pid: int) -> None:
        """The engine is on its way: now there is time to draw."""
        self._summary()
        self._view = self._console.phases()
        self._view.__enter__()

    def phase(self, phase: Phase) -> None:
        if self._view is None or phase.name == "ready":
            return
        if phase.state == "begin":
            self._began[phase.name] = phase.at
            self._view.begin(phase.name)
        elif phase.state == "end":
            self._view.end(phase.name, phase.at - self._began.pop(phase.name, phase.at), phase.detail)
        else:
            self._began.setdefault(phase.name, phase.at)
            self._view.progress(phase.name, phase.fraction, phase.detail)

    def ready(self, ready: Ready, timeline: Timeline) -> None:
        """Print the table, the address and the request to paste."""
        from launcher.plan.drawing import curl_line

        for name, began in list(self._began.items()):
            if self._view is not None:
                self._view.end(name, ready.at - began)
        self._began.clear()
        self.close()
        self._table(timeline)
        if not self._plan.is_head:
            nodes = self._plan.config.nodes
            self._console.data(f"{ready.model}: {nodes.names[nodes.rank]} serves with the head at {nodes.head_host}")
            self._await_end()
            return
        url = ready.url or self._plan.config.server.host
        names = ", ".join(self._plan.config.server.served_model_names)
        self._console.data(f"{names} is ready at {url}")
        self._console.data(curl_line(self._plan, url))
        for line in self._transports():
            self._console.note(f"transport {line}")
        self._await_end()

    def _await_end(self) -> None:
        from launcher.supervise.echo import Echo

        if self.is_detached:
            self._console.note(f"stop with: hlaunch down {self._plan.name}   log: hlaunch logs {self._plan.name}")
        else:
            from launcher.redaction import Redaction

            self._console.note("Ctrl-C stops")
            redaction = Redaction(os.environ)
            self._echo = Echo(lambda line: self._console.quote(redaction.line(line)))

    def stopping(self, drain_timeout_seconds: float) -> None:
        if drain_timeout_seconds:
            self._say(f"stopping: running requests get {drain_timeout_seconds:g} s; Ctrl-C again aborts")

    def aborting(self) -> None:
        self._say("aborting")

    def output(self, data: bytes) -> None:
        """Show the engine's own lines once it serves; before that they are in the log, and in the tail of a failure."""
        if self._echo is None:
            return
        for line in self._lines.feed(data):
            self._echo.say(line.decode("utf-8", errors="replace"))

    def fail(self) -> None:
        """Mark what was running when it broke."""
        for name in self._began:
            self._console.note(f"  {name:<10} failed")

    def close(self) -> bool:
        """Stop drawing and finish what is being written. Returns whether the terminal took it all."""
        if self._view is not None:
            self._view.__exit__(None, None, None)
            self._view = None
        if self._echo is not None:
            echo, self._echo = self._echo, None
            return echo.close()
        return True

    def _say(self, line: str) -> None:
        """Write without waiting for the terminal: the supervisor's loop is calling."""
        if self._echo is not None:
            self._echo.say(line)
        else:
            self._console.note(line)

    def _summary(self) -> None:
        from launcher.plan.drawing import placement_lines
        from launcher.sizes import size

        plan = self._plan
        self._console.note(f"{plan.name}: {plan.files.folder}")
        for line in placement_lines(plan):
            self._console.note(f"  {line}")
        if plan.fit is not None:
            memory = plan.fit.memory
            self._console.note(
                f"  memory: weights {size(memory.weight_bytes)}, KV {size(memory.kv_bytes)} "
                f"({memory.max_full_requests:.1f} x {plan.fit.limits.max_model_len} tokens), "
                f"{size(memory.budget_bytes)} available"
            )
        elif plan.memory:
            ranks = plan.memory
            self._console.note(
                f"  memory: weights {size(sum(rank.weight_bytes for rank in ranks))}, "
                f"KV {size(sum(rank.kv_bytes for rank in ranks))} on {len(ranks)} ranks, "
                f"{size(sum(rank.budget_bytes for rank in ranks))} available"
            )
        for note in plan.notes:
            self._console.note(f"  note: {note}")
        sys.stderr.flush()

    def _transports(self) -> list[str]:
        """What connects the ranks, by their own word in the log."""
        if self._plan.placement is None or len(self._plan.placement.ranks) < 2:
            return []
        from launcher.fabric.transports import NOT_TOLD, summary
        from launcher.supervise.instance import InstanceFolder
        from launcher.supervise.local_ranks import transports_here

        folder = self._plan.instance_folder
        pairs = transports_here(InstanceFolder(folder.parent.parent, self._plan.name))
        # NCCL connects some ways at their first use only; `status` tells them then.
        return summary([pair for pair in pairs if pair.transport != NOT_TOLD])

    def _table(self, timeline: Timeline) -> None:
        from launcher.plan.drawing import span_bar

        total = timeline.total_seconds
        rows = [
            (row.name, f"{row.seconds:.2f} s", span_bar(row.began_seconds, row.seconds, total, 24), row.detail)
            for row in timeline.rows()
            if row.name != "ready"
        ]
        rows.append(("ready", f"{total:.2f} s", "", ""))
        self._console.table(("PHASE", ">TIME", "FROM START TO READY", "DETAIL"), rows)
