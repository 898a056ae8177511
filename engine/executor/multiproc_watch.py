"""Watches the processes of ranks: hears their reports, notices their end, and settles on one cause.

Knows: pidfds and control sockets, from one thread of its own, so that a death is seen while the engine idles too.
Refuses to know: plans, results, what to do about a failure.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from socket import MSG_DONTWAIT, socket

from engine.comm.segment import new_bell
from engine.executor.base import ExecutorError
from engine.executor.messages import FaultReport, MessageError, PhaseReport, Report, decode_report
from engine.executor.multiproc_rank import FRAME
from engine.placement import RankSpec

# After the first sign of a failure: how long to listen for the others', since the rank that broke is not always the
# first one heard; those that waited for it break too.
_GATHER_SECONDS = 0.15


class RankFailure(ExecutorError):
    """A rank died, broke or hangs: which, where, in which phase, for how long. `hint` is the fix when one is known."""

    def __init__(
        self, spec: RankSpec, phase: str, what: str, *, seconds: float, hint: str = "", does_not_fit: bool = False
    ) -> None:
        self.message = (
            f"rank {spec.rank} (node {spec.node}, {spec.device}) {what}; phase {phase}, {seconds:.1f} s in it"
        )
        super().__init__(self.message)
        self.rank = spec.rank
        self.node = spec.node
        self.device = spec.device
        self.phase = phase
        self.seconds = seconds
        self.hint = hint
        self.does_not_fit = does_not_fit


@dataclass(slots=True)
class RankHandle:
    """One rank as its engine sees it. `since` is when it entered `phase`, `heard` when it last said anything."""

    spec: RankSpec
    process: subprocess.Popen[bytes]
    control: socket
    pidfd: int
    phase: str = "spawn"
    since: float = field(default_factory=time.monotonic)
    heard: float = field(default_factory=time.monotonic)
    buffer: bytearray = field(default_factory=bytearray)
    has_ended: bool = False


class RankWatch:
    """Listens from its own thread until `stop`.

    `reports` gets what ranks report other than phases; `bell` becomes readable once `failure` is set. `on_phase` and
    `on_failure` are called from the thread.
    """

    def __init__(self, handles: list[RankHandle], on_phase: Callable[[PhaseReport], None]) -> None:
        self.reports: SimpleQueue[Report | None] = SimpleQueue()
        self.failure: RankFailure | None = None
        self.bell = new_bell()
        self.on_failure: Callable[[RankFailure], None] = lambda _: None
        self._handles = handles
        self._on_phase = on_phase
        self._causes: list[tuple[int, float, RankFailure]] = []
        self._stop_bell = new_bell()
        self._is_stopping = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="rank watch", daemon=True)
        self._thread.start()

    def expect_end(self) -> None:
        """From now on the end of a rank is no failure."""
        self._is_stopping = True

    def stop(self) -> None:
        """End the thread and give its descriptors back."""
        self._is_stopping = True
        os.eventfd_write(self._stop_bell, 1)
        self._thread.join(5.0)
        for fd in (self._stop_bell, self.bell):
            with contextlib.suppress(OSError):
                os.close(fd)

    def fail(self, failure: RankFailure) -> None:
        """Settle on a failure that was found elsewhere, unless one is known already."""
        with self._lock:
            if self.failure is not None:
                return
            self.failure = failure
        self.reports.put(None)
        os.eventfd_write(self.bell, 1)
        self.on_failure(failure)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._stop_bell, select.POLLIN)
        by_fd = {}
        for handle in self._handles:
            for fd in (handle.control.fileno(), handle.pidfd):
                poll.register(fd, select.POLLIN)
                by_fd[fd] = handle
        decide_at: float | None = None
        while True:
            timeout = None if decide_at is None else max(0.0, decide_at - time.monotonic()) * 1e3
            for fd, _ in poll.poll(timeout):
                if fd == self._stop_bell:
                    return
                handle = by_fd[fd]
                if fd == handle.pidfd:
                    poll.unregister(fd)
                    self._listen(handle)
                    self._on_end(handle)
                elif not self._listen(handle):
                    poll.unregister(fd)
            if self._causes and decide_at is None:
                decide_at = time.monotonic() + _GATHER_SECONDS
            if decide_at is not None and time.monotonic() >= decide_at:
                if self.failure is None:  # later ends follow from the first
                    self.fail(min(self._causes, key=lambda cause: cause[:2])[2])
                decide_at = None
                self._causes.clear()

    def _listen(self, handle: RankHandle) -> bool:
        """Take in what a rank sent; False when its socket is closed."""
        is_open = True
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while True:
                piece = handle.control.recv(1 << 16, MSG_DONTWAIT)
                if not piece:
                    is_open = False
                    break
                handle.buffer += piece
        handle.heard = time.monotonic()
        while len(handle.buffer) >= FRAME.size:
            length, kind = FRAME.unpack_from(handle.buffer)
            if len(handle.buffer) < FRAME.size + length:
                break
            body = bytes(handle.buffer[FRAME.size : FRAME.size + length])
            del handle.buffer[: FRAME.size + length]
            try:
                self._on_report(handle, decode_report(kind, body))
            except MessageError as error:
                self._blame(handle, 0, f"sent noise: {error}")
        return is_open

    def _on_report(self, handle: RankHandle, report: Report) -> None:
        if isinstance(report, PhaseReport):
            if report.phase != handle.phase:
                handle.phase, handle.since = report.phase, time.monotonic()
            self._on_phase(report)
        elif isinstance(report, FaultReport):
            self._blame(
                handle,
                2 if report.is_echo else 0,
                f"failed: {report.error_type}: {report.message}",
                hint=report.hint,
                does_not_fit=report.does_not_fit,
            )
        else:
            self.reports.put(report)

    def _on_end(self, handle: RankHandle) -> None:
        code = handle.process.wait()
        handle.has_ended = True
        if not self._is_stopping:
            self._blame(handle, 1, describe_end(code))

    def _blame(self, handle: RankHandle, order: int, what: str, *, hint: str = "", does_not_fit: bool = False) -> None:
        now = time.monotonic()
        failure = RankFailure(
            handle.spec, handle.phase, what, seconds=now - handle.since, hint=hint, does_not_fit=does_not_fit
        )
        self._causes.append((order, now, failure))


def describe_end(code: int) -> str:
    """Say how a process ended, by the code that Popen gives."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"ended by itself with code {code}"
