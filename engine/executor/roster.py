"""All ranks of an engine as its executor sees them, on whatever node: where each is, and the one cause of a failure.

Knows: phases, since when, who was heard last, which of several signs of a failure is its cause. Refuses to know: how
reports come (`multiproc_watch` on this node, `remote_node` from others), what to do about a failure.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from engine.comm.secure_link import CUT_SECONDS
from engine.comm.segment import new_bell
from engine.executor.base import ExecutorError
from engine.executor.messages import EndedReport, FaultReport, PhaseReport, Report
from engine.placement import RankSpec

# After the first sign of a failure: how long to listen for the others', since the rank that broke is not always the
# first one heard; those that waited for it break too, and signs from another node take their time.
GATHER_SECONDS = 0.15
GATHER_NODES_SECONDS = 0.4
# An echo's origin is known soon on one node; the loss of another may show only by what it does not acknowledge.
ECHO_SECONDS = 1.5
ECHO_NODES_SECONDS = CUT_SECONDS + 1.5
_BROKE, _ENDED, _CUT, _ECHO = range(4)


class RankFailure(ExecutorError):
    """A rank died, broke or hangs: which, where, in which phase, for how long. `hint` is the fix when one is known."""

    def __init__(
        self, spec: RankSpec, phase: str, what: str, *, seconds: float, hint: str = "", does_not_fit: bool = False
    ) -> None:
        self._settle(
            spec,
            phase,
            seconds,
            f"rank {spec.rank} (node {spec.node}, {spec.device}) {what}; phase {phase}, {seconds:.1f} s in it",
        )
        self.hint = hint
        self.does_not_fit = does_not_fit

    def _settle(self, spec: RankSpec, phase: str, seconds: float, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.rank = spec.rank
        self.node = spec.node
        self.device = spec.device
        self.phase = phase
        self.seconds = seconds


class NodeFailure(RankFailure):
    """A node is lost with all its ranks; `rank` and `device` are its first one's."""

    def __init__(self, ranks: Sequence[RankSpec], phase: str, what: str, *, seconds: float) -> None:
        first, last = ranks[0], ranks[-1]
        named = (
            f"rank {first.rank}, {first.device}"
            if len(ranks) == 1
            else f"ranks {first.rank} to {last.rank}, {first.device} to {last.device}"
        )
        message = f"node {first.node} ({named}) is lost: {what}; phase {phase}, {seconds:.1f} s in it"
        self._settle(first, phase, seconds, message)
        self.hint = ""
        self.does_not_fit = False


@dataclass(slots=True)
class RankView:
    """One rank as its engine sees it. `since` is when it entered `phase`, `heard` when it last said anything."""

    spec: RankSpec
    phase: str = "spawn"
    since: float = field(default_factory=time.monotonic)
    heard: float = field(default_factory=time.monotonic)


