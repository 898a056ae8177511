"""The terminal: data to stdout, messages to stderr. With `launcher.console_phases` all that knows rich; loaded late.

Knows: colour or not, width, escaping, tables, errors, phases with bars. Refuses to know: what is being said.

Every text may come from a registry or a child process, so none of it is markup and none of it may move the cursor:
rich's markup is never parsed, and control characters are shown as escapes. Colour needs a terminal and is off with
`--plain`, `--no-color`, a non-empty `NO_COLOR` or `TERM=dumb`; what is printed reads the same without it.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO
from unicodedata import combining, east_asian_width

if TYPE_CHECKING:
    import rich.console

    from launcher.console_phases import PhaseView
    from launcher.errors import HlaunchError, Issue

__all__ = ["SEVERITY_STYLES", "Console", "Line", "PhaseView"]

Line = list[tuple[str, str]]
"""Parts of one line, each with the name of its style; an empty name is no style."""

PIPE_WIDTH = 80
"""Columns when the output is no terminal."""
MAX_ISSUES = 50
"""More problems than this are counted, not printed; `--json` has all of them."""

SEVERITY_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "bold blue"}


class Console:
    """Where a command writes. One per invocation; streams and environment are arguments, for tests."""

    def __init__(
        self,
        *,
        is_plain: bool = False,
        environ: Mapping[str, str] | None = None,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
    ) -> None:
        # Python has no stream where the shell closed one (`hlaunch list >&-`): what goes there is lost, as was asked.
        self._stdout = stdout or sys.stdout or io.StringIO()
        self._stderr = stderr or sys.stderr or io.StringIO()
        environ = environ or {}
        self._is_plain = is_plain or bool(environ.get("NO_COLOR")) or environ.get("TERM") == "dumb"
        self._rich: dict[int, rich.console.Console] = {}

    @property
    def is_live(self) -> bool:
        """Say whether stderr is a terminal that may be redrawn."""
        return not self._is_plain and self._stderr.isatty()

    @property
    def has_screen(self) -> bool:
        """Say whether stdout is a terminal that may be redrawn."""
        return not self._is_plain and self._stdout.isatty()

    @property
    def has_unicode(self) -> bool:
        """Say whether stdout can carry block characters."""
        return (getattr(self._stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"

    @property
    def width(self) -> int:
        """Columns of stdout, 80 when it is no terminal."""
        return shutil.get_terminal_size().columns if self._stdout.isatty() else PIPE_WIDTH

    @contextmanager
    def screen(self) -> Iterator[Callable[[Sequence[Line]], None]]:
        """Yield a function that redraws stdout's terminal with lines; the last picture stays."""
        from rich.live import Live
        from rich.text import Text

        def draw(lines: Sequence[Line]) -> None:
            parts = [Text.assemble(*((visible(text), style) for text, style in line)) for line in lines]
            picture = Text("\n", no_wrap=True, overflow="crop").join(parts)
            live.update(picture, refresh=True)

        live = Live(console=self.rich(self._stdout), auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        with live:
            yield draw

    def styled(self, line: Line) -> None:
        """Write one line of styled parts to stdout."""
        self._write(self._stdout, *(line or [("", "")]))

    def styled_note(self, line: Line) -> None:
        """Write one line of styled parts to stderr."""
        self._write(self._stderr, *(line or [("", "")]))

    def data(self, text: str = "") -> None:
        """Write one line of result to stdout, unwrapped."""
        self._write(self._stdout, text)

    def json(self, value: object) -> None:
        """Write a value as indented JSON to stdout."""
        # Only ASCII: a reader in any locale gets the same value.
        self._stdout.write(json.dumps(value, indent=2) + "\n")
        self._stdout.flush()

    def raw(self, text: str) -> None:
        """Write text of our own making to stdout as it is."""
        self._stdout.write(_encodable(text, self._stdout))
        self._stdout.flush()

    def difference(self, lines: Iterable[str]) -> None:
        """Write a unified diff to stdout; a terminal shows what goes and what comes in colour."""
        styles = {"+": "green", "-": "red", "@": "cyan"}
        for line in lines:
            is_head = line.startswith(("+++", "---"))
            self._write(self._stdout, (line, "bold" if is_head else styles.get(line[:1], "")))

    def piece(self, text: str, *, is_muted: bool = False) -> None:
        """Write a piece of a model's running text: to stdout, or dimmed to stderr. Line ends pass, controls do not."""
        stream = self._stderr if is_muted else self._stdout
        shown = _encodable("\n".join(visible(line) for line in text.split("\n")), stream)
        if is_muted and not self._is_plain and stream.isatty():
            shown = f"\x1b[2m{shown}\x1b[22m"
        stream.write(shown)
        stream.flush()

    def heading(self, text: str) -> None:
        """Write a title line to stdout."""
        self._write(self._stdout, text, "bold")

    def note(self, text: str) -> None:
        """Write one line of message to stderr; on a terminal it hangs below its label where it is longer than one."""
        self._message((text, ""))

    def quote(self, text: str) -> None:
        """Write a line of another program to stderr, never wrapped: it must survive to be copied."""
        self._write(self._stderr, text)

    def info(self, message: str, hint: str = "") -> None:
        """Write `info: …` and its hint to stderr."""
        self._labelled("info", message, hint)

    def warning(self, message: str, hint: str = "") -> None:
        """Write `warning: …` and its hint to stderr."""
        self._labelled("warning", message, hint)

    def error(self, message: str, *, hint: str = "", details: Iterable[str] = ()) -> None:
        """Write `error: …`, the details, and `hint: …` to stderr; never a traceback."""
        self._labelled("error", message, "")
        for line in details:
            self.note(f"  {line}")
        self._hint(hint)

    def failure(self, error: HlaunchError) -> None:
        """Write an exception of ours: its located issues if it has any, then the one-line verdict."""
        self.issues(error.issues)
        self.error(error.message, hint=error.hint, details=error.details)

    def issues(self, issues: Sequence[Issue]) -> None:
        """Write located problems to stderr, each with its hint, at most 50."""
        for issue in issues[:MAX_ISSUES]:
            head, label, tail = issue.headline().partition(f"{issue.severity}[{issue.code}]")
            self._message((head, ""), (label, SEVERITY_STYLES[issue.severity]), (tail, ""))
            self._hint(issue.hint)
        if len(issues) > MAX_ISSUES:
            self.note(f"… and {len(issues) - MAX_ISSUES} more")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "") -> None:
        """Write a table to stdout. Cells wrap so that a line has at most the terminal's width (80 in a pipe)."""
        if title:
            self.heading(title)
        self._table(self._stdout, columns, rows)

    def note_table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Write a table to stderr: one that belongs to the messages."""
        self._table(self._stderr, columns, rows)

    def phases(self, width: int = 10) -> PhaseView:
        """Return the view of a start, on stderr: live bars on a terminal, plain lines elsewhere.

        The names of the phases take `width` columns.
        """
        from launcher.console_phases import LivePhases, PlainPhases

        return LivePhases(self, width) if self.is_live else PlainPhases(self, width)

    def _hint(self, hint: str) -> None:
        if hint:
            self._message(("hint: ", "cyan"), (hint, ""))

    def _labelled(self, severity: str, message: str, hint: str) -> None:
        self._message((f"{severity}: ", SEVERITY_STYLES[severity]), (message, ""))
        self._hint(hint)

    def _message(self, *parts: tuple[str, str]) -> None:
        """Write a message to stderr: one line, or on a terminal as many as its width asks for."""
        stream = self._stderr
        shown = [(visible(text), style) for text, style in parts]
        lines = [shown]
        if stream.isatty():
            width = shutil.get_terminal_size().columns
            first, *rest = hang("".join(text for text, _ in shown), width)
            lines = [_cut_parts(shown, len(first)), *([(line, "")] for line in rest)]
        for line in lines:
            self._write(stream, *line)

    def _write(self, stream: TextIO, *parts: str | tuple[str, str]) -> None:
        """Write one line of styled parts, control characters escaped. Bare text has no style."""
        styled = [(part, "") if isinstance(part, str) else part for part in parts]
        if len(parts) == 2 and isinstance(parts[0], str) and isinstance(parts[1], str):
            styled = [(parts[0], parts[1])]
        if self._is_plain or not stream.isatty():
            stream.write(_encodable("".join(visible(text) for text, _ in styled), stream) + "\n")
            stream.flush()
            return
        from rich.text import Text

        line = Text.assemble(*((visible(text), style) for text, style in styled))
        self.rich(stream).print(line, soft_wrap=True)

    def _table(self, stream: TextIO, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        body = [[visible(cell) for cell in row] for row in rows]
        width = shutil.get_terminal_size().columns if stream.isatty() else PIPE_WIDTH
        header, *lines = layout_table(columns, body, width)
        self._write(stream, (header, "bold"))
        for line in lines:
            self._write(stream, line)

    def rich(self, stream: TextIO) -> rich.console.Console:
        """Return the rich console of a stream; colours as decided here, never by rich."""
        if id(stream) not in self._rich:
            from rich.console import Console as RichConsole

            is_styled = not self._is_plain and stream.isatty()
            self._rich[id(stream)] = RichConsole(
                file=stream,
                force_terminal=is_styled,
                no_color=not is_styled,
                color_system="standard" if is_styled else None,
                width=None if stream.isatty() else PIPE_WIDTH,
                markup=False,
                emoji=False,
                highlight=False,
                legacy_windows=False,
            )
        return self._rich[id(stream)]

    @property
    def stderr(self) -> TextIO:
        return self._stderr


def layout_table(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Lay out a table without rules in lines of at most `width`, header first; `>` before a name aligns right.

    A column keeps its longest word whole while there is room: names and positions must survive to be copied. Where a
    few long names in the first column would fold many other rows, they stand on lines of their own.
    """
    cells = [[column.removeprefix(">") for column in columns], *rows]
    natural = [max(_width(row[i]) for row in cells) for i in range(len(columns))]
    lines = _laid_out(columns, cells, natural, width)
    if columns[0].startswith(">") or natural[0] > width:
        return lines
    room = max(width, 20) - sum(natural[1:]) - 2 * (len(columns) - 1)
    if usual := _usual_width([row[0] for row in cells], room):
        return min(lines, _laid_out(columns, cells, [usual, *natural[1:]], width), key=len)
    return lines


