"""One loop that keeps one engine: start, readiness deadline, serving, drain, end. Used in the foreground and detached.

Knows: the order of events and the deadlines. Refuses to know: terminals (a `Listener` is told), registries, plans.
Single-threaded on purpose: pipes, signals and child exits arrive at one `select`, so no two of them race.

States: STARTING -> READY -> STOPPING -> over. A signal moves to STOPPING; a second one aborts; a third kills.
"""

from __future__ import annotations

import contextlib
import enum
import os
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from launcher.exit_codes import ExitCode
from launcher.supervise.engine_process import EngineProcess
from launcher.supervise.instance import InstanceFolder, InstanceState, write_private
from launcher.supervise.logfile import BoundedLog, tail_of_run
from launcher.supervise.procfs import ProcessIdentity
from launcher.supervise.spec import LaunchSpec
from launcher.supervise.status import (
    LAST_WORDS_SECONDS,
    RESTART_PHASE,
    Fatal,
    Leaving,
    LineSplitter,
    Phase,
    Ready,
    Record,
    parse_record,
)
from launcher.supervise.timeline import Timeline

STOP_GRACE_SECONDS = 5.0
"""What an engine gets beyond its drain timeout, and after an abort, before it is killed."""
STACK_DUMP_SECONDS = 0.5
"""How long a hung engine gets to write its stacks into the log."""
NUM_TAIL_LINES = 15
MAX_EVENTS = 20
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stage(enum.Enum):
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"


