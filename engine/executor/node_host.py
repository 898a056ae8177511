"""The host of an engine's ranks on a node other than the head's: `python -m engine.executor.node_host`.

It comes to the head over one authenticated connection, is told what to run, starts and watches the ranks of its node,
and carries plans to them and results, reports and answers back. It ends when the head says so; when the head is lost it
kills its ranks first. Whoever starts it (`node_agent`, a Ray actor) only has to keep it running.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import msgspec

from engine.comm.board import PHASES
from engine.comm.node_messages import (
    Hello,
    NodeFacts,
    NodeKind,
    Prepare,
    Prepared,
    RankStates,
    Refusal,
    Start,
    decode,
    encode,
    own_facts,
)
from engine.comm.rdma_traffic import RdmaTraffic, read_traffic
from engine.comm.ring import RingClosed, RingError, RingReader, RingTimeout
from engine.comm.secure_link import LinkLost, LinkRefused, NodeLinkError, SecureLink, connect
from engine.config import EngineConfig
from engine.executor.messages import FaultReport, Kind, PhaseReport, Report, encode_report
from engine.executor.rank_host import RANK_COMMAND, STOP_SECONDS, RankHost
from engine.model_digest import digest_of
from engine.placement import Placement
from engine.process import Repeating, StatusPipe, die_with_parent, dump_stacks_on_signal, follow_parent, say, say_trace
from engine.usage import USAGE_INTERVAL_SECONDS

PREPARE_SECONDS = 900.0
"""Other nodes may take long to come, and the head says nothing to this one meanwhile but that it is there."""
REACH_SECONDS = 10.0
"""The head wanted this host a moment ago, so its door is there."""
EXIT_LOST = 1
EXIT_REFUSED = 2
_RESULT_SECONDS = 1.0
_UNSENT_SECONDS = 0.02
"""How often to try again to hand on what ranks had no room for."""
_AGAIN_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class HostTask:
    """Whom to come to, and as whom. `model`, `address`, `cpu_threads`: this node's own where they are set, else the
    head's (`address`: that of this end of the link). `load_format` says how weights are read, for the digest.
    """

    host: str
    port: int
    secret: bytes = field(repr=False)
    node: str
    order_id: str
    model: str = ""
    address: str = ""
    cpu_threads: int = 0
    load_format: str = "auto"
    command: tuple[str, ...] = RANK_COMMAND


def run_node_host(task: HostTask, on_report: Callable[[Report], None] = lambda _: None) -> int:
    """Be the host until the engine ends (0), the head is lost (1) or does not want it (2). From the main thread.

    `on_report` hears all that the ranks report, too, from another thread.
    """
    # First what takes a while, on a network's disk say: the head's door waits seconds for who is in it.
    facts = own_facts(digest_of(task.model, task.load_format) if task.model else "")
    try:
        link = _reach(task)
    except NodeLinkError as error:
        _say(task, str(error))
        return EXIT_LOST
    host = _NodeHost(task, facts, link, on_report)
    try:
        host.run()
    except LinkRefused as error:
        _say(task, str(error))
        return EXIT_REFUSED
    except NodeLinkError as error:
        _say(task, f"lost the head: {error}; its ranks here end")
        return EXIT_LOST
    finally:
        host.stop()
    return 0


def _reach(task: HostTask) -> SecureLink:
    """Come to the head's door, which turns some away for a moment when many come at once. Raises: NodeLinkError."""
    deadline = time.monotonic() + REACH_SECONDS
    while True:
        try:
            return connect(task.host, task.port, task.secret, bind=task.address)
        except LinkLost:
            if time.monotonic() > deadline:
                raise
            time.sleep(_AGAIN_SECONDS)


