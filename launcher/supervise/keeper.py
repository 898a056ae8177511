"""Keeps one node without Docker: restarts it when it fails, writes its log, leaves no process behind.

Knows: the rule that Docker's `on-failure:3` follows, and a log of bounded size. Refuses to know: what a node runs.
It adopts whatever a killed supervisor leaves (child subreaper), so that the end of a node is the end of all of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.supervise.logfile import BoundedLog
from launcher.supervise.supervisor import STOP_SIGNALS, signal_wakeups

MAX_RESTARTS = 3
BACKOFF_SECONDS = (1.0, 2.0, 4.0)
HEALTHY_SECONDS = 600.0
"""A run this long forgives the failures before it."""
_PR_SET_CHILD_SUBREAPER = 36


def keep(argv: Sequence[str], log_file: Path) -> int:
    """Run `argv` until it ends well, is stopped, or fails for the fourth time; return its last exit status. Blocks."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    log = BoundedLog(log_file)
    num_failures = 0
    try:
        with signal_wakeups() as wakeups, selectors.DefaultSelector() as selector:
            selector.register(wakeups, selectors.EVENT_READ)
            while True:
                began = time.monotonic()
                log.begin(time.strftime("%Y-%m-%d %H:%M:%S"))
                status, was_stopped = _run(argv, log, selector)
                _end_orphans()
                if status == 0 or was_stopped:
                    return status
                num_failures = 1 if time.monotonic() - began > HEALTHY_SECONDS else num_failures + 1
                if num_failures > MAX_RESTARTS:
                    log.write(f"keeper: it failed {num_failures} times; it stays down\n".encode())
                    return status
                pause = BACKOFF_SECONDS[min(num_failures, len(BACKOFF_SECONDS)) - 1]
                log.write(
                    f"keeper: ended with {status}; restart {num_failures} of {MAX_RESTARTS} in {pause:g} s\n".encode()
                )
                if _pause(selector, pause):
                    return status
    finally:
        log.close()


def _run(argv: Sequence[str], log: BoundedLog, selector: selectors.BaseSelector) -> tuple[int, bool]:
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    os.set_blocking(pipe, False)
    selector.register(pipe, selectors.EVENT_READ)
    is_open, was_stopped = True, False
    try:
        while process.poll() is None:
            for key, _ in selector.select(1.0):
                if key.fd == pipe:
                    is_open = is_open and _copy(pipe, log)
                    if not is_open:
                        selector.unregister(pipe)
                elif _is_stop(key):
                    was_stopped = True
                    process.send_signal(signal.SIGTERM)
        while is_open and _copy(pipe, log, is_final=True):
            pass
    finally:
        with contextlib.suppress(KeyError, ValueError):
            selector.unregister(pipe)
        process.stdout.close()
    return process.returncode if process.returncode >= 0 else 128 - process.returncode, was_stopped


def _copy(pipe: int, log: BoundedLog, *, is_final: bool = False) -> bool:
    try:
        data = os.read(pipe, 1 << 16)
    except BlockingIOError:
        return not is_final
    log.write(data)
    return bool(data)


def _is_stop(key: selectors.SelectorKey) -> bool:
    data: bytes = key.fileobj.recv(4096)  # type: ignore[union-attr]
    return any(number in STOP_SIGNALS for number in data)


def _pause(selector: selectors.BaseSelector, seconds: float) -> bool:
    """Wait; returns True when told to stop meanwhile."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if any(_is_stop(key) for key, _ in selector.select(left)):
            return True
    return False


def _end_orphans() -> None:
    """Kill and reap everything that has become our child."""
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            for text in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(text), signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.02)
        except ChildProcessError:
            return
