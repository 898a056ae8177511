"""How lines of a log are shown: without secrets, with the cause and the fix of those that are known failures.

Knows: columns, JSON lines, when a finding is told. Refuses to know: where lines come from.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from launcher.fabric.attest import attest
from launcher.fabric.log_lines import LogFinding, classify
from launcher.redaction import Redaction
from launcher.sizes import counted
from launcher.supervise.logfile import begins_run

if TYPE_CHECKING:
    from launcher.console import Console


@dataclass(slots=True)
class _Run:
    """What a node's last run has said: of each class the first finding and the number of lines."""

    first: dict[str, LogFinding] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    about_fabric: list[str] = field(default_factory=list)


class LogView:
    """Shows lines one by one. `width` is that of the column of nodes; 0: there is none.

    Lines of every run are shown, and what they mean is told of the last run only: what ended an earlier launch is over.
    With `is_about_fabric` only lines are shown that say something of the fabric or of a known failure.
    """

    def __init__(
        self,
        console: Console,
        environ: Mapping[str, str],
        *,
        as_json: bool,
        is_about_fabric: bool = False,
        width: int = 0,
    ) -> None:
        self._console = console
        self._redaction = Redaction(environ)
        self._as_json = as_json
        self._is_live = False
        self._is_about_fabric = is_about_fabric
        self._width = width
        self._runs: dict[str, _Run] = {}
        self._num_read = 0
        self._is_any_shown = False

    def show(self, line: str, node: str = "") -> None:
        """Print one line; what it means comes at once after `go_live`, else at the end."""
        text = self._redaction.line(line)
        found = classify(text)
        self._num_read += 1
        if begins_run(line):
            self._runs[node] = _Run()
        run = self._runs.setdefault(node, _Run())
        if self._is_about_fabric:
            if found is None:
                return
            run.about_fabric.append(text)
        self._is_any_shown = True
        if self._as_json:
            told = (
                None if found is None else {name: getattr(found, name) for name in ("code", "severity", "cause", "fix")}
            )
            self._console.raw(json.dumps({"node": node or None, "line": text, "finding": told}) + "\n")
            return
        self._console.data(f"{node:<{self._width}} | {text}" if self._width else text)
        if found is None or found.severity == "info":
            return
        is_new = all(found.code not in other.first for other in self._runs.values())
        run.first.setdefault(found.code, found)
        run.counts[found.code] += 1
        if is_new and self._is_live:
            self._tell(found, node)

    def go_live(self) -> None:
        """Tell what was found so far; from now on each class is told with its first line, for somebody who follows."""
        self._tell_all()
        self._is_live = True

    def conclude(self) -> None:
        """Tell what was found, errors first, each class once; that nothing was, where only some lines were wanted."""
        if self._is_about_fabric and not self._is_any_shown:
            read = counted(self._num_read, "line")
            self._console.note(f"nothing about the fabric and no known failure in {read}; --lines N reads more")
        if not self._is_live:
            self._tell_all()

    def _tell_all(self) -> None:
        if self._as_json:
            return
        first: dict[str, tuple[LogFinding, str]] = {}
        for node, run in self._runs.items():
            if told := attest(run.about_fabric).describe():
                self._console.note(f"{node}: {told}" if node else told)
            for code, found in run.first.items():
                first.setdefault(code, (found, node))
        for found, node in sorted(first.values(), key=lambda item: item[0].severity != "error"):
            self._tell(found, node)

    def _tell(self, found: LogFinding, node: str) -> None:
        count = sum(run.counts[found.code] for run in self._runs.values())
        where = f" on {node}" if node else ""
        times = f" ({count} lines)" if count > 1 else ""
        self._console.note(f"{found.severity}[{found.code}]{where}: {found.cause}{times}")
        if found.fix:
            self._console.note(f"  fix: {found.fix}")