class _NodeHost:
    def __init__(self, task: HostTask, facts: NodeFacts, link: SecureLink, on_report: Callable[[Report], None]) -> None:
        self._task = task
        self._facts = facts
        self._on_report = on_report
        self._link = link
        self._host: RankHost | None = None
        self._timeout = 60.0
        self._is_stopping = threading.Event()
        self._results: threading.Thread | None = None
        self._usage: Repeating | None = None
        self._grace = 0.0
        self._unsent: deque[tuple[Kind, bytes, float]] = deque()
        """What the head sent for ranks whose ring is full, each with its deadline."""

    def run(self) -> None:
        """Raises: NodeLinkError when the head is lost or refuses."""
        task, link = self._task, self._link
        link.start_heartbeat()
        link.send(NodeKind.HELLO, encode(Hello(task.node, task.order_id, self._facts)))
        prepare = decode(self._expect(NodeKind.PREPARE, PREPARE_SECONDS), Prepare)
        try:
            host = self._prepare(prepare)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with this node, the head is to say it
            self._report(FaultReport(0, "spawn", type(error).__name__, str(error) or "cannot prepare"))
            say_trace(error)
            raise LinkRefused(str(error)) from error
        link.send(NodeKind.PREPARED, encode(Prepared(host.store)))
        start = decode(self._expect(NodeKind.START, PREPARE_SECONDS), Start)
        try:
            host.spawn(self._report, start.store)
        except OSError as error:
            self._report(FaultReport(host.ranks[0].rank, "spawn", type(error).__name__, f"cannot be started: {error}"))
        if host.results is not None:
            self._results = threading.Thread(target=self._carry_results, args=(host.results,), daemon=True)
            self._results.start()
        self._usage = Repeating(partial(self._tell_usage, host), USAGE_INTERVAL_SECONDS, "usage")
        self._serve(host)

    def stop(self) -> None:
        """End the ranks and the link; no process is left."""
        self._is_stopping.set()
        if self._usage is not None:
            self._usage.stop()
        if self._host is not None:
            if self._results is not None:
                self._results.join(2 * _RESULT_SECONDS)
            self._host.stop(self._grace)
        self._link.dispose()

    def _prepare(self, message: Prepare) -> RankHost:
        task = self._task
        config = EngineConfig.from_json(message.config)
        placement = Placement.from_json(message.placement)
        self._timeout = config.step_timeout_seconds
        self._link.allow_silence(config.nodes.silence_seconds)
        local = replace(
            config,
            model=task.model or config.model,
            node_address=task.address or self._link.address,
            cpu_threads=task.cpu_threads or config.cpu_threads,
        )
        ranks = [rank for rank in placement.engine(message.engine) if rank.node == task.node]
        if not ranks:
            raise ValueError(f"engine {message.engine} has no rank on {task.node}")
        self._host = RankHost(local, placement, message.engine, ranks, task.command)
        return self._host

    def _expect(self, kind: NodeKind, timeout_seconds: float) -> bytes:
        frame = self._link.receive(timeout_seconds)
        if frame is None:
            raise LinkRefused(f"the head sent no {kind.name} within {timeout_seconds:.0f} s")
        if frame[0] == NodeKind.REFUSED:
            refusal = decode(frame[1], Refusal)
            raise LinkRefused(f"the head does not take this node: {refusal.message}")
        if frame[0] == NodeKind.GOODBYE:
            raise LinkRefused("the head does not go on")
        if frame[0] != kind:
            raise LinkRefused(f"the head sent a message of kind {frame[0]} where {kind.name} was due")
        return frame[1]

    def _serve(self, host: RankHost) -> None:
        while True:
            # Never blocked by ranks that read nothing: the head asks just then what they do, and may end it.
            frame = self._link.receive(_UNSENT_SECONDS if self._unsent else None)
            self._pass_on(host)
            if frame is None:
                continue
            kind, body = frame
            if kind < NodeKind.HELLO:
                self._unsent.append((Kind(kind), body, time.monotonic() + self._timeout))
                self._pass_on(host)
            elif kind == NodeKind.STATES:
                self._link.send(NodeKind.STATES, encode(_states(host)))
            elif kind == NodeKind.STACKS:
                host.dump_stacks()
            elif kind == NodeKind.GOODBYE:
                if not self._unsent:
                    host.begin_stop()
                    self._grace = STOP_SECONDS
                return
            else:
                raise LinkRefused(f"the head sent a message of kind {kind} while serving")

    def _pass_on(self, host: RankHost) -> None:
        """Give the ranks what was sent to them, as far as they have room for it."""
        while self._unsent:
            kind, body, deadline = self._unsent[0]
            try:
                host.write(body, kind, 0.0)
            except RingTimeout as error:
                if time.monotonic() < deadline:
                    return
                slow, text = host.ranks[error.readers[0]], f"reads no plans for {self._timeout:.0f} s"
                self._report(FaultReport(slow.rank, "serve", "RingTimeout", text))
            except RingError:
                pass  # the ranks are gone: the watch says how
            self._unsent.popleft()

    def _carry_results(self, results: RingReader) -> None:
        with contextlib.suppress(RingClosed, NodeLinkError):
            while not self._is_stopping.is_set():
                got = results.read(_RESULT_SECONDS)
                if got is not None:
                    self._link.send(NodeKind.RESULT, got[1])

    def _tell_usage(self, host: RankHost) -> None:
        with contextlib.suppress(NodeLinkError):  # who receives learns of it
            self._link.send(NodeKind.USAGE, encode(_states(host, read_traffic())))

    def _report(self, report: Report) -> None:
        self._on_report(report)
        kind, body = encode_report(report)
        with contextlib.suppress(NodeLinkError):  # who receives learns of it
            self._link.send(kind, body)


def _states(host: RankHost, traffic: RdmaTraffic | None = None) -> RankStates:
    return RankStates([(line.state, line.kernel, line.kernel_seconds) for line in host.lines()], traffic)


def _say(task: HostTask, line: str) -> None:
    say(f"node host of {task.node}: {line}")


class _Phases:
    """Tells who started this process how far the ranks are: as far as the one that is furthest behind."""

    def __init__(self, status: StatusPipe) -> None:
        self._status = status
        self._phases: dict[int, tuple[int, float]] = {}
        self._said: tuple[int, float] = (-1, 0.0)

    def __call__(self, report: Report) -> None:
        if not isinstance(report, PhaseReport) or report.phase not in PHASES:
            return
        self._phases[report.rank] = (PHASES.index(report.phase), report.fraction)
        least = min(self._phases.values())
        if least != self._said:
            self._said = least
            self._status.phase(PHASES[least[0]], "progress", least[1] or None)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the task from stdin, as JSON: the secret must stand on no command line."""
    parser = argparse.ArgumentParser(prog="engine.executor.node_host")
    parser.add_argument("--status-fd", type=int, default=None, help="where phases are reported, one JSON line each")
    arguments = parser.parse_args(argv)
    if arguments.status_fd is not None:
        follow_parent(arguments.status_fd)
    else:
        die_with_parent(os.getppid())
    dump_stacks_on_signal()
    # Ctrl-C reaches the whole foreground group; the agent decides when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    task = msgspec.json.decode(sys.stdin.buffer.read(1 << 16), type=HostTask)
    return run_node_host(task, _Phases(StatusPipe(arguments.status_fd)))


if __name__ == "__main__":
    sys.exit(main())
