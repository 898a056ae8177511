"""What a node says of itself: phases, peers, events, and in the end one cause. The control socket sends exactly this.

Knows: the report's shape, kept small. Refuses to know: sockets and processes. Times are
CLOCK_MONOTONIC seconds and ages, never wall-clock differences.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import PreflightError
from launcher.supervise.instance import write_private
from launcher.supervise.node_records import LAST_END_FILE, read_record
from launcher.supervise.node_spec import NodeSpec
from launcher.supervise.procfs import ProcessIdentity
from launcher.supervise.status import Phase

MAX_EVENTS = 20


@dataclass(slots=True)
class NodeReport:
    """The node's story so far. `state`: starting, ready, restarting, degraded, stopping, failed, stopped."""

    spec: NodeSpec
    state: str = "starting"
    url: str = ""
    model: str = ""
    cause: str = ""
    hint: str = ""
    exit_code: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the fabric as this node's processes see them, secrets hidden."""
    nodes: list[dict[str, Any]] = field(default_factory=list)
    previous: dict[str, Any] | None = None
    processes: dict[str, ProcessIdentity] = field(default_factory=dict)
    _phases: dict[str, Phase] = field(default_factory=dict)
    _began: dict[str, float] = field(default_factory=dict)
    _events: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))
    _started: float = field(default_factory=time.monotonic)
    _ready_seconds: float | None = None

    def phase(self, phase: Phase) -> None:
        """Take in one record of a phase."""
        self._began.setdefault(phase.name, phase.at)
        self._phases[phase.name] = phase

    def begin(self, name: str, detail: str = "") -> None:
        self.phase(Phase(name, "begin", None, detail, time.monotonic()))

    def progress(self, name: str, fraction: float | None, detail: str) -> None:
        self.phase(Phase(name, "progress", fraction, detail, time.monotonic()))

    def end(self, name: str, detail: str = "") -> None:
        self.phase(Phase(name, "end", 1.0, detail, time.monotonic()))

    def event(self, text: str) -> None:
        """Remember one thing that happened."""
        self._events.append((time.monotonic(), text))

    def mark_ready(self) -> None:
        self.state = "ready"
        if self._ready_seconds is None:
            self._ready_seconds = time.monotonic() - self._started

    def to_data(self) -> dict[str, Any]:
        """Everything, as plain values; times as ages in seconds."""
        now = time.monotonic()
        return {
            "launch": self.spec.launch,
            "cluster": self.spec.cluster,
            "node": self.spec.node,
            "role": self.spec.role,
            "ip": self.spec.ip,
            "plan": self.spec.plan,
            "state": self.state,
            "url": self.url,
            "model": self.model or self.spec.model,
            "pid": os.getpid(),
            "uptime_seconds": round(now - self._started, 1),
            "ready_seconds": None if self._ready_seconds is None else round(self._ready_seconds, 2),
            "cause": self.cause,
            "hint": self.hint,
            "exit_code": self.exit_code,
            "facts": self.facts,
            "versions": self.versions,
            "environment": self.environment,
            "nodes": self.nodes,
            "previous": self.previous,
            "phases": [
                {
                    "name": name,
                    "state": phase.state,
                    "fraction": phase.fraction,
                    "detail": phase.detail,
                    "seconds": round((phase.at if phase.state == "end" else now) - self._began[name], 2),
                }
                for name, phase in self._phases.items()
            ],
            "events": [{"age_seconds": round(now - at, 1), "text": text} for at, text in self._events],
            "processes": {name: item.to_data() for name, item in self.processes.items()},
        }

    def write_end(self, folder: Path) -> None:
        """Leave cause and exit code for the next start of this node, and for `ps`; a full disk is not a reason."""
        record = {"cause": self.cause, "exit_code": self.exit_code, "at": round(time.time(), 1)}
        record["restarts"] = 1 + (self.previous or {}).get("restarts", 0) if self.cause else 0
        try:
            write_private(folder / LAST_END_FILE, json.dumps(record))
        except PreflightError:
            return

    def read_previous(self, folder: Path) -> None:
        """Learn how the last run of this node ended, if it did not end well; what is told once is not told again."""
        loaded = read_record(folder / LAST_END_FILE)
        with contextlib.suppress(OSError):
            (folder / LAST_END_FILE).unlink()
        if loaded.get("cause"):
            self.previous = loaded
            self.event(f"started again after: {loaded['cause']}")
