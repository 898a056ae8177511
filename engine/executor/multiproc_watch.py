"""Watches the processes of ranks on this node: passes their reports on, and notices their end.

Knows: pidfds and control sockets, from one thread of its own, so that a death is seen while the engine idles too.
Refuses to know: plans, results, whose fault a failure is (`engine.executor.roster`).
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from socket import MSG_DONTWAIT, socket

from engine.comm.segment import new_bell
from engine.executor.messages import EndedReport, FaultReport, MessageError, Report, decode_report
from engine.executor.multiproc_rank import FRAME
from engine.placement import RankSpec
from engine.process import say_trace, signal_name


@dataclass(slots=True)
class RankHandle:
    """The process of one rank. `has_spoken`: it is past the point from which it can write its stacks.

    `kernel`, since `kernel_since`: what kept it from running when it was last looked at.
    """

    spec: RankSpec
    process: subprocess.Popen[bytes]
    control: socket
    pidfd: int
    buffer: bytearray = field(default_factory=bytearray)
    has_spoken: bool = False
    has_ended: bool = False
    kernel: str = ""
    kernel_since: float = 0.0


class RankWatch:
    """Listens from its own thread until `stop`; `on_report` is called from it with every report, each rank's last one
    being its end.
    """

    def __init__(self, handles: list[RankHandle], on_report: Callable[[Report], None]) -> None:
        self._handles = handles
        self._on_report = on_report
        self._stop_bell = new_bell()
        self._thread = threading.Thread(target=self._run, name="rank watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and give its descriptors back."""
        os.eventfd_write(self._stop_bell, 1)
        self._thread.join(5.0)
        with contextlib.suppress(OSError):
            os.close(self._stop_bell)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._stop_bell, select.POLLIN)
        by_fd = {}
        for handle in self._handles:
            for fd in (handle.control.fileno(), handle.pidfd):
                poll.register(fd, select.POLLIN)
                by_fd[fd] = handle
        while True:
            for fd, _ in poll.poll():
                if fd == self._stop_bell:
                    return
                handle = by_fd[fd]
                if fd == handle.pidfd:
                    poll.unregister(fd)
                    self._listen(handle)
                    handle.has_ended = True
                    self._tell(EndedReport(handle.spec.rank, describe_end(handle.process.wait())))
                elif not self._listen(handle):
                    poll.unregister(fd)

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
        while len(handle.buffer) >= FRAME.size:
            length, kind = FRAME.unpack_from(handle.buffer)
            if len(handle.buffer) < FRAME.size + length:
                break
            body = bytes(handle.buffer[FRAME.size : FRAME.size + length])
            del handle.buffer[: FRAME.size + length]
            handle.has_spoken = True
            try:
                report = decode_report(kind, body)
            except MessageError as error:
                report = FaultReport(handle.spec.rank, "", "MessageError", str(error))
            self._tell(report)
        return is_open

    def _tell(self, report: Report) -> None:
        try:
            self._on_report(report)
        except Exception as error:  # noqa: BLE001 - the thread's border: nobody else would notice the next rank's end
            say_trace(error)


def describe_end(code: int) -> str:
    """Say how a process ended, by the code that Popen gives."""
    if code < 0:
        name = signal_name(-code)
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"ended by itself with code {code}"
