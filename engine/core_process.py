"""The process that holds the engine core: an inbox thread, the loop, and one socket back to the API process.

Started as `python -m engine.core_process --fd N --parent PID`; the configuration is the first frame. It ends when the
socket closes, at whatever it is then, when its parent dies, or with a FATAL frame that says why.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
from queue import Empty, SimpleQueue
from typing import Any, NoReturn

from engine import ipc
from engine.config import EngineConfig
from engine.core.request import RequestOutput
from engine.process import Repeating, die_with_parent, dump_stacks_on_signal, say, say_trace
from engine.usage import USAGE_INTERVAL_SECONDS

STATS_INTERVAL_SECONDS = 0.1
EXIT_FAILED = 1
STOP_SECONDS = 5.0
DEAF_SECONDS = 1.0
"""What a start that is to end gets to leave a library's code in which Python hears no signal."""
EXIT_DOES_NOT_FIT = 6


class _Link:
    """Blocking frames over the inherited socket. Any thread may send; one at a time receives."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)
        self._send_lock = threading.Lock()

    def send(self, kind: ipc.Kind, body: Any) -> None:
        """Send a frame, for nobody where the API process has closed: the inbox ends this process then."""
        with self._send_lock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(ipc.encode(kind, body))

    def receive(self) -> tuple[ipc.Kind, Any] | None:
        """Return the next message, or None when the peer closed."""
        header = self._read(ipc.HEADER.size)
        if header is None:
            return None
        length, kind = ipc.decode_header(header)
        payload = self._read(length)
        return None if payload is None else (kind, ipc.decode(kind, payload))

    def _read(self, size: int) -> bytes | None:
        chunks = bytearray()
        while len(chunks) < size:
            try:
                chunk = self._socket.recv(min(size - len(chunks), 1 << 20))
            except ConnectionResetError:
                return None
            if not chunk:
                return None
            chunks += chunk
        return bytes(chunks)


class _StartEnded(BaseException):
    """The API process has closed the socket while the engine starts."""


class _Inbox:
    """Receives on a thread of its own, from the first second on. Make it in the main thread.

    `messages` gets None at the end. A start that runs then is ended by `_StartEnded`, raised in the main thread
    wherever it is: it waits for ranks and other nodes, which may take minutes.
    """

    def __init__(self, link: _Link) -> None:
        self.messages: SimpleQueue[tuple[ipc.Kind, Any] | Exception | None] = SimpleQueue()
        self._link = link
        self.has_ended_start = False
        self._is_starting = True
        self._is_heard = threading.Event()
        # Not SIGINT or SIGTERM, which reach this process from others.
        signal.signal(signal.SIGUSR2, self._on_signal)
        threading.Thread(target=self._listen, name="inbox", daemon=True).start()

    def finish_start(self) -> None:
        """From now on `messages` are read."""
        self._is_starting = False

    def _listen(self) -> None:
        try:
            while (message := self._link.receive()) is not None:
                self.messages.put(message)
        except (ipc.WireError, OSError) as error:
            say(f"engine core: {error}")
        finally:
            self.messages.put(None)
            if self._is_starting:
                self._end_start()

    def _end_start(self) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
        if not self._is_heard.wait(DEAF_SECONDS):
            # The ranks here die with this process, and those elsewhere with their connection to it.
            os._exit(0)

    def _on_signal(self, *_: object) -> None:
        self._is_heard.set()
        if self._is_starting:
            self._is_starting = False
            self.has_ended_start = True
            raise _StartEnded


def main() -> int:
    parser = argparse.ArgumentParser(prog="engine.core_process")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--desk-fd", type=int, default=None, help="the way to nodes that join")
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    dump_stacks_on_signal()
    # Ctrl-C reaches the whole foreground group; the API process decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        return _run(_Link(arguments.fd), arguments.desk_fd)
    except _StartEnded:
        # What there was has been given back; a library's threads may be anywhere.
        os._exit(0)


def _run(link: _Link, desk_fd: int | None) -> int:
    """Start an engine and serve it; returns once the API process has closed the socket."""
    phase = "config"

    def report(name: str, state: str, fraction: float | None, detail: str) -> None:
        nonlocal phase
        phase = name
        link.send(ipc.Kind.PHASE, ipc.PhaseMessage(name, state, fraction, detail))

    inbox: _Inbox | None = None
    try:
        first = link.receive()
        if first is None:
            return 0
        kind, text = first
        if kind is not ipc.Kind.CONFIG:
            raise ipc.WireError(f"the first frame is {kind.name}, not CONFIG")
        config = EngineConfig.from_json(text)
        inbox = _Inbox(link)
        report("import", "begin", None, "torch")
        core = _import_and_start(config, report, desk_fd)
        inbox.finish_start()
    except Exception as error:  # noqa: BLE001 - the process border: a bad checkpoint, a missing package, no memory
        if inbox is not None and inbox.has_ended_start:
            # A library made an error of its own of it, as Ray's compiled code does.
            raise _StartEnded from error
        _fail(link, phase, error)
    try:
        _serve(link, core, inbox.messages)
    except Exception as error:  # noqa: BLE001 - the process border: the cause travels, then the process ends
        _fail(link, "serve", error, core)
    return 0


def _fail(link: _Link, phase: str, error: BaseException, core: Any = None) -> NoReturn:
    """Send the cause and end soon: what still compiles, reads or hangs must not hold back the news, nor memory."""
    link.send(ipc.Kind.FATAL, _fatal(phase, error))
    say_trace(error)
    if core is not None:
        stopping = threading.Thread(target=core.stop, daemon=True)
        stopping.start()
        stopping.join(STOP_SECONDS)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(EXIT_FAILED)


def _import_and_start(config: EngineConfig, report: Any, desk_fd: int | None) -> Any:
    from engine.engine_core import EngineCore, import_worker

    import_worker(config)
    report("import", "end", None, "")
    if desk_fd is None:
        return EngineCore.start(config, report)
    from engine.executor.join_starter import JoinStarter

    return EngineCore.start(config, report, JoinStarter(socket.socket(fileno=desk_fd), config))


def _fatal(phase: str, error: BaseException) -> ipc.FatalMessage:
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    hint = getattr(error, "hint", "")
    does_not_fit = type(error).__name__ in ("OutOfMemoryPlan", "OutOfGpuMemory") or isinstance(error, MemoryError)
    does_not_fit = does_not_fit or bool(getattr(error, "does_not_fit", False))
    # Memory that runs out while serving is an accident: starting again may help.
    does_not_fit = does_not_fit and phase != "serve"
    return ipc.FatalMessage(
        phase=phase,
        error_type=type(error).__name__,
        message=message,
        hint=hint if isinstance(hint, str) else "",
        exit_code=EXIT_DOES_NOT_FIT if does_not_fit else EXIT_FAILED,
    )


def _serve(link: _Link, core: Any, inbox: SimpleQueue[tuple[ipc.Kind, Any] | Exception | None]) -> None:
    """Run the loop: drain the inbox, step, publish; park on the inbox when there is nothing to do."""
    core.on_failure(inbox.put)
    facts = core.facts
    link.send(
        ipc.Kind.READY,
        ipc.ReadyMessage(
            max_model_len=facts.max_model_len,
            facts={name: getattr(facts, name) for name in facts.__dataclass_fields__},
        ),
    )
    # From a thread: just when a step hangs, people want to see what the ranks do.
    telling = Repeating(lambda: link.send(ipc.Kind.USAGE, core.usage()), USAGE_INTERVAL_SECONDS, "usage")
    # Objects of the start-up never die: keep the collector from walking them in every step.
    gc.collect()
    gc.freeze()
    next_stats = 0.0
    while True:
        outputs: list[RequestOutput] = []
        is_parked = not core.has_work
        with contextlib.suppress(Empty):
            while True:
                message = inbox.get(block=is_parked)
                is_parked = False
                if message is None:
                    telling.stop()
                    core.stop()
                    return
                if isinstance(message, Exception):
                    raise message
                _handle(link, core, message, outputs)
        if core.has_work:
            outputs.extend(core.step())
        now = time.monotonic()
        is_due = now >= next_stats or not core.has_work
        if outputs or is_due:
            stats = core.stats() if is_due else None
            if is_due:
                next_stats = now + STATS_INTERVAL_SECONDS
            link.send(ipc.Kind.OUTPUTS, ipc.OutputsMessage(outputs, stats))


def _handle(link: _Link, core: Any, message: tuple[ipc.Kind, Any], outputs: list[RequestOutput]) -> None:
    kind, body = message
    if kind is ipc.Kind.ADD:
        refusal = core.add(body)
        if refusal is not None:
            outputs.append(refusal)
    elif kind is ipc.Kind.ABORT:
        for request_id in body:
            core.abort(request_id)
    elif kind is ipc.Kind.PING:
        link.send(ipc.Kind.PONG, ipc.OutputsMessage([], core.stats()))


if __name__ == "__main__":
    sys.exit(main())
