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
    r"^(error|hint|warning|info|note|  fix|  looked in|[\w.]+yml:\d+:|curl |sudo |[-+ ]  )|(FOLDER|PYTHON|ROOT)"
)
_CONTROLS = re.compile(r"\x1b\[[0-9;]*m")
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

    def check(self, name: str, args: Sequence[str], code: int = 0, *masks: Mask) -> None:
        """Run a command twice, into a pipe and at a terminal: both say what was reviewed."""
        plain = self.shown(args, Pipe, masks)
        self.compare(name, plain, code)
        assert self.shown(args, Terminal, masks) == plain, "a terminal shows other words"

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
        words, messages = (_CONTROLS.sub("", part.getvalue()) for part in (out, err))
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
        width = len(match[0])
        return word.rjust(width) if is_right else word.ljust(width)

    return masked(pattern, put)


def reviewed_names(folder: Path) -> set[str]:
    """List the screens that a folder holds."""
    return {path.stem for path in folder.glob("*.txt")}


def last_picture(said: str, columns: int = 80) -> str:
    """What a terminal shows in the end of what was written to it: lines drawn over others are gone."""
    lines: list[list[str]] = [[]]
    row = column = 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x1b]", said):
        if part == "\n":
            row += 1
            if row == len(lines):
                lines.append([])
        elif part == "\r":
            column = 0
        elif part.startswith("\x1b["):
            count, kind = int(re.sub(r"\D", "", part) or 1), part[-1]
            if kind == "A":
                row = max(0, row - count)
            elif kind == "K":
                lines[row] = []
        else:
            line = lines[row]
            line += [" "] * (column + 1 - len(line))
            line[column] = part
            column += 1
    return "\n".join("".join(line).rstrip() for line in lines)
