"""The ranks of another node, as the engine core sees them: one link, and a thread that listens to it.

Knows: how plans, results, reports and questions cross the link. Refuses to know: the ranks' processes
(`engine.executor.node_host`, at the other end), who started that host.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from queue import Empty, SimpleQueue

from engine.comm.board import PHASES
from engine.comm.node_listener import NodeArrival
from engine.comm.node_messages import NodeKind, Prepare, Prepared, RankStates, Start, decode, encode
from engine.comm.rdma_traffic import RdmaTraffic
from engine.comm.secure_link import LinkLost, LinkRefused, NodeLinkError
from engine.executor.messages import Kind, MessageError, PhaseReport, decode_report
from engine.executor.rank_line import KERNEL_STATES, RankLine
from engine.executor.roster import Roster
from engine.placement import RankSpec
from engine.usage import RankUsage

_MOST = 1 << 62
"""Beyond any count of bytes or seconds; also what is not finite is."""


class RemoteNode:
    """The ranks `ranks` of an engine on the node that has arrived. Losing it is reported to the roster, once."""

    def __init__(self, arrival: NodeArrival, ranks: Sequence[RankSpec], roster: Roster, silence_seconds: float) -> None:
        self.name = ranks[0].node
        self.ranks = tuple(ranks)
        self._link = arrival.link
        self._link.allow_silence(silence_seconds)
        self._roster = roster
        self._results: SimpleQueue[bytes | None] = SimpleQueue()
        self._states: SimpleQueue[list[RankLine]] = SimpleQueue()
        self._told: tuple[float, list[RankUsage], RdmaTraffic | None] = (0.0, [], None)
        self._gone = threading.Event()
        self._thread: threading.Thread | None = None

    def prepare(self, message: Prepare, timeout_seconds: float) -> Prepared:
        """Have the host make what its ranks share. Raises: NodeLinkError."""
        self._link.send(NodeKind.PREPARE, encode(message))
        frame = self._link.receive(timeout_seconds)
        if frame is None:
            raise LinkLost(f"did not prepare its ranks within {timeout_seconds:.0f} s")
        kind, body = frame
        if kind == Kind.FAULT:
            raise LinkRefused(f"cannot prepare its ranks: {_fault_of(kind, body)}")
        if kind != NodeKind.PREPARED:
            raise LinkRefused(f"answered with a message of kind {kind} when it was to prepare its ranks")
        return decode(body, Prepared)

    def spawn(self, store: tuple[str, int] | None) -> None:
        """Have the host start its ranks, and listen to it from now on. Raises: NodeLinkError."""
        self._link.send(NodeKind.START, encode(Start(store)))
        self._thread = threading.Thread(target=self._listen, name=f"node {self.name}", daemon=True)
        self._thread.start()

    def write(self, body: bytes, kind: Kind) -> None:
        """Give a message to all ranks. A link that breaks is the roster's news, not the caller's."""
        try:
            self._link.send(kind, body)
        except LinkLost as error:
            self._lose(error)

    def read_result(self, timeout_seconds: float) -> bytes | None:
        """Take the next result; None at the timeout, or when the node is gone."""
        with contextlib.suppress(Empty):
            return self._results.get(timeout=timeout_seconds)
        return None

    def wake(self) -> None:
        """Let who waits for a result go."""
        self._results.put(None)

    def lines(self, timeout_seconds: float) -> list[RankLine]:
        """Ask what each rank does at this moment; nothing when the node does not answer in time."""
        with contextlib.suppress(NodeLinkError, Empty):
            self._link.send(NodeKind.STATES)
            return self._states.get(timeout=timeout_seconds)
        return []

    def usage(self) -> tuple[list[RankUsage], RdmaTraffic | None]:
        """What the host said last of its ranks and of its node's RDMA ports: about a second ago, or they are silent."""
        at, ranks, traffic = self._told
        return [rank.aged(time.monotonic() - at) for rank in ranks], traffic

    def dump_stacks(self) -> None:
        """Have the host put the stacks of its ranks into its log."""
        with contextlib.suppress(NodeLinkError):
            self._link.send(NodeKind.STACKS)

    def begin_stop(self) -> None:
        """Ask the host to end its ranks and itself."""
        with contextlib.suppress(NodeLinkError):
            self._link.send(NodeKind.GOODBYE)

    def close(self) -> None:
        """End the link, whoever waits on it. The host then kills its ranks."""
        self._link.close()

    def stop(self, grace_seconds: float = 0.0) -> None:
        """Give a host that was asked to end the time to, and close the link: then it kills what is left."""
        if self._thread is not None:
            self._gone.wait(grace_seconds)
        self._link.close()
        if self._thread is not None:
            self._thread.join(2.0)
        self._link.dispose()

    def _listen(self) -> None:
        try:
            while True:
                frame = self._link.receive()
                if frame is None:
                    continue
                kind, body = frame
                if kind == NodeKind.RESULT:
                    self._results.put(body)
                elif kind == NodeKind.STATES:
                    self._states.put(self._lines(decode(body, RankStates)))
                elif kind == NodeKind.USAGE:
                    said = decode(body, RankStates)
                    ranks = [line.usage() for line in self._lines(said)]
                    self._told = (time.monotonic(), ranks, _checked(said.traffic))
                else:
                    self._hear(kind, body)
        except (NodeLinkError, MessageError) as error:
            self._lose(error)

    def _lines(self, said: RankStates) -> list[RankLine]:
        missing = {rank.rank: rank for rank in self.ranks}
        lines = []
        for state, kernel, kernel_seconds in said.ranks:
            spec = missing.pop(state.rank, None)
            if spec is None:
                raise MessageError(f"the state of rank {state.rank}, which is not its own or was told already")
            _check_phase(state.phase)
            if kernel and kernel not in KERNEL_STATES.values():
                raise MessageError(f"a rank kept from running by {kernel[:40]!r}, which there is not")
            spent = (state.idle_seconds, state.computing_seconds, state.waiting_seconds)
            _check_figures(state.seconds, kernel_seconds, *spent, state.memory_bytes, state.watts)
            lines.append(RankLine(spec, state, kernel, kernel_seconds))
        return lines

    def _hear(self, kind: int, body: bytes) -> None:
        report = decode_report(kind, body)
        if all(report.rank != rank.rank for rank in self.ranks):
            raise MessageError(f"a report about rank {report.rank}, which is not its own")
        if isinstance(report, PhaseReport):
            _check_phase(report.phase)
        self._roster.hear(report)

    def _lose(self, error: Exception) -> None:
        if self._gone.is_set():
            return
        self._gone.set()
        self._roster.lose_node(self.ranks, str(error))
        self._link.close()


def _check_phase(phase: str) -> None:
    if phase not in PHASES:
        raise MessageError(f"a report of phase {phase[:40]!r}, which there is not")


def _check_figures(*figures: float) -> None:
    if not all(0 <= figure < _MOST for figure in figures):
        raise MessageError(f"figures that cannot be: {figures}")


def _checked(traffic: RdmaTraffic | None) -> RdmaTraffic | None:
    if traffic is not None:
        _check_figures(traffic.seconds, traffic.sent_bytes, traffic.received_bytes)
    return traffic


def _fault_of(kind: int, body: bytes) -> str:
    report = decode_report(kind, body)
    return str(getattr(report, "message", report))