class Listener(Protocol):
    """Who is told what happens. Called on the loop: must not block."""

    def started(self, pid: int) -> None: ...
    def phase(self, phase: Phase) -> None: ...
    def ready(self, ready: Ready, timeline: Timeline) -> None: ...
    def stopping(self, drain_timeout_seconds: float) -> None: ...
    def aborting(self) -> None: ...
    def output(self, data: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended. `cause` is one line, empty for an end that was asked for; `log_tail` belongs before it."""

    exit_code: int
    cause: str = ""
    hint: str = ""
    log_tail: tuple[str, ...] = ()
    was_ready: bool = False


class Supervisor:
    """Runs one engine to its end. `run` blocks and belongs on the main thread."""

    def __init__(
        self,
        spec: LaunchSpec,
        folder: InstanceFolder,
        listener: Listener,
        *,
        is_detached: bool = False,
        launched_at: float | None = None,
    ) -> None:
        self._spec = spec
        self._folder = folder
        self._listener = listener
        self._is_detached = is_detached
        self._stage = Stage.STARTING
        self._timeline = Timeline(time.monotonic() if launched_at is None else launched_at)
        self._splitter = LineSplitter()
        self._fatal: Fatal | None = None
        self._was_ready = False
        self._is_restarting = False
        self._events: deque[tuple[float, str]] = deque(maxlen=MAX_EVENTS)
        self._context_tokens: int | None = None
        self._url = spec.url
        self._started_at = time.time()
        self._node_phase = ""
        self._stop_signals: list[int] = []
        self._verdict: Outcome | None = None
        self._deadline: float | None = None

    @property
    def timeline(self) -> Timeline:
        return self._timeline

    def run(self) -> Outcome:
        """Start the engine and stay with it until it is gone, with all it started.

        Raises: EngineFailed when it cannot be spawned, PreflightError when the folder cannot be written.
        """
        write_private(self._folder.config_file, self._spec.config_text)
        log = BoundedLog(self._folder.log_file)
        log.begin(f"{self._spec.name}: {time.strftime('%Y-%m-%d %H:%M:%S')}")
        try:
            with signal_wakeups() as wakeups:
                self._process = EngineProcess.start(self._spec.argv, self._spec.environment, self._spec.working_folder)
                spawned = time.monotonic()
                self._timeline.mark("launch", self._timeline.began, spawned)
                self._deadline = spawned + self._spec.ready_timeout_seconds
                self._log = log
                try:
                    self._write_state()
                    self._listener.started(self._process.pid)
                    status = self._loop(wakeups)
                finally:
                    self._process.kill_all()
                    self._drain_pipes()
                    self._process.close()
        finally:
            log.close()
            self._folder.clear()
        return self._outcome(status)

    # The loop.

    def _loop(self, wakeups: socket.socket) -> int:
        """Serve events until the engine's main process is gone; return its exit status."""
        with selectors.DefaultSelector() as selector:
            for source in (self._process.status_fd, self._process.output_fd, wakeups):
                selector.register(source, selectors.EVENT_READ)
            while (status := self._process.poll()) is None:
                wait = None if self._deadline is None else self._deadline - time.monotonic()
                if wait is not None and wait <= 0:
                    self._on_deadline()
                    continue
                for key, _ in selector.select(wait):
                    if key.fileobj is wakeups:
                        self._on_signals(wakeups.recv(4096))
                    elif not self._read(key.fd):
                        selector.unregister(key.fileobj)
        return status

    def _hasten(self, seconds: float) -> None:
        """Set a deadline `seconds` from now unless an earlier one stands."""
        later = time.monotonic() + seconds
        self._deadline = later if self._deadline is None else min(self._deadline, later)

    def _read(self, fd: int) -> bool:
        """Take what a pipe holds. Returns False at its end."""
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return True
        if not data:
            return False
        if fd == self._process.output_fd:
            self._log.write(data)
            self._listener.output(data)
        else:
            for line in self._splitter.feed(data):
                record = parse_record(line, time.monotonic())
                if record is not None:
                    self._on_record(record)
        return True

    def _drain_pipes(self) -> None:
        """Read the last words of an engine that is gone."""
        for fd in (self._process.status_fd, self._process.output_fd):
            with contextlib.suppress(BlockingIOError, OSError):
                while self._read_now(fd):
                    pass

    def _read_now(self, fd: int) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            return bool(selector.select(0)) and self._read(fd)

    # Events.

    def _on_record(self, record: Record) -> None:
        if isinstance(record, Fatal):
            self._fatal = self._fatal or record
            self._hasten(LAST_WORDS_SECONDS)
        elif isinstance(record, Leaving):
            self._stage = Stage.STOPPING
            self._was_ready = True
            self._hasten(STOP_GRACE_SECONDS)
        elif isinstance(record, Ready):
            if self._stage is Stage.STARTING:
                self._stage, self._was_ready = Stage.READY, True
                self._deadline = None
                self._timeline.finish(record.at)
                self._context_tokens = record.context_tokens
                self._url = record.url or self._url
                self._write_state()
                self._listener.ready(record, self._timeline)
        else:
            if self._stage is Stage.STARTING:
                self._timeline.add(record)
            elif record.name == RESTART_PHASE:
                self._on_restart(record)
            if self._spec.head_addr and record.state == "begin":
                self._node_phase = record.name
                self._write_state()
            self._listener.phase(record)

    def _on_restart(self, record: Phase) -> None:
        """Note that an engine which served has died or is back, for `ps` and `status`."""
        if record.state not in ("begin", "end"):
            return
        self._is_restarting = record.state == "begin"
        self._events.append((time.time(), record.detail))
        self._write_state()

    def _on_signals(self, numbers: bytes) -> None:
        """Handle what arrived: stop signals in order; SIGCHLD only had to wake the loop."""
        for number in numbers:
            if number not in STOP_SIGNALS:
                continue
            self._stop_signals.append(number)
            if len(self._stop_signals) == 1:
                self._stop()
            elif len(self._stop_signals) == 2:
                self._listener.aborting()
                self._process.send(signal.SIGTERM)
                self._deadline = time.monotonic() + STOP_GRACE_SECONDS
            else:
                self._process.send_all(signal.SIGKILL)

    def _stop(self) -> None:
        """Ask the engine to drain. One that serves nothing yet has nothing to drain."""
        drain = self._spec.drain_timeout_seconds if self._was_ready else 0.0
        self._stage = Stage.STOPPING
        self._deadline = time.monotonic() + drain + STOP_GRACE_SECONDS
        self._write_state()
        self._listener.stopping(drain)
        self._process.send(signal.SIGTERM)

    def _on_deadline(self) -> None:
        """Time is up: say for what, then kill."""
        if self._verdict is None and self._fatal is None:
            if self._stage is Stage.STARTING:
                self._verdict = self._not_ready()
                # Whatever hangs says where: the engine writes all stacks to its log on this signal.
                self._process.send_all(signal.SIGUSR1)
                self._deadline = time.monotonic() + STACK_DUMP_SECONDS
                return
            if self._stage is Stage.STOPPING and len(self._stop_signals) < 2:
                seconds = self._spec.drain_timeout_seconds + STOP_GRACE_SECONDS
                self._verdict = Outcome(
                    ExitCode.ENGINE_FAILED, f"the engine did not stop within {seconds:.0f} s and was killed"
                )
        self._process.send_all(signal.SIGKILL)
        self._deadline = time.monotonic() + STOP_GRACE_SECONDS

    def _not_ready(self) -> Outcome:
        timeout = self._spec.ready_timeout_seconds
        current = self._timeline.current(time.monotonic())
        where = "before its first phase" if current is None else f"phase {current[0]} for {current[1]:.1f} s"
        return Outcome(
            ExitCode.NOT_READY,
            f"the engine was not ready after {timeout:g} s: {where}",
            hint=f"stacks and log: hlaunch logs {self._spec.name}; a longer deadline: --set ready.timeout=30m",
        )

    # The end.

    def _outcome(self, status: int) -> Outcome:
        log_tail = tuple(tail_of_run(self._folder.log_file, NUM_TAIL_LINES))
        if self._verdict is not None:
            return replace(self._verdict, log_tail=log_tail, was_ready=self._was_ready)
        if self._stage is Stage.STOPPING:
            return self._stopped(status, log_tail)
        if self._fatal is not None:
            message = self._fatal.message or f"{self._fatal.error_type} without a message"
            phase = f"phase {self._fatal.phase}: " if self._fatal.phase and not self._was_ready else ""
            return Outcome(
                self._fatal.exit_code, f"engine failed: {phase}{message}", self._fatal.hint, log_tail, self._was_ready
            )
        current = self._timeline.current(time.monotonic())
        when = "while serving" if self._was_ready else f"in phase {current[0]}" if current else "before its first phase"
        code = status if 0 < status < 126 else int(ExitCode.ENGINE_FAILED)
        cause = f"the engine {self._process.describe_exit(status)} {when}"
        return Outcome(code, cause, f"the whole log: hlaunch logs {self._spec.name}", log_tail, self._was_ready)

    def _stopped(self, status: int, log_tail: tuple[str, ...]) -> Outcome:
        """An end that was asked for: clean, cut short, or failed on the way."""
        if not self._was_ready or len(self._stop_signals) > 1:
            return Outcome(ExitCode.INTERRUPTED, was_ready=self._was_ready)
        if status == 0:
            return Outcome(ExitCode.OK, was_ready=True)
        cause = f"the engine {self._process.describe_exit(status)} while it stopped"
        return Outcome(ExitCode.ENGINE_FAILED, cause, "", log_tail, True)

    def _write_state(self) -> None:
        launcher = ProcessIdentity.of(os.getpid())
        if launcher is None:
            return
        self._folder.write(
            InstanceState(
                name=self._spec.name,
                model=self._spec.model,
                state=self._stage.value,
                url=self._url,
                launcher=launcher,
                engine=self._process.identity,
                started_at=self._started_at,
                drain_timeout_seconds=self._spec.drain_timeout_seconds,
                is_detached=self._is_detached,
                ready_seconds=round(self._timeline.total_seconds, 3) if self._was_ready else None,
                is_restarting=self._is_restarting,
                events=tuple(self._events),
                context_tokens=self._context_tokens,
                head_addr=self._spec.head_addr,
                phase=self._node_phase,
            )
        )


@contextlib.contextmanager
def signal_wakeups() -> Iterator[socket.socket]:
    """Turn signals into bytes on a socket; the old handlers return afterwards.

    SIGCHLD is among them, so that the exit of the engine wakes the loop at once.
    """
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    handled = (*STOP_SIGNALS, signal.SIGCHLD)
    previous = {number: signal.signal(number, lambda *_: None) for number in handled}
    # SIGWINCH and the like must not fill the socket with warnings when it is full.
    old_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(old_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
        reader.close()
        writer.close()
