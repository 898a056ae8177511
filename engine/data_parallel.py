"""One or several engines behind one face: each request goes to one of them, and one that dies is started anew.

Knows: which engine serves, when to try again, the desk at which other nodes join. Refuses to know: how the choice is
made (`engine.core.load_balancer`), text, HTTP, torch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from engine import ipc
from engine.async_engine import AsyncEngine, EngineState, EngineUnavailable, FatalCallback, OutputStream, PhaseCallback
from engine.config import ConfigError, EngineConfig
from engine.core.load_balancer import LoadBalancer
from engine.core.request import EngineRequest, SchedulerStats
from engine.placement import Placement, PlacementError
from engine.process import say, threads_per_rank
from engine.restarts import Restarts
from engine.usage import EngineUsage

if TYPE_CHECKING:
    from engine.node_desk import NodeDesk

EXIT_GAVE_UP = 70
RESTART_PHASE = "restart"
"""What the status pipe is told while an engine that served is started again."""


def num_engines(config: EngineConfig) -> int:
    """Count the data-parallel engines of a configuration. Raises: ConfigError on a placement that is none."""
    if not config.placement:
        return config.data_parallel_size
    try:
        return Placement.from_json(config.placement).data_parallel_size
    except PlacementError as error:
        raise ConfigError("placement", error.message) from error


def open_desk(config: EngineConfig) -> NodeDesk | None:
    """Open the address at which other nodes join, if they do so by themselves. Raises: ConfigError."""
    if not config.has_other_nodes or config.executor not in ("auto", "multinode"):
        return None
    from engine.node_desk import NodeDesk

    return NodeDesk(config)


class DataParallelEngine:
    """As many cores as the placement has engines, seen as one `EngineClient`.

    Ready once all have started; an engine that cannot start the first time ends everything, since the next could not
    either. Later one that dies ends its own requests only, and is started again as `Restarts` has it, at most
    `max_restarts` times in 10 minutes; then it waits for these to pass, and `on_fatal` is called when all do. Raises:
    ConfigError when the model is nowhere, or other nodes cannot be let in.
    """

    def __init__(self, config: EngineConfig, on_phase: PhaseCallback, on_fatal: FatalCallback) -> None:
        count = num_engines(config)
        threads = config.cpu_threads
        if config.device == "cpu" and not config.has_several_ranks and not threads:
            threads = threads_per_rank(count)
        self.config = config
        self.ready = asyncio.Event()
        self._configs = [replace(config, data_parallel_rank=rank, cpu_threads=threads) for rank in range(count)]
        self._on_phase = on_phase
        self._on_fatal = on_fatal
        self._balancer = LoadBalancer(count, config.cache.block_size, float(config.scheduler.max_num_seqs))
        self._restarts = [Restarts(config.max_restarts) for _ in range(count)]
        self._has_been_ready = False
        self._is_ending = False
        self._restarting: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._desk = open_desk(config)
        self.engines = [self._spawn(rank) for rank in range(count)]
        self.folder = self.engines[0].folder
        self.model = self.engines[0].model

    @property
    def max_model_len(self) -> int:
        return min(engine.max_model_len for engine in self.engines)

    @property
    def state(self) -> EngineState:
        """READY while all engines serve, DEGRADED while some do, once all have."""
        states = self.states_by_engine()
        for state in (EngineState.STOPPED, EngineState.DRAINING):
            if state in states:
                return state
        if not self._has_been_ready:
            return EngineState.FAILED if EngineState.FAILED in states else EngineState.STARTING
        if EngineState.READY in states:
            return EngineState.READY if len(set(states)) == 1 else EngineState.DEGRADED
        return EngineState.STARTING if not self._is_given_up else EngineState.FAILED

    @property
    def load_fraction(self) -> float:
        return min(engine.load_fraction for engine in self.engines)

    @property
    def facts(self) -> dict[str, float | int | str]:
        """The first engine's figures; bytes and blocks of all together."""
        facts: dict[str, float | int | str] = {**self.engines[0].facts}
        if len(self.engines) > 1:
            facts["engines"] = len(self.engines)
        for name in ("weight_bytes", "kv_bytes", "num_blocks"):
            facts[name] = sum(int(engine.facts.get(name, 0)) for engine in self.engines)
        return facts

    @property
    def num_unfinished(self) -> int:
        return sum(engine.num_unfinished for engine in self.engines)

    @property
    def core_pids(self) -> tuple[int, ...]:
        return tuple(engine.core_pid for engine in self.engines)

    def start(self) -> None:
        """Begin to read the cores' frames; call once, from the event loop."""
        for engine in self.engines:
            engine.start()
        self._watch(self._await_all())

    def submit(self, request: EngineRequest) -> OutputStream:
        """Send a request to the engine that suits it best and has room. Raises: EngineUnavailable, as an engine's."""
        for load, engine in zip(self._balancer.loads, self.engines, strict=True):
            load.is_available = self._has_been_ready and engine.state is EngineState.READY
            load.in_flight = engine.num_unfinished
        route = self._balancer.route(request)
        refusal: EngineUnavailable | None = None
        for rank in route.engines:
            try:
                stream = self.engines[rank].submit(request)
            except EngineUnavailable as error:
                refusal = refusal or error
                continue
            self._balancer.record(route, rank)
            return stream
        if refusal is not None:
            raise refusal
        state = self.state
        if state is EngineState.STARTING:
            raise EngineUnavailable("loading", "the model is still loading")
        if state is EngineState.FAILED:
            raise EngineUnavailable("engine_dead", "no engine is running")
        raise EngineUnavailable("draining", "the server is shutting down")

    def stats(self) -> SchedulerStats:
        """The sum of all engines' figures."""
        total = SchedulerStats()
        for stats in self.stats_by_engine():
            for item in fields(stats):
                setattr(total, item.name, getattr(total, item.name) + getattr(stats, item.name))
        return total

    def stats_by_engine(self) -> list[SchedulerStats]:
        """The figures of each engine, in the order of their data-parallel ranks."""
        return [engine.stats() for engine in self.engines]

    def states_by_engine(self) -> list[EngineState]:
        """The state of each engine, in the order of their data-parallel ranks."""
        return [engine.state for engine in self.engines]

    def usage_by_engine(self) -> list[EngineUsage]:
        """What the ranks of each engine do and hold, in the order of their data-parallel ranks."""
        return [usage for engine in self.engines for usage in engine.usage_by_engine()]

    def begin_drain(self) -> None:
        """Take no new request; running ones go on."""
        self._is_ending = True
        for engine in self.engines:
            engine.begin_drain()

    def abort_all(self, error: str) -> None:
        """End every open stream with an error."""
        for engine in self.engines:
            engine.abort_all(error)

    async def stop(self) -> None:
        """End all cores and let the other nodes go; returns once that is done. Raises: what one of the cores raised."""
        self._is_ending = True
        for task in list(self._tasks):
            task.cancel()
        try:
            ends = await asyncio.gather(*(engine.stop() for engine in self.engines), return_exceptions=True)
        finally:
            if self._desk is not None:
                self._desk.close()
        for end in ends:
            if end is not None:
                raise end

    @property
    def _is_given_up(self) -> bool:
        """Whether no engine serves, nor will soon."""
        return all(restarts.is_given_up for restarts in self._restarts)

    def _spawn(self, rank: int) -> AsyncEngine:
        return AsyncEngine(
            self._configs[rank],
            self._on_phase,
            lambda message: self._on_engine_fatal(rank, message, has_served=self.engines[rank].has_served),
            self._on_stats(rank),
            self._desk.open_channel(rank) if self._desk is not None else None,
        )

    def _on_stats(self, rank: int) -> Callable[[SchedulerStats], None]:
        return lambda stats: self._balancer.loads[rank].update(stats)

    async def _await_all(self) -> None:
        await asyncio.gather(*(engine.ready.wait() for engine in self.engines))
        self._has_been_ready = True
        self.ready.set()

    def _on_engine_fatal(self, rank: int, message: ipc.FatalMessage, *, has_served: bool) -> None:
        named = replace(message, message=f"engine {rank}: {message.message}") if len(self.engines) > 1 else message
        if self._is_ending or not self._has_been_ready:
            self._on_fatal(named)
            return
        self._balancer.forget(rank)
        restarts, limit = self._restarts[rank], self.config.max_restarts
        often = f"{limit} restart{'s' * (limit != 1)} in 10 minutes"
        wait = restarts.next_wait(time.monotonic(), has_served=has_served)
        if self._is_given_up:
            tried = f"it is given up after {often}" if limit else "it is not to be started again"
            self._on_fatal(replace(named, message=f"{named.message}; {tried}", exit_code=EXIT_GAVE_UP))
            return
        # First what matters: whoever is told of it may be gone.
        self._restarting.add(rank)
        if wait is None:
            said = f"{named.message}; it is not to be started again"
        else:
            self._watch(self._restart(rank, wait))
            after = f", after {often}" if restarts.is_given_up else ""
            said = f"{named.message}; it is started again in {wait:.0f} s{after}"
        self._on_phase(ipc.PhaseMessage(RESTART_PHASE, "begin", None, said))
        say(f"{time.strftime('%H:%M:%S')} {said}")

    async def _restart(self, rank: int, backoff_seconds: float) -> None:
        await asyncio.gather(self.engines[rank].stop(), asyncio.sleep(backoff_seconds))
        if self._is_ending:
            return
        self._restarts[rank].begin()
        try:
            self.engines[rank] = engine = self._spawn(rank)
            engine.start()
            self._watch(self._tell_when_ready(rank, engine))
        except Exception as error:  # noqa: BLE001 - no process, no memory, no folder: one more failed start
            message = ipc.FatalMessage("spawn", type(error).__name__, f"it cannot be started again: {error}")
            self._on_engine_fatal(rank, message, has_served=False)

    async def _tell_when_ready(self, rank: int, engine: AsyncEngine) -> None:
        """End the phase once the last engine that was lost serves again."""
        await engine.ready.wait()
        self._restarting.discard(rank)
        if not self._restarting:
            self._on_phase(ipc.PhaseMessage(RESTART_PHASE, "end", None, "serves again"))
            say(f"{time.strftime('%H:%M:%S')} serves again")

    def _watch(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        # The loop keeps only weak references to tasks.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
