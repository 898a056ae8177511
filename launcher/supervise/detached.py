"""Detached launches: a supervisor process of its own, and the relay through which its parent watches the start.

Knows: how the two processes speak (the engine's own status records, passed on). Refuses to know: terminals.
The supervisor takes over the instance's lock by inheritance, so there is no moment without a holder.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path

import launcher
from launcher.errors import EngineFailed
from launcher.exit_codes import ExitCode
from launcher.supervise.instance import InstanceFolder, write_private
from launcher.supervise.logfile import tail_of_run
from launcher.supervise.spec import LaunchSpec
from launcher.supervise.status import Fatal, LineSplitter, Phase, Ready, Record, parse_record
from launcher.supervise.supervisor import NUM_TAIL_LINES, Listener, Outcome
from launcher.supervise.timeline import Timeline

SPEC_FILE = "launch.json"


class Relay:
    """The listener of a detached supervisor: passes records to a pipe while somebody reads it."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd

    def started(self, pid: int) -> None:
        return

    def phase(self, phase: Phase) -> None:
        self.send(phase)

    def ready(self, ready: Ready, timeline: Timeline) -> None:
        self.send(ready)
        self.close()

    def stopping(self, drain_timeout_seconds: float) -> None:
        return

    def aborting(self) -> None:
        return

    def output(self, data: bytes) -> None:
        return

    def send(self, record: Record) -> None:
        """Write one record; a reader that is gone ends the relay, never the supervisor."""
        if self._fd is None:
            return
        try:
            os.write(self._fd, json.dumps(record.to_json()).encode() + b"\n")
        except OSError:
            self.close()

    def close(self) -> None:
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = None


def start_detached(spec: LaunchSpec, folder: InstanceFolder, lock_fd: int, listener: Listener, began: float) -> Outcome:
    """Start a supervisor that outlives us and watch it until the engine is ready or has failed. Blocks.

    Ctrl-C while waiting ends the start. Raises: EngineFailed when the supervisor cannot be started.
    """
    write_private(folder.path / SPEC_FILE, spec.to_json())
    read_fd, write_fd = os.pipe()
    log_fd = os.open(folder.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    argv = [sys.executable, "-m", "launcher.supervise", "--root", str(folder.root), "--name", folder.name]
    try:
        process = subprocess.Popen(
            [*argv, "--status-fd", str(write_fd), "--lock-fd", str(lock_fd)],
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            env=spec.environment,
            cwd=Path(launcher.__file__).parent.parent,
            pass_fds=(write_fd, lock_fd),
            start_new_session=True,
        )
    except OSError as error:
        os.close(read_fd)
        raise EngineFailed(f"the supervisor cannot be started: {error.strerror}") from error
    finally:
        os.close(write_fd)
        os.close(log_fd)
        # From here on the supervisor's copy alone holds the lock.
        os.close(lock_fd)
    timeline = Timeline(began)
    timeline.mark("launch", began, time.monotonic())
    listener.started(process.pid)
    try:
        return _watch(process, read_fd, folder, listener, timeline)
    except KeyboardInterrupt:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        return Outcome(ExitCode.INTERRUPTED)
    finally:
        os.close(read_fd)
        # A supervisor that goes on is not waited for; init inherits it.
        process.returncode = process.returncode if process.returncode is not None else 0


def _watch(
    process: subprocess.Popen[bytes], read_fd: int, folder: InstanceFolder, listener: Listener, timeline: Timeline
) -> Outcome:
    splitter = LineSplitter()
    fatal: Fatal | None = None
    with selectors.DefaultSelector() as selector:
        selector.register(read_fd, selectors.EVENT_READ)
        while True:
            selector.select()
            data = os.read(read_fd, 1 << 16)
            if not data:
                break
            for line in splitter.feed(data):
                record = parse_record(line, time.monotonic())
                if isinstance(record, Ready):
                    timeline.finish(record.at)
                    listener.ready(record, timeline)
                    return Outcome(ExitCode.OK, was_ready=True)
                if isinstance(record, Phase):
                    timeline.add(record)
                    listener.phase(record)
                elif isinstance(record, Fatal):
                    fatal = record
    status = process.wait()
    log_tail = tuple(tail_of_run(folder.log_file, NUM_TAIL_LINES))
    if fatal is not None:
        return Outcome(fatal.exit_code, fatal.message, fatal.hint, log_tail)
    if status == ExitCode.INTERRUPTED:
        return Outcome(ExitCode.INTERRUPTED, "the start was interrupted from outside")
    return Outcome(ExitCode.ENGINE_FAILED, f"the supervisor ended with status {status}", "", log_tail)
