"""An instance's log: bounded on disk, readable from its end, followable across rotation.

Knows: bytes and lines. Refuses to know: what they say, except that control characters never reach a terminal.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

MAX_LOG_BYTES = 10 << 20
START_LINES = 20_000
"""How far back a log is read for what was said at the start of its run."""
_FOLLOW_SECONDS = 0.1
_TAIL_CHUNK = 64 << 10
_RUN_MARK = "=== "
_COLOUR = re.compile(r"\x1b\[[0-9;]{0,16}m")


class BoundedLog:
    """Appends to a file of mode 0600 and renames it to `<name>.1` when full: at most twice `max_bytes` on disk.

    A full disk loses log lines, never the engine.
    """

    def __init__(self, path: Path, max_bytes: int = MAX_LOG_BYTES) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._fd = self._open()
        self._size = os.fstat(self._fd).st_size

    def begin(self, what: str) -> None:
        """Write the line that separates this run from those before it."""
        self.write(f"{_RUN_MARK}{what} ===\n".encode())

    def write(self, data: bytes) -> None:
        """Append; never raises for the file system's sake."""
        try:
            if self._size + len(data) > self._max_bytes:
                self._rotate()
            self._size += os.write(self._fd, data)
        except OSError:
            return

    def close(self) -> None:
        os.close(self._fd)

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _rotate(self) -> None:
        os.replace(self.path, self.path.with_name(self.path.name + ".1"))
        fresh = self._open()
        os.close(self._fd)
        self._fd, self._size = fresh, 0


def tail(path: Path, num_lines: int, end: int | None = None) -> list[str]:
    """Return the last lines of a log before byte `end`, reaching into its rotated half when needed."""
    if num_lines <= 0:
        return []
    data = _tail_bytes(path, num_lines, end)
    if data.count(b"\n") < num_lines:
        data = _tail_bytes(path.with_name(path.name + ".1"), num_lines, None) + data
    return [clean(line) for line in data.decode("utf-8", errors="replace").splitlines()[-num_lines:]]


def tail_of_run(path: Path, num_lines: int) -> list[str]:
    """Return the last lines of the newest run in a log, its separator left out."""
    lines = tail(path, num_lines)
    marks = [index for index, line in enumerate(lines) if begins_run(line)]
    return lines[marks[-1] + 1 :] if marks else lines


def begins_run(line: str) -> bool:
    """Tell whether a line separates a run from those before it."""
    return line.startswith(_RUN_MARK) and line.endswith(" ===")


def _tail_bytes(path: Path, num_lines: int, end: int | None) -> bytes:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            position = size if end is None else min(end, size)
            data = b""
            while position > 0 and data.count(b"\n") <= num_lines:
                step = min(_TAIL_CHUNK, position)
                position -= step
                file.seek(position)
                data = file.read(step) + data
            return data
    except OSError:
        return b""


def clean(line: str) -> str:
    """Make a line safe to print: colours go, other control characters (terminal escapes among them) become `?`."""
    line = _COLOUR.sub("", line)
    return "".join(ch if ch.isprintable() or ch == "\t" else "?" for ch in line)


def follow(path: Path, position: int, is_over: Callable[[], bool]) -> Iterator[str]:
    """Yield lines appended after byte `position`, across rotation, until `is_over` and nothing is left. Blocks."""
    file: BinaryIO = path.open("rb")
    rest = b""
    try:
        file.seek(position)
        while True:
            # Asked before reading: what was written before the end is still read after it.
            is_ending = is_over()
            data = file.read()
            if data:
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    yield clean(line.decode("utf-8", errors="replace").rstrip("\r"))
                continue
            fresh = _successor(path, file)
            if fresh is not None:
                file.close()
                file = fresh
            elif is_ending:
                return
            else:
                time.sleep(_FOLLOW_SECONDS)
    finally:
        file.close()


def _successor(path: Path, file: BinaryIO) -> BinaryIO | None:
    """Open the file that took this one's name, if one did."""
    try:
        if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return None
        return path.open("rb")
    except OSError:
        return None
