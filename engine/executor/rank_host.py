"""The ranks of one engine on one node: their processes, and the memory through which plans reach them.

Knows: how to start, feed, examine and end ranks of this host. Refuses to know: other nodes, scheduling, whose fault a
failure is. The engine core holds one for its own node, and each node host one for its.

Ranks are spawned, never forked, from a thread that lives as long as they do (the kernel's parent-death signal follows
the spawning thread), and hold only descriptors without names: however this process ends, no process, no file and no
segment is left.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from engine.comm.board import Activity, RankState, read_board
from engine.comm.ring import RingError, RingReader, RingWriter
from engine.config import EngineConfig
from engine.executor.messages import Kind, Report
from engine.executor.multiproc_rank import FRAME
from engine.executor.multiproc_watch import RankHandle, RankWatch
from engine.executor.multiproc_wiring import RankSetup, Wiring
from engine.executor.rank_line import KERNEL_STATES, RankLine
from engine.placement import Placement, RankSpec
from engine.process import LastingThread, say, threads_per_rank, wake_for_stacks, why_no_stacks

RANK_COMMAND = (sys.executable, "-m", "engine.executor.multiproc_rank")
STOP_SECONDS = 5.0
_STACKS_SECONDS = 0.3
_HELD_SECONDS = 1.0
_SECRETS = ("HLAUNCH_NODE_SECRET", "HLAUNCH_API_KEY", "RAY_AUTH_")
"""What proves a node, a client or a driver, or says where that lies: how the names of such variables begin."""


class RankHost:
    """The ranks `local` of engine `dp_rank`, on this node. Make it, then `spawn`.

    `config.node_address` is this node's address, to which ranks bind that meet others over TCP at `store`.
    """

    def __init__(
        self,
        config: EngineConfig,
        placement: Placement,
        dp_rank: int,
        local: Sequence[RankSpec],
        command: Sequence[str] = RANK_COMMAND,
    ) -> None:
        self.ranks = tuple(local)
        self._threads = config.cpu_threads or threads_per_rank(len(placement.on_node(local[0].node)))
        self._command = command
        config = replace(config, cpu_threads=self._threads)
        self._wiring = Wiring(placement.engine(dp_rank), local, config, placement.to_json())
        self._handles: list[RankHandle] = []
        self._parent: LastingThread | None = None
        self._watch: RankWatch | None = None
        self._plans: RingWriter | None = None
        self.results: RingReader | None = None
        """Where the answering rank's results come, when it is one of these."""
        self._is_stopped = False

    @property
    def needs_store(self) -> bool:
        """Whether ranks of the engine meet over TCP, here or elsewhere."""
        return self._wiring.needs_store

    @property
    def store(self) -> tuple[str, int] | None:
        """Where they meet, when a rank of this node keeps the store, or once `spawn` was told."""
        return self._wiring.store

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids, in rank order."""
        return tuple(handle.process.pid for handle in self._handles)

    def spawn(self, on_report: Callable[[Report], None], store: tuple[str, int] | None = None) -> None:
        """Start all ranks. `on_report` is called from a thread of its own with everything that they report."""
        wiring = self._wiring
        if store is not None and wiring.store is None:
            wiring.meet_at(store)
        self._parent = LastingThread(self._spawn_all, "parent of ranks")
        try:
            self._parent.wait()
            self._plans = RingWriter(wiring.plans)
            self.results = RingReader(wiring.results) if wiring.results is not None else None
        except BaseException:
            with contextlib.suppress(Exception):  # a signal may have ended the wait, and not the work
                self._parent.wait()
            self._parent.close()
            for handle in self._handles:
                handle.process.kill()
                handle.process.wait()
                handle.control.close()
                os.close(handle.pidfd)
            self._handles.clear()
            raise
        self._watch = RankWatch(self._handles, on_report)

    def _spawn_all(self) -> None:
        for spec in self.ranks:
            self._handles.append(_spawn(self._wiring.setups.pop(0), spec, self._command, self._threads))

    def write(self, body: bytes, kind: Kind, timeout_seconds: float) -> None:
        """Give a message to all ranks. Raises: RingTimeout while they read nothing, RingError when they are gone."""
        if self._plans is None:
            raise RingError("the ranks were not started")
        self._plans.write(body, kind, timeout_seconds=timeout_seconds)

    def lines(self) -> list[RankLine]:
        """Read what each rank does at this moment."""
        if not self._handles or self._is_stopped:
            return [RankLine(spec, RankState(spec.rank, "spawn", Activity.IDLE, 0, 0, 0.0)) for spec in self.ranks]
        states = read_board(self._wiring.board.view, [handle.spec.rank for handle in self._handles])
        lines, now = [], time.monotonic()
        for handle, state in zip(self._handles, states, strict=True):
            if (kernel := _kernel_state(handle)) != handle.kernel:
                handle.kernel, handle.kernel_since = kernel, now
            lines.append(RankLine(handle.spec, state, kernel, now - handle.kernel_since if kernel else 0.0))
        return lines

    def dump_stacks(self) -> None:
        """Put the stacks of all ranks into the log, or what keeps a rank from writing them.

        Takes about a third of a second, and one more if the kernel holds ranks, however many: the engine's own watchdog
        gives a core that names a hang seconds. Ranks that were stopped go on for that: whoever calls this is about to
        end them.
        """
        asked = []
        for handle in self._handles:
            # Before its first report a process has no handler yet, and the signal would end it.
            if not handle.has_spoken or handle.has_ended:
                continue
            say(f"stacks of rank {handle.spec.rank} (pid {handle.process.pid}):")
            if wake_for_stacks(handle.process.pid):
                asked.append(handle)
            time.sleep(_STACKS_SECONDS / len(self._handles))
        deadline = time.monotonic() + _HELD_SECONDS
        for handle in asked:
            if why_not := why_no_stacks(handle.process.pid, deadline):
                say(f"rank {handle.spec.rank} has none to show: {why_not}")

    def begin_stop(self) -> None:
        """Ask all ranks to end."""
        if self._plans is not None:
            with contextlib.suppress(RingError):
                self._plans.write(b"", Kind.STOP, timeout_seconds=1.0)

    def stop(self, grace_seconds: float = 0.0) -> None:
        """Give ranks that were asked to end the time to, kill the others, give everything back. Idempotent.

        Returns once no process is left.
        """
        if self._is_stopped:
            return
        self._is_stopped = True
        deadline = time.monotonic() + grace_seconds
        for handle in self._handles:
            with contextlib.suppress(subprocess.TimeoutExpired):
                handle.process.wait(max(0.0, deadline - time.monotonic()))
        for handle in self._handles:
            handle.process.kill()
        for handle in self._handles:
            handle.process.wait()
        if self._parent is not None:
            self._parent.close()
        if self._watch is not None:
            self._watch.stop()
        for handle in self._handles:
            handle.control.close()
            os.close(handle.pidfd)
        if self._plans is None:
            self._wiring.close()
            return
        self._plans.close()
        if self.results is not None:
            self.results.close()
        self._wiring.board.close()


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
    """Thread counts are read when torch is imported; a CPU rank must not see a GPU; no rank needs a secret of ours."""
    environment = {name: value for name, value in base.items() if not name.startswith(_SECRETS)}
    environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if spec.backend == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _kernel_state(handle: RankHandle) -> str:
    """Say it when the kernel keeps a process from running: stopped, traced, waiting for a disk."""
    with contextlib.suppress(OSError, IndexError):
        state = Path(f"/proc/{handle.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return KERNEL_STATES.get(state, "")
    return ""
