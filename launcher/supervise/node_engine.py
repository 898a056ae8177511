"""What the head's engine says on its status pipe, as this node's own story: phases, ready, restarts, last words.

Knows: the engine's records, which of its phases need another name beside a node's own. Refuses to know: pipes,
processes, what to do about an end (`node_supervisor`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from launcher.supervise.node_report import NodeReport
from launcher.supervise.status import LAST_WORDS_SECONDS, RESTART_PHASE, Fatal, Phase, Ready, parse_record

_ENGINE_NODES, PLACEMENT_PHASE = "nodes", "placement"
"""The engine's wait for its ranks' nodes, and its name here, where `nodes` are those of Ray's cluster."""
_RAY_SHARE = "Ray: "
"""How the engine begins the line that says what of the wait was Ray's."""


class EngineStory:
    """Takes the engine's lines and tells the report. `tell` takes one event, for the log too."""

    def __init__(self, report: NodeReport, tell: Callable[[str], None]) -> None:
        self._report = report
        self._tell = tell
        self._ray_share = ""
        self.fatal: Fatal | None = None
        self.fatal_deadline: float | None = None
        self.is_restarting = False
        self.is_ready = False

    @property
    def restarting_state(self) -> str:
        """What a restart makes of the node: several engines go on serving without the one."""
        engines = self._report.facts.get("engines", 1)
        return "degraded" if isinstance(engines, int) and engines > 1 else "restarting"

    def take(self, line: bytes) -> None:
        """Take in one line; what is no record is dropped."""
        record = parse_record(line, time.monotonic())
        if isinstance(record, Fatal):
            self.fatal = self.fatal or record
            self.fatal_deadline = time.monotonic() + LAST_WORDS_SECONDS
        elif isinstance(record, Ready):
            self._report.url, self._report.model, self._report.facts = record.url, record.model, record.facts
            self.is_ready = True
        elif isinstance(record, Phase):
            self._on_phase(record)

    def _on_phase(self, phase: Phase) -> None:
        if phase.name == _ENGINE_NODES:
            if phase.detail.startswith(_RAY_SHARE):
                self._ray_share = phase.detail
            detail = self._ray_share if phase.state == "end" and self._ray_share else phase.detail
            phase = replace(phase, name=PLACEMENT_PHASE, detail=detail)
        self._report.phase(phase)
        if phase.name == RESTART_PHASE and phase.state in ("begin", "end"):
            self.is_restarting = phase.state == "begin"
            self._tell(f"engine: {phase.detail}")
