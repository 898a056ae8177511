"""How lines of a log are shown: without secrets, with the cause and the fix of those that are known failures.

Knows: columns, JSON lines, when a finding is told. Refuses to know: where lines come from.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from launcher.fabric.attest import attest
from launcher.fabric.log_lines import LogFinding, classify
from launcher.redaction import Redaction
from launcher.sizes import counted

if TYPE_CHECKING:
    from launcher.console import Console


class LogView:
    """Shows lines one by one. `width` is that of the column of nodes; 0: there is none.

    With `is_about_fabric` only lines are shown that say something of the fabric or of a known failure.
    """

    def __init__(
        self,
        console: Console,
        environ: Mapping[str, str],
        *,
        as_json: bool,
        is_live: bool,
        is_about_fabric: bool = False,
        width: int = 0,
    ) -> None:
        self._console = console
        self._redaction = Redaction(environ)
        self._as_json = as_json
        self._is_live = is_live
        self._is_about_fabric = is_about_fabric
        self._width = width
        self._first: dict[str, tuple[LogFinding, str]] = {}
        self._of_fabric: dict[str, list[str]] = {}
        self._counts: Counter[str] = Counter()
        self._num_read = 0

    def show(self, line: str, node: str = "") -> None:
        """Print one line; what it means comes at once while somebody follows, else at the end."""
        text = self._redaction.line(line)
        found = classify(text)
        self._num_read += 1
        if self._is_about_fabric:
            if found is None:
                return
            self._of_fabric.setdefault(node, []).append(text)
        if self._as_json:
            told = (
                None if found is None else {name: getattr(found, name) for name in ("code", "severity", "cause", "fix")}
            )
            self._console.raw(json.dumps({"node": node or None, "line": text, "finding": told}) + "\n")
            return
        self._console.data(f"{node:<{self._width}} | {text}" if self._width else text)
        if found is None or found.severity == "info":
            return
        is_new = found.code not in self._first
        self._first.setdefault(found.code, (found, node))
        self._counts[found.code] += 1
        if is_new and self._is_live:
            self._tell(found, node)

    def conclude(self) -> None:
        """Tell what was found, errors first, each class once; that nothing was, where only some lines were wanted."""
        if self._is_about_fabric and not self._of_fabric:
            read = counted(self._num_read, "line")
            self._console.note(f"nothing about the fabric and no known failure in {read}; --lines N reads more")
        if self._is_live or self._as_json:
            return
        for node, lines in self._of_fabric.items():
            if told := attest(lines).describe():
                self._console.note(f"{node}: {told}" if node else told)
        for found, node in sorted(self._first.values(), key=lambda item: item[0].severity != "error"):
            self._tell(found, node)

    def _tell(self, found: LogFinding, node: str) -> None:
        count = self._counts[found.code]
        where = f" on {node}" if node else ""
        times = f" ({count} lines)" if count > 1 else ""
        self._console.note(f"{found.severity}[{found.code}]{where}: {found.cause}{times}")
        if found.fix:
            self._console.note(f"  fix: {found.fix}")
