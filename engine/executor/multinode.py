"""The executor of ranks as processes, on this node and on others: one small plan per step to all, one result back.

Knows: how a plan reaches ranks, when they are all there, whom to blame. Refuses to know: scheduling, tensors, the
processes themselves (`engine.executor.rank_host`), how node hosts on other nodes come to life
(`engine.executor.node_starter`). With all ranks on one node there is no link, no listener and no other process.
"""

from __future__ import annotations

import contextlib
import secrets
import select
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import msgspec

from engine.comm.board import PHASES, suspects
from engine.comm.node_messages import NodeFacts, Prepare, own_facts
from engine.comm.rdma_traffic import read_traffic
from engine.comm.ring import RingClosed, RingError, RingTimeout
from engine.comm.secure_link import LinkRefused, NodeLinkError
from engine.config import EngineConfig
from engine.core.plan import ExecutionPlan, StepResult
from engine.executor.base import ExecutorError
from engine.executor.messages import (
    DoneReport,
    Kind,
    LoadedReport,
    PhaseReport,
    Report,
)
from engine.executor.node_starter import NodeOrder, NodeStarter, orders_for
from engine.executor.nodes_awaited import NodesAwaited
from engine.executor.rank_host import RANK_COMMAND, STOP_SECONDS, RankHost
from engine.executor.rank_line import STOPPED, TRACED, RankLine
from engine.executor.remote_node import RemoteNode
from engine.executor.roster import RankFailure, RankView, Roster
from engine.executor.steps_in_flight import StepsInFlight
from engine.model_digest import digest_of
from engine.placement import Placement
from engine.usage import EngineUsage, NodeTraffic

# A rank that says nothing for this long while it starts is taken to hang; loading reports every layer.
SILENCE_SECONDS = 120.0
PREPARE_SECONDS = 30.0
CAUSE_SECONDS = 5.0
"""Longer than the roster takes to settle on a cause."""
_STATES_SECONDS = 1.0
_PIECE_SECONDS = 1.0