def _laid_out(columns: Sequence[str], cells: Sequence[Sequence[str]], natural: Sequence[int], width: int) -> list[str]:
    """Lay out rows whose columns would like to be `natural` wide; a first cell that is wider stands alone."""
    widths = [max(_width(word) for row in cells for word in (row[i].split() or [""])) for i in range(len(columns))]
    widths = [min(pair) for pair in zip(widths, natural, strict=True)]
    room = max(width, 20) - 2 * (len(columns) - 1)
    while sum(widths) > room:
        widest = widths.index(max(widths))
        widths[widest] -= 1
    # What is left goes to whoever still wraps, one column after the other, so that short columns finish first.
    while sum(widths) < min(room, sum(natural)):
        i = min((k for k in range(len(columns)) if widths[k] < natural[k]), key=lambda k: natural[k] - widths[k])
        widths[i] += min(natural[i] - widths[i], room - sum(widths))
    lines = []
    for row in cells:
        wrapped = [_wrap(cell, max(2, widths[i])) for i, cell in enumerate(row)]
        if widths[0] == natural[0] < _width(row[0]):
            lines.append(row[0])
            wrapped[0] = [""]
        for k in range(max(len(part) for part in wrapped)):
            parts = [part[k] if k < len(part) else "" for part in wrapped]
            aligned = [
                pad + part if columns[i].startswith(">") else part + pad
                for i, part in enumerate(parts)
                for pad in (" " * (widths[i] - _width(part)),)
            ]
            lines.append("  ".join(aligned).rstrip())
    return lines