class Roster:
    """Hears of every rank, from any thread, and settles on one cause when something fails.

    `reports` gets what ranks report other than phases, and None when `failure` is set; `bell` becomes readable then,
    and `wakers` are called. `on_phase` and `on_failure` are called from the threads that bring news.
    """

    def __init__(self, ranks: Sequence[RankSpec], on_phase: Callable[[PhaseReport], None]) -> None:
        self.views = {rank.rank: RankView(rank) for rank in ranks}
        self.reports: SimpleQueue[Report | None] = SimpleQueue()
        self.failure: RankFailure | None = None
        self.bell = new_bell()
        self.on_failure: Callable[[RankFailure], None] = lambda _: None
        self.wakers: list[Callable[[], None]] = []
        self._on_phase = on_phase
        has_nodes = len({rank.node for rank in ranks}) > 1
        self._gather_seconds = GATHER_NODES_SECONDS if has_nodes else GATHER_SECONDS
        self._echo_seconds = ECHO_NODES_SECONDS if has_nodes else ECHO_SECONDS
        self._echoing: set[int] = set()
        self._causes: list[tuple[int, float, RankFailure]] = []
        self._is_ending = False
        self._lock = threading.Lock()

    def next_report(self, timeout_seconds: float) -> Report | None:
        """Take the next report that is no phase; None at the timeout, or when something failed."""
        with contextlib.suppress(Empty):
            return self.reports.get(timeout=timeout_seconds)
        return None

    def hear(self, report: Report) -> None:
        """Take in what a rank, or who watches it, reports."""
        view = self.views.get(report.rank)
        if view is None:
            return
        view.heard = time.monotonic()
        if isinstance(report, PhaseReport):
            if report.phase != view.phase:
                view.phase, view.since = report.phase, view.heard
            self._on_phase(report)
        elif isinstance(report, FaultReport):
            what = f"failed: {report.error_type}: {report.message}"
            if report.is_echo:
                self._echoing.add(report.rank)
            self._suspect(
                _ECHO if report.is_echo else _BROKE, self._failure_of(view, what, report.hint, report.does_not_fit)
            )
        elif isinstance(report, EndedReport):
            # The end of a rank that broke by another's fault is the same echo, and no cause.
            self._suspect(_ECHO if report.rank in self._echoing else _ENDED, self._failure_of(view, report.how))
        else:
            self.reports.put(report)

    def lose_node(self, ranks: Sequence[RankSpec], why: str, *, is_said: bool = False, is_known: bool = False) -> None:
        """Take in that a node is gone, with its ranks. `is_said`: by the node itself; `is_known`: by who started it,
        not only from its silence."""
        view = self.views[ranks[0].rank]
        failure = NodeFailure(ranks, view.phase, why, seconds=time.monotonic() - view.since)
        self._suspect(_BROKE if is_said else _ENDED if is_known else _CUT, failure)

    def fail(self, failure: RankFailure) -> RankFailure:
        """Settle on a failure, unless one is known already; returns the one that stands."""
        with self._lock:
            if self.failure is not None:
                return self.failure
            self.failure = failure
            # Under the lock: once closed, its number may be another descriptor's.
            if self.bell >= 0:
                os.eventfd_write(self.bell, 1)
        self.reports.put(None)
        for wake in self.wakers:
            wake()
        self.on_failure(failure)
        return failure

    def wait_for_cause(self, seconds: float) -> RankFailure | None:
        """Wait until a failure that has begun to show is settled on."""
        deadline = time.monotonic() + seconds
        while self.failure is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.failure

    def expect_end(self) -> None:
        """From now on the end of a rank or a node is no failure."""
        self._is_ending = True

    def close(self) -> None:
        """Hear of nothing any more, and give the bell back. Idempotent."""
        self._is_ending = True
        with self._lock:
            bell, self.bell = self.bell, -1
        if bell >= 0:
            os.close(bell)

    def _failure_of(self, view: RankView, what: str, hint: str = "", does_not_fit: bool = False) -> RankFailure:
        seconds = time.monotonic() - view.since
        return RankFailure(view.spec, view.phase, what, seconds=seconds, hint=hint, does_not_fit=does_not_fit)

    def _suspect(self, order: int, failure: RankFailure) -> None:
        if self._is_ending:
            return
        with self._lock:
            self._causes.append((order, time.monotonic(), failure))
            is_first = len(self._causes) == 1 and self.failure is None
        if is_first:
            threading.Thread(target=self._decide, name="rank failure", daemon=True).start()

    def _decide(self) -> None:
        began = time.monotonic()
        time.sleep(self._gather_seconds)
        # An echo has an origin, which may still be on its way here.
        while all(order == _ECHO for order, _, _ in self._causes) and time.monotonic() - began < self._echo_seconds:
            time.sleep(0.02)
        with self._lock:
            cause = min(self._causes, key=lambda cause: cause[:2])[2]
        if not self._is_ending:
            self.fail(cause)