class MultiNodeExecutor:
    """The ranks of one data-parallel engine. Call `wait_loaded`, `allocate_kv`, `warm_up`, then submit and collect.

    `starter` brings node hosts to life on nodes other than `node`, this one; without it all ranks are processes of this
    host. `on_nodes` is told, in a line, of nodes that come and of those that are waited for. Not for two threads at
    once. Raises from every method: RankFailure, or ExecutorError when a node does not come.
    """

    def __init__(
        self,
        config: EngineConfig,
        placement: Placement,
        *,
        dp_rank: int = 0,
        on_phase: Callable[[PhaseReport], None] = lambda _: None,
        command: Sequence[str] = RANK_COMMAND,
        silence_seconds: float = SILENCE_SECONDS,
        starter: NodeStarter | None = None,
        node: str = "",
        facts: NodeFacts | None = None,
        on_nodes: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.ranks = placement.engine(dp_rank)
        self._config = config
        self._placement = placement
        self._dp_rank = dp_rank
        self._timeout = config.step_timeout_seconds
        self._silence = silence_seconds
        self._starter = starter
        self._facts = facts
        self._on_nodes = on_nodes
        self._is_stopped = False
        self._is_warm = False
        self._steps = StepsInFlight(
            timeout_seconds=config.step_timeout_seconds, has_stages=placement.pipeline_parallel_size > 1
        )
        self._remote: dict[str, RemoteNode] = {}
        self._roster = Roster(self.ranks, on_phase)
        local = [rank for rank in self.ranks if starter is None or rank.node == node]
        self._host: RankHost | None = None
        try:
            if local:
                self._host = RankHost(config, placement, dp_rank, local, command)
            orders = orders_for(placement, dp_rank, node, secrets.token_hex(8)) if starter is not None else []
            if orders and starter is not None:
                self._assemble(starter, orders)
            elif self._host is not None:
                self._host.spawn(self._roster.hear)
            self._answering = self._find_answering()
        except BaseException:
            self.stop()
            raise

    @property
    def num_in_flight(self) -> int:
        return len(self._steps)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of this node's ranks, in rank order."""
        return self._host.pids if self._host is not None else ()

    def on_failure(self, callback: Callable[[ExecutorError], None]) -> None:
        """Have `callback` called, from another thread, when a rank fails; also while no step runs."""
        self._roster.on_failure = callback
        if self._roster.failure is not None:
            callback(self._roster.failure)

    def wait_loaded(self) -> list[LoadedReport]:
        """Wait until all ranks hold their weights; returns their reports in rank order."""
        reports = self._gather(lambda report: isinstance(report, LoadedReport), "load")
        return sorted((r for r in reports if isinstance(r, LoadedReport)), key=lambda report: report.rank)

    def allocate_kv(self, num_blocks: int) -> None:
        """Make the KV pool on every rank: `num_blocks` blocks of each rank's own size."""
        self._call(Kind.ALLOCATE_KV, num_blocks)

    def warm_up(self) -> None:
        """Run a few small steps on all ranks together, so that the first request finds everything ready."""
        self._call(Kind.WARM_UP, None)
        self._is_warm = True

    def submit(self, plan: ExecutionPlan) -> None:
        """Send a plan to all ranks. Blocks only while a ring is full of unread plans."""
        self._check()
        self._write(self._steps.encode(plan), Kind.PLAN)
        self._steps.add(plan)

    def collect(self) -> StepResult:
        """Wait for the oldest plan's result, at most for the step's deadline."""
        self._check()
        deadline = self._steps.oldest()[1]
        if (late := time.monotonic() - deadline) > 0:
            # Nobody has waited for it yet: this process itself stood still.
            self._steps.postpone(late + self._timeout)
        while (body := self._read_piece()) is None:
            self._check()
            step_id, deadline = self._steps.oldest()
            if time.monotonic() >= deadline:
                raise self._hang(step_id)
        return self._steps.finish(body)

    def usage(self) -> EngineUsage:
        """See `Executor.usage`."""
        ranks = [line.usage() for line in self._host.lines()] if self._host is not None else []
        read = {self._host.ranks[0].node: read_traffic()} if self._host is not None and self._remote else {}
        for node in self._remote.values():
            theirs, read[node.name] = node.usage()
            ranks += theirs
        return EngineUsage(
            sorted(ranks, key=lambda rank: rank.rank),
            [
                NodeTraffic(name, traffic.seconds, traffic.sent_bytes, traffic.received_bytes)
                for name, traffic in read.items()
                if traffic is not None
            ],
        )

    def stop(self) -> None:
        """End all ranks on all nodes and give everything back. Idempotent; no process of this node is left then."""
        if self._is_stopped:
            return
        self._is_stopped = True
        self._roster.expect_end()
        grace = 0.0
        parts: list[RankHost | RemoteNode] = [*self._remote.values()]
        if self._host is not None:
            parts.insert(0, self._host)
        # Ranks that still import or load would not hear a request to end for as long, and have nothing to finish.
        if self._roster.failure is None and self._is_warm:
            grace = STOP_SECONDS
            for part in parts:
                part.begin_stop()
        deadline = time.monotonic() + grace
        for part in parts:
            part.stop(max(0.0, deadline - time.monotonic()))
        if self._starter is not None:
            self._starter.stop()
        self._roster.close()
        self._steps.clear()

    # Nodes come together.

    def _assemble(self, starter: NodeStarter, orders: Sequence[NodeOrder]) -> None:
        """Have a host on every node, tell all of them where to meet, and start the ranks."""
        host, roster = self._host, self._roster
        # Ranks of this node may import while others are waited for, as soon as it is known where all meet.
        if host is not None and (host.store is not None or not host.needs_store):
            host.spawn(roster.hear)
        # Reading samples of the weights takes a while on a slow disk: no rank has to wait for it.
        facts = self._facts or own_facts(digest_of(self._config.model, self._config.load_format))
        starter.start(orders, self._on_lost)
        awaiting = NodesAwaited(orders, roster, facts, self._on_nodes)
        arrivals = awaiting.collect(starter, self._config.nodes.join_timeout_seconds)
        message = Prepare(self._config.to_json(), self._placement.to_json(), self._dp_rank)
        store = host.store if host is not None else None
        for order in orders:  # all of them before the first is asked: whatever fails then, `stop` lets all go
            self._remote[order.node] = RemoteNode(
                arrivals[order.node], order.ranks, roster, self._config.nodes.silence_seconds
            )
        store = self._prepare(message) or store
        if host is not None and not host.pids:
            host.spawn(roster.hear, store)
        for node in self._remote.values():
            with self._blaming(node):
                node.spawn(store)

    def _prepare(self, message: Prepare) -> tuple[str, int] | None:
        """Have all nodes make what their ranks share, at the same time; returns where ranks meet, if one keeps that."""
        store = None
        with ThreadPoolExecutor(len(self._remote), "prepare") as pool:
            asked = {pool.submit(node.prepare, message, PREPARE_SECONDS): node for node in self._remote.values()}
            try:
                for answered in as_completed(asked):
                    with self._blaming(asked[answered]):
                        store = answered.result().store or store
            except BaseException:
                for node in self._remote.values():
                    node.close()  # nobody waits for what the others answer
                raise
        return store

    def _on_lost(self, node: str, why: str) -> None:
        """The starter knows that a host is gone."""
        ranks = [rank for rank in self.ranks if rank.node == node]
        if ranks:
            self._roster.lose_node(ranks, why, is_known=True)

    @contextlib.contextmanager
    def _blaming(self, node: RemoteNode) -> Iterator[None]:
        """Turn the loss of a link into the loss of its node."""
        try:
            yield
        except NodeLinkError as error:
            # What the node says itself goes before how its host then ended, of which its starter tells.
            self._roster.lose_node(node.ranks, str(error), is_said=isinstance(error, LinkRefused))
            raise self._end_of_a_rank() from error

    # Plans out, results and reports back.

    def _find_answering(self) -> RankHost | RemoteNode:
        """The part whose rank answers: tensor rank 0 of the last stage."""
        if self._host is not None and self._host.results is not None:
            self._host.results.watch(self._roster.bell, select.POLLIN)
            return self._host
        answering = self._placement.stage(self._dp_rank, self._placement.pipeline_parallel_size - 1)[0]
        node = self._remote[answering.node]
        self._roster.wakers.append(node.wake)
        return node

    def _read_piece(self) -> bytes | None:
        """Wait for a result, for a small part of the step's time at most.

        A pause of the whole engine (a frozen container, a machine asleep) is nobody's hang: ranks stood still with this
        process, and get the time back.
        """
        began, longest = time.monotonic(), min(_PIECE_SECONDS, self._timeout / 8)
        piece = min(longest, max(0.0, self._steps.oldest()[1] - began))
        body = self._read_result(piece)
        late = time.monotonic() - began - piece
        if body is None and late > longest:
            self._steps.postpone(late + piece)
        return body

    def _read_result(self, timeout_seconds: float) -> bytes | None:
        answering = self._answering
        if isinstance(answering, RemoteNode):
            return answering.read_result(timeout_seconds)
        if answering.results is None:
            raise ExecutorError("the executor was stopped")
        try:
            got = answering.results.read(timeout_seconds)
        except RingClosed:
            raise self._end_of_a_rank() from None
        return None if got is None else got[1]

    def _write(self, body: bytes, kind: Kind) -> None:
        for node in self._remote.values():
            node.write(body, kind)
        if self._host is None:
            return
        try:
            self._host.write(body, kind, self._timeout)
        except RingTimeout:
            step_id = self._steps.oldest()[0] if self._steps else 0
            raise self._hang(step_id) from None
        except RingError:
            raise self._end_of_a_rank() from None

    def _call(self, kind: Kind, argument: object) -> None:
        self._check()
        self._write(msgspec.msgpack.encode(argument), kind)
        self._gather(lambda report: isinstance(report, DoneReport) and report.call == kind, kind.name.lower())

    def _gather(self, is_wanted: Callable[[Report], bool], what: str) -> list[Report]:
        """Take one wanted report from each rank; a rank that stays silent too long hangs."""
        came: dict[int, Report] = {}
        began = time.monotonic()
        while len(came) < len(self.ranks):
            self._check()
            asked = time.monotonic()
            report = self._roster.next_report(0.2)
            if time.monotonic() - asked > _PIECE_SECONDS:
                began = time.monotonic()  # this process stood still, and the ranks perhaps with it
            if report is not None and is_wanted(report):
                came[report.rank] = report
            if (silent := self._find_silent(came, began)) is not None:
                view, seconds = silent
                said = f"has said nothing for {seconds:.0f} s (waited for: {what}); stacks are in the log"
                in_phase = time.monotonic() - view.since
                raise self._fail_with_stacks(RankFailure(view.spec, view.phase, said, seconds=in_phase))
        return list(came.values())

    def _find_silent(self, came: Mapping[int, Report], began: float) -> tuple[RankView, float] | None:
        """Find a rank that has been silent too long, and for how long: the one that is furthest behind."""
        now = time.monotonic()
        late = [view for rank, view in self._roster.views.items() if rank not in came]
        found: list[tuple[int, RankView, float]] = []
        for view in late:
            seconds = now - max(view.heard, began)
            # Nothing can be reported while Python and torch are imported, perhaps from a cold disk.
            limit = max(self._silence, SILENCE_SECONDS) if view.phase in ("spawn", "import") else self._silence
            if seconds > limit:
                found.append((PHASES.index(view.phase), view, seconds))
        if not found:
            return None
        behind, view, seconds = min(found, key=lambda item: item[0])
        # Ranks meet at a rendezvous: who waits there is not to blame while others are still on their way.
        if view.phase == "rendezvous" and any(PHASES.index(other.phase) < behind for other in late):
            return None
        return view, seconds

    # What goes wrong.

    def _check(self) -> None:
        if self._roster.failure is not None:
            raise self._roster.failure
        if self._is_stopped:
            raise ExecutorError("the executor was stopped")

    def _fail_with_stacks(self, failure: RankFailure) -> RankFailure:
        """Settle on a failure, unless one is known already, and put the stacks of all ranks into their nodes' logs."""
        stands = self._roster.fail(failure)
        for node in self._remote.values():
            node.dump_stacks()
        if self._host is not None:
            self._host.dump_stacks()
        return stands

    def _end_of_a_rank(self) -> ExecutorError:
        """A ring or a link is closed: the roster is about to know why."""
        return self._roster.wait_for_cause(CAUSE_SECONDS) or ExecutorError("a rank closed its ring")

    def _hang(self, step_id: int) -> RankFailure:
        """Name who holds a step up, with the stacks of all ranks in the log."""
        lines = self._host.lines() if self._host is not None else []
        for node in self._remote.values():
            if not (theirs := node.lines(_STATES_SECONDS)):
                # Its link still lives, or the failure would be known: the host itself does not answer.
                self._roster.lose_node(node.ranks, f"its host did not say what its ranks do in step {step_id}")
                self._roster.wait_for_cause(CAUSE_SECONDS)
            lines += theirs
        blamed = _blame(lines, step_id)
        if not blamed:
            return self._roster.failure or RankFailure(self.ranks[0], "serve", "did not answer", seconds=self._timeout)
        first = blamed[0]
        others = [str(line.spec.rank) for line in blamed[1:]]
        what = f"did not finish step {step_id} within {self._timeout:.0f} s: {first.state}{first.kernel}"
        what += f" (and ranks {', '.join(others)})" if others else ""
        waiting = [str(line.spec.rank) for line in lines if line not in blamed]
        what += f"; ranks {', '.join(waiting)} wait" if waiting else ""
        # Whom the kernel itself holds can show none.
        shown = (
            "stacks are" if first.kernel in ("", STOPPED) else "where the kernel holds it and the others' stacks are"
        )
        what += f"; {shown} in the log"
        return self._fail_with_stacks(RankFailure(first.spec, first.state.phase, what, seconds=first.state.seconds))


def _blame(lines: Sequence[RankLine], step_id: int) -> list[RankLine]:
    """Those who hold a step up. A rank may be stopped while it waits: what the kernel says goes first."""
    stopped = [line for line in lines if line.kernel in (STOPPED, TRACED)]
    if stopped:
        return stopped
    guilty = suspects([line.state for line in lines], step_id)
    return [line for line in lines if any(line.state is state for state in guilty)] or list(lines)