def _usual_width(cells: Sequence[str], room: int) -> int:
    """Return the width of the first column without those few cells that do not fit into `room`; 0: all fit, or many."""
    fitting = [_width(cell) for cell in cells if _width(cell) <= room]
    num_long = len(cells) - len(fitting)
    is_few = 0 < num_long <= max(1, len(cells) // 4)
    return max(fitting) if is_few and fitting and _width(cells[0]) <= room else 0


def _width(text: str) -> int:
    """Columns of a terminal that a text takes: two for a wide character, none for a combining one."""
    if text.isascii():
        return len(text)
    return sum(0 if combining(ch) else 2 if east_asian_width(ch) in "WF" else 1 for ch in text)


def clip(text: str, width: int) -> str:
    """Cut a line to so many columns, the last three of them dots; what fits stays as it is."""
    if _width(text) <= width:
        return text
    while text and _width(text) > width - 3:
        text = text[:-1]
    return text + "..."[: max(0, width)]


def _wrap(text: str, width: int) -> list[str]:
    """Break a text into lines of at most `width` columns, at spaces while there are any."""
    lines = [""]
    for word in text.split():
        if lines[-1] and _width(lines[-1]) + 1 + _width(word) <= width:
            lines[-1] += " " + word
            continue
        if lines[-1]:
            lines.append("")
        for ch in word if _width(word) > width else (word,):
            if lines[-1] and _width(lines[-1]) + _width(ch) > width:
                lines.append("")
            lines[-1] += ch
    return lines


_LABEL = re.compile(r" *(?:[a-z]+: )?")
_WORD = re.compile(r"run: .+|--[a-z-]+ \S+|\S+")
"""What stays on one line: a command to paste, an option with its value, a word."""


def hang(text: str, width: int) -> list[str]:
    """Break a message into lines of at most `width` columns; those after the first stand below what its label names.

    A word that is longer, such as a path, stays whole.
    """
    if _width(text) <= width:
        return [text]
    label = _LABEL.match(text)
    lead = label.end() if label is not None else 0
    lines, line, end = [], text[:lead], lead
    for word in _WORD.finditer(text, lead):
        gap = text[end : word.start()]
        if line.strip() and end > lead and _width(line) + len(gap) + _width(word[0]) > width:
            lines.append(line)
            line = " " * min(lead or 2, width // 2) + word[0]
        else:
            line += gap + word[0]
        end = word.end()
    return [*lines, line]


def _cut_parts(parts: Sequence[tuple[str, str]], length: int) -> list[tuple[str, str]]:
    """Return the first `length` characters of styled parts."""
    found = []
    for text, style in parts:
        found.append((text[:length], style))
        length -= len(found[-1][0])
    return [part for part in found if part[0]]


def visible(text: str) -> str:
    """Escape what a terminal would obey: control characters, bidirectional overrides, line breaks."""
    if text.isprintable():
        return text
    return "".join(ch if ch.isprintable() else _escape(ch) for ch in text)


def _escape(ch: str) -> str:
    return " " if ch in "\n\t" else ch.encode("unicode_escape").decode("ascii")


def _encodable(text: str, stream: TextIO) -> str:
    """Replace what the stream's encoding lacks, so that an ASCII locale never raises."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
