"""What the user sees of a launch on this host: summary, phases, table, address, the engine's own lines.

Knows: words and their order. Refuses to know: the start itself (`launcher.commands.up`) and terminals (`console`).
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.console import Console, PhaseView
    from launcher.plan import LaunchPlan
    from launcher.supervise.echo import Echo
    from launcher.supervise.status import Phase, Ready
    from launcher.supervise.timeline import Timeline


class LaunchView:
    """What the user sees of a launch; a `Listener` of the supervisor."""

    def __init__(self, console: Console, plan: LaunchPlan, is_detached: bool, *, is_transient: bool = False) -> None:
        from launcher.supervise.status import LineSplitter

        self.is_detached = is_detached
        self._is_transient = is_transient
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

        if self._is_transient:
            self._console.note(f"it is stopped after this command   log: hlaunch logs {self._plan.name}")
        elif self.is_detached:
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
