"""Screens as people see them: a command's words at 80 columns, compared with a reviewed file, without and with colour.

To accept a change: ACCEPT_SCREENS=1 pytest tests/launcher, then read the diff. A screen's file begins with the command
line and ends with the exit code when that is not 0. What differs from run to run is masked, as narrowly as can be and
without moving a column.
"""

from __future__ import annotations

import io
import os
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.cli import run

ROOT = Path(__file__).parents[2]
SCREENS = Path(__file__).with_name("screens")
Mask = Callable[[str], str]

# Messages, and what is there to be pasted, are one line each: a terminal folds them by itself. So are lines of a file.
_UNFOLDED = re.compile(
    r"^(error|hint|warning|info|note| +run|  fix|  looked in|[\w./-]+yml:\d+:|curl |sudo |[-+ ]  |\S+ +\| )"
    r"|FOLDER|PYTHON|ROOT"
)
_OWN_VARIABLES = (
    "HLAUNCH_",
    "HF_",
    "XDG_",
    "NCCL_",
    "RAY_",
    "GLOO_",
    "UCX_",
    "CUDA_",
    "OMP_",
    "NO_COLOR",
    "MODEL_NAME",
)


class Pipe(io.StringIO):
    """A stream that carries every character."""

    encoding = "utf-8"


class Terminal(Pipe):
    """One that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@dataclass(frozen=True)
class Screens:
    """A folder in which commands run, and the reviewed files of what they say."""

    folder: Path
    reviewed: Path
    monkeypatch: pytest.MonkeyPatch

    def check(self, name: str, args: Sequence[str], code: int = 0, *masks: Mask, drawn: str = "") -> None:
        """Run a command twice, into a pipe and at a terminal: both say what was reviewed.

        Results are the same to the character, messages the same words, which a terminal has in lines of its width.
        `drawn` matches lines of a pipe for which a terminal has bars that go away.
        """
        plain = self.shown(args, Pipe, masks)
        self.compare(name, plain, code)
        if drawn:
            plain = re.sub(rf"^({drawn}).*\n", "", plain, flags=re.MULTILINE)
        seen = self.shown(args, Terminal, masks)
        assert _flowing(seen) == _flowing(plain), "a terminal shows other words"
        messages = seen.partition("--- messages\n")[2].splitlines()
        assert [line for line in messages if len(line) > 80 and not line.startswith("hint: run: ")] == []

    def compare(self, name: str, text: str, code: int = 0) -> None:
        """Compare a screen with its reviewed file, and look that it keeps to 80 columns."""
        ending = re.search(r"^--- exit (\d+)$", text, re.MULTILINE)
        assert int(ending[1] if ending else 0) == code, text
        path = self.reviewed / f"{name}.txt"
        if os.environ.get("ACCEPT_SCREENS"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert text == path.read_text()
        _, *lines = text.splitlines()
        assert [line for line in lines if len(line) > 80 and not _UNFOLDED.search(line)] == []

    def shown(self, args: Sequence[str], stream: type[Pipe], masks: Iterable[Mask] = ()) -> str:
        """Run a command in this process and return its screen, colours stripped."""
        with self.monkeypatch.context() as patch:
            out, err = stream(), stream()
            patch.setattr("sys.stdout", out)
            patch.setattr("sys.stderr", err)
            patch.setenv("COLUMNS", "80")
            patch.setenv("TERM", "xterm-256color")
            code = run(list(args))
        words, messages = (last_picture(part.getvalue()) for part in (out, err))
        return self.screen(args, words, messages, int(code or 0), masks)

    def screen(self, args: Sequence[str], out: str, err: str, code: int, masks: Iterable[Mask] = ()) -> str:
        """Lay out one screen's text: the command, what it said, its messages, its exit code."""
        text = f"$ {shlex.join(['hlaunch', *args])}\n{out}"
        text += f"--- messages\n{err}" if err else ""
        text += f"--- exit {code}\n" if code else ""
        for mask in (self._places, *masks):
            text = mask(text)
        return text

    def _places(self, text: str) -> str:
        """Name the folders that differ between machines."""
        for path, name in ((self.folder, "FOLDER"), (ROOT, "ROOT")):
            text = text.replace(str(path), name)
        return re.sub(r"ROOT/\S*python\S*|/\S*/bin/python\S*", "PYTHON", text)


def _flowing(screen: str) -> tuple[str, list[str]]:
    """Part a screen into what it said, and the words of its messages: a terminal gets them in more lines."""
    said, _, messages = screen.partition("--- messages\n")
    return said, messages.split()


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch, **environ: str) -> None:
    """Let commands of this process run in a folder that is also their home, with nothing of this machine's settings."""
    monkeypatch.chdir(folder)
    for name in list(os.environ):
        if name.startswith(_OWN_VARIABLES):
            monkeypatch.delenv(name)
    for name, value in {"HOME": str(folder), **environ}.items():
        monkeypatch.setenv(name, value)


def masked(pattern: str, put: str | Callable[[re.Match[str]], str]) -> Mask:
    """Make a mask of a pattern; `^` and `$` are a line's."""
    found = re.compile(pattern, re.MULTILINE)
    return lambda text: found.sub(put, text)


def same_width(pattern: str, word: str, *, is_right: bool = False) -> Mask:
    """Make a mask that keeps the width of what it hides, so that no column moves."""

    def put(match: re.Match[str]) -> str:
        return word.rjust(len(match[0])) if is_right else word.ljust(len(match[0]))

    return masked(pattern, put)


def column(name: str, word: str, width: int) -> Mask:
    """Make a mask of a right-aligned column, whose width differs with its values; all of them must end in one place."""

    def relay(text: str) -> str:
        lines = text.split("\n")
        for top, header in enumerate(lines):
            if (found := re.search(rf"(?<=  ){name}(?=$|  )", header)) is None:
                continue
            end = found.end()
            size = next((k for k, line in enumerate(lines[top:]) if not line or line.startswith("---")), 0)
            cells = [line[:end].rpartition("  ")[2].lstrip() for line in lines[top : top + size]]
            assert not [line for line in lines[top : top + size] if line[end : end + 1].strip()], "not aligned"
            begin = end - max(map(len, cells))
            for at, cell in enumerate(cells, start=top):
                put = cell if at == top else word
                lines[at] = f"{lines[at][:begin]}{put:>{width}}{lines[at][end:]}"
        return "\n".join(lines)

    return relay


def reviewed_names(folder: Path) -> set[str]:
    """List the screens that a folder holds."""
    return {path.stem for path in folder.glob("*.txt")}


def last_picture(said: str) -> str:
    """What a terminal shows in the end of what was written to it: lines drawn over others are gone."""
    lines: list[list[str]] = [[]]
    row = at = 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x1b]", said):
        if part == "\n":
            row, at = row + 1, 0
            if row == len(lines):
                lines.append([])
        elif part == "\r":
            at = 0
        elif part[0] != "\x1b":
            lines[row] += [" "] * (at + 1 - len(lines[row]))
            lines[row][at] = part
            at += 1
        elif part[-1] == "A":
            row = max(0, row - int(re.sub(r"\D", "", part) or 1))
        elif part[-1] == "K":
            lines[row] = []
    while len(lines) > 1 and not lines[-1] and not lines[-2]:
        lines.pop()
    return "\n".join("".join(line) for line in lines)
