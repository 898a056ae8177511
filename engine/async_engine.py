"""The engine's asyncio face: starts the core process, sends requests, hands outputs to their streams.

Knows: the core's lifetime, its frames, which stream a token belongs to. Refuses to know: text, HTTP, torch.

Errors: `EngineUnavailable` (loading, draining, dead, overloaded); its `code` is fixed, so that the server maps it.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, Protocol

from engine import ipc
from engine.config import ConfigError, EngineConfig, ModelConfig, load_model_config, resolve_model_folder
from engine.core.request import EngineRequest, FinishReason, RequestOutput, SchedulerStats
from engine.placement import Placement
from engine.process import ask_for_stacks, say, signal_name
from engine.usage import EngineUsage

PING_INTERVAL_SECONDS = 1.0
STOP_GRACE_SECONDS = 5.0
# The core itself looks after ranks in other processes, and must have the time to say which of them hangs.
RANK_GRACE_SECONDS = 5.0
ENGINE_DEAD = "engine_dead: the engine process ended"


class EngineState(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    """Some of several engines serve."""
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"


class EngineUnavailable(Exception):
    """The engine takes no request now. `code`: loading, draining, engine_dead or overloaded."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class RequestStream(Protocol):
    """Outputs of one request, in order; iteration ends after the one that carries a finish reason.

    `engine` is the data-parallel rank of the engine that has it.
    """

    request_id: str
    engine: int

    def __aiter__(self) -> AsyncIterator[RequestOutput]: ...

    async def __anext__(self) -> RequestOutput: ...

    def abort(self) -> None: ...


class EngineClient(Protocol):
    """What the HTTP server sees of an engine."""

    @property
    def model(self) -> ModelConfig: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def state(self) -> EngineState: ...

    @property
    def load_fraction(self) -> float: ...

    def submit(self, request: EngineRequest) -> RequestStream: ...

    def stats(self) -> SchedulerStats: ...

    def stats_by_engine(self) -> list[SchedulerStats]: ...

    def states_by_engine(self) -> list[EngineState]: ...

    def usage_by_engine(self) -> list[EngineUsage]: ...


class OutputStream:
    """The engine's `RequestStream`. Outputs that pile up behind a slow reader are merged into one."""

    def __init__(self, request_id: str, on_abort: Callable[[str], None], engine: int = 0) -> None:
        self.request_id = request_id
        self.engine = engine
        self._on_abort = on_abort
        self._pending: RequestOutput | None = None
        self._arrived = asyncio.Event()
        self._is_finished = False

    def put(self, output: RequestOutput) -> None:
        if self._pending is None:
            self._pending = output
        else:
            _merge(self._pending, output)
        self._arrived.set()

    def abort(self) -> None:
        """Stop generating and free the blocks. Idempotent; a finished request ignores it."""
        if not self._is_finished:
            self._is_finished = True
            self._on_abort(self.request_id)
            self._arrived.set()

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        while self._pending is None:
            if self._is_finished:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        output, self._pending = self._pending, None
        if output.finish_reason is not None:
            self._is_finished = True
        return output


def _merge(into: RequestOutput, new: RequestOutput) -> None:
    into.new_token_ids.extend(new.new_token_ids)
    if new.new_logprobs is not None:
        into.new_logprobs = (into.new_logprobs or []) + new.new_logprobs
    into.finish_reason = new.finish_reason
    into.error = new.error
    into.stop_token_id = new.stop_token_id
    if into.num_cached_tokens is None:
        into.num_cached_tokens = new.num_cached_tokens


PhaseCallback = Callable[[ipc.PhaseMessage], None]
FatalCallback = Callable[[ipc.FatalMessage], None]
StatsCallback = Callable[[SchedulerStats], None]


