"""The phases of a start, on stderr: live bars on a terminal, plain lines elsewhere.

Knows: what is drawn of a phase, and when. Refuses to know: which phases there are, where their news come from.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from launcher.console import visible

if TYPE_CHECKING:
    import rich.progress

    from launcher.console import Console

__all__ = ["LivePhases", "PhaseView", "PlainPhases"]


class PhaseView(Protocol):
    """Shows the phases of a start. Use as a context manager; leaving it stops any live drawing.

    `begin`, `progress` and `end` come in any number and order per phase. Not thread-safe: one thread calls it.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def begin(self, phase: str) -> None: ...

    def progress(self, phase: str, fraction: float | None, detail: str = "") -> None: ...

    def end(self, phase: str, seconds: float, detail: str = "") -> None: ...


class _Phases:
    """What both views remember: each phase's last detail. Names take `width` columns."""

    def __init__(self, console: Console, width: int) -> None:
        self._console = console
        self._width = width
        self._details: dict[str, str] = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def _note(self, phase: str, detail: str) -> None:
        if detail or phase not in self._details:
            self._details[phase] = detail


class PlainPhases(_Phases):
    """Plain lines: one when a phase ends, and one every few seconds while it runs."""

    EVERY_SECONDS = 5.0

    def __init__(self, console: Console, width: int) -> None:
        super().__init__(console, width)
        self._spoke_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def begin(self, phase: str) -> None:
        self._note(phase, "")
        self._spoke_at = time.monotonic()

    def progress(self, phase: str, fraction: float | None, detail: str = "") -> None:
        self._note(phase, detail)
        now = time.monotonic()
        if now - self._spoke_at >= self.EVERY_SECONDS:
            self._spoke_at = now
            percent = "" if fraction is None else f" {100 * min(1.0, max(0.0, fraction)):3.0f}%"
            self._console.note(f"  {phase:<{self._width}}{percent} {detail}".rstrip())

    def end(self, phase: str, seconds: float, detail: str = "") -> None:
        self._note(phase, detail)
        self._spoke_at = time.monotonic()
        self._console.note(f"  {phase:<{self._width}} {seconds:6.2f} s  {self._details[phase]}".rstrip())


class LivePhases(_Phases):
    """One live line per phase: a mark, the name, a bar, the seconds, the last detail."""

    def __init__(self, console: Console, width: int) -> None:
        super().__init__(console, width)
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress: rich.progress.Progress = Progress(
            TextColumn("{task.fields[mark]}", markup=False, style="green"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20, complete_style="cyan", finished_style="green", pulse_style="cyan"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console.rich(console.stderr),
            refresh_per_second=10,
            # What is drawn here is drawn better afterwards, as a table.
            transient=True,
            # The engine's own output may share the terminal; rich would swallow it line by line.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, phase: str) -> None:
        self._note(phase, "")
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(f"{phase:<{self._width}}", total=None, mark="…", detail="")

    def progress(self, phase: str, fraction: float | None, detail: str = "") -> None:
        self.begin(phase)
        self._note(phase, detail)
        total = None if fraction is None else 1.0
        self._progress.update(
            self._tasks[phase], total=total, completed=fraction or 0.0, detail=visible(self._details[phase])
        )

    def end(self, phase: str, seconds: float, detail: str = "") -> None:
        self.begin(phase)
        self._note(phase, detail)
        shown = f"{seconds:.2f} s  {self._details[phase]}".rstrip()
        self._progress.update(self._tasks[phase], total=1.0, completed=1.0, mark="✓", detail=visible(shown))
        self._progress.stop_task(self._tasks[phase])
