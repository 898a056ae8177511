"""Ranks as processes of this host: one small plan per step over a ring, one result back.

Knows: how a plan reaches ranks, how to start and end them, whom to blame. Refuses to know: scheduling, tensors.

Ranks are spawned, never forked, from the main thread (the kernel's parent-death signal follows the spawning thread),
and hold only descriptors without names: however this process ends, no process, no file and no segment is left.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from queue import Empty as _Empty

import msgspec

from engine.comm.board import read_board, suspects
from engine.comm.ring import RingClosed, RingError, RingReader, RingTimeout, RingWriter
from engine.config import EngineConfig
from engine.core.plan import ExecutionPlan, StepResult
from engine.executor.base import ExecutorError
from engine.executor.messages import (
    DoneReport,
    Kind,
    LoadedReport,
    PhaseReport,
    PlanEncoder,
    Report,
    SampledTokens,
    decode_result,
    pack_ints,
)
from engine.executor.multiproc_rank import FRAME
from engine.executor.multiproc_watch import RankFailure, RankHandle, RankWatch
from engine.executor.multiproc_wiring import RankSetup, Wiring
from engine.placement import Placement, RankSpec
from engine.process import threads_per_rank

RANK_COMMAND = (sys.executable, "-m", "engine.executor.multiproc_rank")
STOP_SECONDS = 5.0
# A rank that says nothing for this long while it starts is taken to hang; loading reports every layer.
SILENCE_SECONDS = 120.0
_STACKS_SECONDS = 0.3


class MultiprocExecutor:
    """The ranks of one data-parallel engine. Call `wait_loaded`, `allocate_kv`, `warm_up`, then submit and collect.

    Not for two threads at once. Raises from every method: RankFailure.
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
    ) -> None:
        self.ranks = placement.engine(dp_rank)
        self._timeout = config.step_timeout_seconds
        self._silence = silence_seconds
        self._has_stages = placement.pipeline_parallel_size > 1
        threads = config.cpu_threads or threads_per_rank(len(self.ranks))
        wiring = Wiring(self.ranks, replace(config, cpu_threads=threads), placement.to_json())
        self._board = wiring.board
        self._handles: list[RankHandle] = []
        self._is_stopped = False
        self._encoder = PlanEncoder()
        self._in_flight: deque[tuple[ExecutionPlan, float]] = deque()
        self._sampled: tuple[list[int], list[int]] = ([], [])
        self._collected_at = 0.0
        try:
            for spec in self.ranks:
                self._handles.append(_spawn(wiring.setups.pop(0), spec, command, threads))
            self._plans = RingWriter(wiring.plans)
            self._results = RingReader(wiring.results)
        except BaseException:
            for handle in self._handles:
                handle.process.kill()
                handle.process.wait()
            wiring.close()
            raise
        self._watch = RankWatch(self._handles, on_phase)
        self._results.watch(self._watch.bell, select.POLLIN)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids, in rank order."""
        return tuple(handle.process.pid for handle in self._handles)

    def on_failure(self, callback: Callable[[ExecutorError], None]) -> None:
        """Have `callback` called, from another thread, when a rank fails; also while no step runs."""
        self._watch.on_failure = callback
        if self._watch.failure is not None:
            callback(self._watch.failure)

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

    def submit(self, plan: ExecutionPlan) -> None:
        """Send a plan to all ranks. Blocks only while eight plans are unread."""
        self._check()
        rows, tokens = self._sampled
        sampled = None
        if rows:
            sampled = SampledTokens(pack_ints(rows), pack_ints(tokens))
            self._sampled = ([], [])
        self._write(self._encoder.encode(plan, sampled), Kind.PLAN)
        self._in_flight.append((plan, time.monotonic()))

    def collect(self) -> StepResult:
        """Wait for the oldest plan's result, at most for the step's deadline."""
        self._check()
        plan, submitted_at = self._in_flight[0]
        deadline = max(submitted_at, self._collected_at) + self._timeout
        while True:
            try:
                got = self._results.read(max(0.0, deadline - time.monotonic()))
            except RingClosed:
                raise self._end_of_a_rank() from None
            if got is not None:
                break
            self._check()
            if time.monotonic() >= deadline:
                raise self._hang(plan.step_id)
        result = decode_result(got[1])
        self._in_flight.popleft()
        self._collected_at = time.monotonic()
        if self._has_stages:
            # Stages before the last did not see what was sampled: they are told with the next plan.
            self._sampled[0].extend(result.rows)
            self._sampled[1].extend(result.token_ids)
        return result

    def stop(self) -> None:
        """End all ranks and give everything back. Idempotent; returns once no process is left."""
        if self._is_stopped:
            return
        self._is_stopped = True
        self._watch.expect_end()
        if self._watch.failure is None:
            with contextlib.suppress(RingError):
                self._plans.write(b"", Kind.STOP, timeout_seconds=1.0)
            deadline = time.monotonic() + STOP_SECONDS
            for handle in self._handles:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    handle.process.wait(max(0.01, deadline - time.monotonic()))
        for handle in self._handles:
            handle.process.kill()
        for handle in self._handles:
            handle.process.wait()
        self._watch.stop()
        for handle in self._handles:
            handle.control.close()
            os.close(handle.pidfd)
        self._plans.close()
        self._results.close()
        self._board.close()
        self._in_flight.clear()

    def _write(self, body: bytes, kind: Kind) -> None:
        try:
            self._plans.write(body, kind, timeout_seconds=self._timeout)
        except RingTimeout:
            step_id = self._in_flight[0][0].step_id if self._in_flight else 0
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
        while len(came) < len(self._handles):
            self._check()
            with contextlib.suppress(_Empty):
                report = self._watch.reports.get(timeout=0.2)
                if report is not None and is_wanted(report):
                    came[report.rank] = report
            now = time.monotonic()
            for handle in self._handles:
                if handle.spec.rank in came:
                    continue
                silent = now - max(handle.heard, began)
                # Nothing can be reported while Python and torch are imported, perhaps from a cold disk.
                limit = max(self._silence, SILENCE_SECONDS) if handle.phase in ("spawn", "import") else self._silence
                if silent > limit:
                    said = f"has said nothing for {silent:.0f} s (waited for: {what}); stacks are in the log"
                    raise self._fail_with_stacks(
                        RankFailure(handle.spec, handle.phase, said, seconds=now - handle.since)
                    )
        return list(came.values())

    def _check(self) -> None:
        if self._watch.failure is not None:
            raise self._watch.failure
        if self._is_stopped:
            raise ExecutorError("the executor was stopped")

    def _fail_with_stacks(self, failure: RankFailure) -> RankFailure:
        """Settle on a failure, unless one is known already, and put the stacks of all ranks into the log."""
        self._watch.fail(failure)
        for handle in self._handles:
            # Before its first report a process has no handler yet, and the signal would end it.
            if handle.phase == "spawn" or handle.has_ended:
                continue
            print(f"stacks of rank {handle.spec.rank} (pid {handle.process.pid}):", file=sys.stderr, flush=True)
            with contextlib.suppress(ProcessLookupError):
                handle.process.send_signal(signal.SIGUSR1)
            time.sleep(_STACKS_SECONDS / len(self._handles))
        return self._watch.failure or failure

    def _end_of_a_rank(self) -> ExecutorError:
        """A ring is closed: the watch is about to know why."""
        deadline = time.monotonic() + 2.0
        while self._watch.failure is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self._watch.failure or ExecutorError("a rank closed its ring")

    def _hang(self, step_id: int) -> RankFailure:
        """Name who holds a step up, with the stacks of all ranks in the log."""
        states = read_board(self._board, len(self._handles))
        # A rank may be stopped while it waits: what the kernel says goes first.
        stopped = [state for state in states if "stopped" in _kernel_state(self._handles[state.rank])]
        blamed = stopped or suspects(states, step_id) or states
        first = self._handles[blamed[0].rank]
        others = [str(self._handles[state.rank].spec.rank) for state in blamed[1:]]
        what = f"did not finish step {step_id} within {self._timeout:.0f} s: {blamed[0]}{_kernel_state(first)}"
        what += f" (and ranks {', '.join(others)})" if others else ""
        waiting = [str(self.ranks[state.rank].rank) for state in states if state not in blamed]
        what += f"; ranks {', '.join(waiting)} wait" if waiting else ""
        return self._fail_with_stacks(
            RankFailure(first.spec, blamed[0].phase, what + "; stacks are in the log", seconds=blamed[0].seconds)
        )


def _spawn(setup: RankSetup, spec: RankSpec, command: Sequence[str], threads: int) -> RankHandle:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    process = subprocess.Popen(
        [*command, "--fd", str(theirs.fileno()), "--parent", str(os.getpid())],
        pass_fds=(theirs.fileno(), *setup.fds),
        stdin=subprocess.DEVNULL,
        env=_environment(os.environ, spec, threads),
    )
    theirs.close()
    setup.close()
    body = msgspec.msgpack.encode(setup)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died at once: the watch will say so
        ours.sendall(FRAME.pack(len(body), 0) + body)
    return RankHandle(spec, process, ours, os.pidfd_open(process.pid))


def _environment(base: Mapping[str, str], spec: RankSpec, threads: int) -> dict[str, str]:
    """Thread counts are read when torch is imported; a CPU rank must not see a GPU."""
    environment = {**base, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if spec.backend == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _kernel_state(handle: RankHandle) -> str:
    """Say it when the kernel keeps a process from running: stopped, traced, waiting for a disk."""
    with contextlib.suppress(OSError, IndexError):
        state = Path(f"/proc/{handle.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        names = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "in an uninterruptible wait"}
        return f", {names[state]}" if state in names else ""
    return ""