class AsyncEngine:
    """One engine core in a process of its own.

    Lifetime: `spawn` (cheap, before anything heavy is imported) → `run_reader` in the event loop → READY → `stop`.
    `on_phase`, `on_fatal` and `on_stats` are called from the event loop. `desk` is the core's way to other nodes, which
    it inherits.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_phase: PhaseCallback,
        on_fatal: FatalCallback,
        on_stats: StatsCallback = lambda _: None,
        desk: socket.socket | None = None,
    ) -> None:
        self.config = config
        folder = resolve_model_folder(config.model)
        if folder is None:
            raise ConfigError("model", f"{config.model!r} is neither a bundled model nor a checkpoint folder")
        self.folder = folder
        self.model = load_model_config(folder)
        self.max_model_len = config.max_model_len or self.model.max_position_embeddings
        self.state = EngineState.STARTING
        self.load_fraction = 0.0
        self.facts: dict[str, float | int | str] = {}
        self.ready = asyncio.Event()
        self.has_served = False
        """Whether it has answered a request to the end."""
        self._on_phase = on_phase
        self._on_fatal = on_fatal
        self._on_stats = on_stats
        self._streams: dict[str, OutputStream] = {}
        self._rank_in_core = _rank_in_core(config)
        self._stats = SchedulerStats()
        self._usage, self._usage_at = EngineUsage(), 0.0
        self._last_heard = time.monotonic()
        self._phase = "spawn"
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._fatal: ipc.FatalMessage | None = None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket = ours
        argv = [sys.executable, "-m", "engine.core_process", "--fd", str(theirs.fileno()), "--parent", str(os.getpid())]
        inherited = [theirs]
        if desk is not None:
            argv += ["--desk-fd", str(desk.fileno())]
            inherited.append(desk)
        # The main thread spawns: the kernel's parent-death signal follows the spawning thread.
        self._process = subprocess.Popen(argv, pass_fds=[end.fileno() for end in inherited], stdin=subprocess.DEVNULL)
        for end in inherited:
            end.close()
        ours.sendall(ipc.encode(ipc.Kind.CONFIG, config.to_json()))

    @property
    def core_pid(self) -> int:
        return self._process.pid

    @property
    def num_unfinished(self) -> int:
        return len(self._streams)

    def start(self) -> None:
        """Begin to read the core's frames; call once, from the event loop."""
        self._tasks = [asyncio.ensure_future(self._run_reader()), asyncio.ensure_future(self._run_watchdog())]

    def submit(self, request: EngineRequest) -> OutputStream:
        """Send a request to the core and return its stream.

        Raises: EngineUnavailable when the engine loads, drains, is dead, or holds as many requests as it may queue.
        """
        if self.state is EngineState.STARTING:
            raise EngineUnavailable("loading", "the model is still loading")
        if self.state is EngineState.DRAINING or self.state is EngineState.STOPPED:
            raise EngineUnavailable("draining", "the server is shutting down")
        if self.state is EngineState.FAILED or self._writer is None:
            raise EngineUnavailable("engine_dead", "the engine is not running")
        limits = self.config.scheduler
        if len(self._streams) >= limits.max_queue + limits.max_num_seqs:
            raise EngineUnavailable("overloaded", "the queue is full")
        if request.request_id in self._streams:
            raise ValueError(f"request id {request.request_id!r} is in use")
        frame = ipc.encode(ipc.Kind.ADD, request)
        stream = OutputStream(request.request_id, self._abort, self.config.data_parallel_rank)
        self._streams[request.request_id] = stream
        self._writer.write(frame)
        return stream

    def stats(self) -> SchedulerStats:
        return self._stats

    def stats_by_engine(self) -> list[SchedulerStats]:
        """The figures of each engine: one."""
        return [self._stats]

    def states_by_engine(self) -> list[EngineState]:
        """The state of each engine: one."""
        return [self.state]

    def usage_by_engine(self) -> list[EngineUsage]:
        """What the ranks of each engine do and hold: a second ago, or they are silent. Nothing of one that is down."""
        return [self._usage.aged(time.monotonic() - self._usage_at)]

    def begin_drain(self) -> None:
        """Take no new request; running ones go on."""
        if self.state is EngineState.READY or self.state is EngineState.STARTING:
            self.state = EngineState.DRAINING

    def abort_all(self, error: str) -> None:
        """End every open stream with an error and free its blocks."""
        for stream in list(self._streams.values()):
            request_id = stream.request_id
            stream.put(RequestOutput(request_id, [], finish_reason=FinishReason.ERROR, error=error))
            self._abort(request_id)

    async def stop(self) -> None:
        """End the core process; returns once it is gone."""
        if self.state is not EngineState.FAILED:
            self.state = EngineState.STOPPED
        for task in self._tasks:
            task.cancel()
        if self._writer is not None:
            self._writer.close()
        self._socket.close()
        deadline = time.monotonic() + STOP_GRACE_SECONDS
        while self._process.poll() is None:
            if time.monotonic() > deadline:
                self._process.kill()
                self._process.wait()
                break
            await asyncio.sleep(0.01)

    def _abort(self, request_id: str) -> None:
        if self._streams.pop(request_id, None) is not None and self._writer is not None:
            with contextlib.suppress(ConnectionError):
                self._writer.write(ipc.encode(ipc.Kind.ABORT, [request_id]))

    async def _run_reader(self) -> None:
        reader, writer = await asyncio.open_connection(sock=self._socket)
        self._writer = writer
        try:
            while True:
                length, kind = ipc.decode_header(await reader.readexactly(ipc.HEADER.size))
                self._handle(kind, ipc.decode(kind, await reader.readexactly(length)))
        except (asyncio.IncompleteReadError, ConnectionError):
            await self._on_core_gone()
        except Exception as error:  # noqa: BLE001 - the link's border: without a reader, streams would never end
            cause = str(error) or "the link to the core broke"
            self._fatal = ipc.FatalMessage(self._phase, type(error).__name__, cause)
            self._process.kill()
            await self._on_core_gone()

    def _handle(self, kind: ipc.Kind, body: Any) -> None:
        if kind is ipc.Kind.USAGE:
            # From a thread of the core: no sign that its loop goes on.
            if self.state is not EngineState.FAILED:
                self._usage, self._usage_at = body, time.monotonic()
            return
        self._last_heard = time.monotonic()
        if kind is ipc.Kind.OUTPUTS or kind is ipc.Kind.PONG:
            if body.stats is not None and self.state is not EngineState.FAILED:
                self._stats = body.stats
                self._on_stats(body.stats)
            for output in body.outputs:
                stream = self._streams.get(output.request_id)
                if stream is not None:
                    if output.finish_reason is not None:
                        del self._streams[output.request_id]
                        self.has_served |= output.finish_reason is not FinishReason.ERROR
                    stream.put(output)
        elif kind is ipc.Kind.PHASE:
            self._phase = body.phase
            if body.phase == "load" and body.fraction is not None:
                self.load_fraction = body.fraction
            self._on_phase(body)
        elif kind is ipc.Kind.READY:
            self.max_model_len = body.max_model_len
            self.facts = body.facts
            self._phase = "serve"
            if self.state is EngineState.STARTING:
                self.state = EngineState.READY
            self.ready.set()
        elif kind is ipc.Kind.FATAL:
            # One that was taken to hang, and was woken for its stacks, knows less than we do.
            self._fatal = self._fatal or body
            # The core still has ranks, perhaps on other nodes, to end: nobody waits for that.
            self._end_streams()

    def _end_streams(self) -> None:
        """End every stream with an error, and take no request any more."""
        if self.state is not EngineState.STOPPED:
            self.state = EngineState.FAILED
        for stream in list(self._streams.values()):
            stream.put(RequestOutput(stream.request_id, [], finish_reason=FinishReason.ERROR, error=ENGINE_DEAD))
        self._streams.clear()
        self.load_fraction = 0.0
        # What it counted stays true; what it held is gone.
        self._stats = replace(self._stats, num_running=0, num_waiting=0, num_used_blocks=0, num_cached_blocks=0)
        self._usage = EngineUsage()

    async def _on_core_gone(self) -> None:
        if self.state is EngineState.STOPPED:
            return
        self._end_streams()
        deadline = time.monotonic() + STOP_GRACE_SECONDS
        while (code := self._process.poll()) is None and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        how = _describe_exit(code) + self._with_rank()
        self._on_fatal(self._fatal or ipc.FatalMessage(self._phase, "EngineDied", how, exit_code=1))

    def _with_rank(self) -> str:
        """Say which rank is lost with the core, and in which phase."""
        with_it = f", and {self._rank_in_core} with it" if self._rank_in_core else ""
        return f"{with_it}; phase {self._phase}"

    async def _run_watchdog(self) -> None:
        """Ping the core while it serves; a core silent for `step_timeout_seconds` dumps its stacks and is killed."""
        await self.ready.wait()
        self._last_heard = time.monotonic()
        limit = self.config.step_timeout_seconds
        if not self._rank_in_core:
            limit += RANK_GRACE_SECONDS
        interval = min(PING_INTERVAL_SECONDS, limit / 4)
        number = 0
        while self._process.poll() is None:
            began = time.monotonic()
            await asyncio.sleep(interval)
            late = time.monotonic() - began - interval
            if late > interval:
                # This process stood still (a paused container, say), and the core perhaps with it.
                self._last_heard += late
            number += 1
            if self._writer is not None:
                self._writer.write(ipc.encode(ipc.Kind.PING, number))
            silent = time.monotonic() - self._last_heard
            if silent > limit:
                self._fatal = self._fatal or ipc.FatalMessage(
                    self._phase,
                    "EngineHung",
                    f"the engine core (pid {self._process.pid}) gave no sign of life for {silent:.0f} s"
                    f"{self._with_rank()}; its stacks are in the log",
                )
                # Before it is woken for its stacks: what it says then comes too late.
                self._end_streams()
                if why_not := await asyncio.to_thread(ask_for_stacks, self._process.pid):
                    say(f"the engine core shows no stacks: {why_not}")
                await asyncio.sleep(0.5)
                self._process.kill()
                return


def _rank_in_core(config: EngineConfig) -> str:
    """Name the rank that computes in the core's own process; empty where ranks are processes of their own."""
    index = config.data_parallel_rank
    if not config.placement:
        is_alone = config.tensor_parallel_size * config.pipeline_parallel_size == 1
        return f"rank {index} (node localhost, {config.device})" if is_alone else ""
    rank = Placement.from_json(config.placement).only_rank(index, config.core_node)
    return "" if rank is None else f"rank {rank.rank} (node {rank.node}, {rank.device})"


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "the engine core closed its socket but did not exit"
    if code < 0:
        name = signal_name(-code)
        return f"the engine core was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"the engine core exited with code {code}"
