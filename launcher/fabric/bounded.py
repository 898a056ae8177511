"""Runs a command with a deadline and a bound on what it may say. Knows processes; refuses to know what they do."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OUTPUT_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended. `code` None: it was killed at the deadline, or it said more than it may."""

    code: int | None
    out: bytes
    err: str
    began: float
    ended: float
    """Wall-clock times around the run, for comparing the far clock with ours."""

    @property
    def last_line(self) -> str:
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""


def run_bounded(
    argv: Sequence[str], text: bytes = b"", *, seconds: float, environ: Mapping[str, str] | None = None
) -> Ended:
    """Run a command with `text` as its input; kill its whole group at the deadline. Raises: OSError."""
    began = time.time()
    with tempfile.TemporaryFile() as given:
        # A file, not a pipe: a far side that never reads cannot make us wait.
        given.write(text)
        given.seek(0)
        process = subprocess.Popen(
            list(argv),
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=None if environ is None else dict(environ),
        )
    with process:
        try:
            out, err, is_whole = _read(process, time.monotonic() + seconds)
        finally:
            kill_group(process)
        code = process.wait()
    return Ended(code if is_whole else None, out, err.decode("utf-8", "replace"), began, time.time())


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads its own session, and whatever it started there."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    except PermissionError:
        # Every member of the group is a zombie already.
        return


def _read(process: subprocess.Popen[bytes], deadline: float) -> tuple[bytes, bytes, bool]:
    """Read both streams to their ends; False when the deadline or the bound came first."""
    if process.stdout is None or process.stderr is None:
        raise RuntimeError("the process was started with pipes")
    buffers = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    with selectors.DefaultSelector() as selector:
        for descriptor in buffers:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0 or sum(len(buffer) for buffer in buffers.values()) > OUTPUT_BYTES:
                break
            for key, _ in selector.select(left):
                piece = os.read(key.fd, 65536)
                buffers[key.fd] += piece
                if not piece:
                    selector.unregister(key.fd)
        is_whole = not selector.get_map()
    if is_whole:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            is_whole = False
    return bytes(buffers[process.stdout.fileno()]), bytes(buffers[process.stderr.fileno()]), is_whole
