"""The ranks of one engine as the actors of a Ray Compiled Graph: bound in a DAG, run by writing a plan into it.

    plan --> all ranks of stage 0 --tensors--> the same places of stage 1 --> ... --> the last stage's results

Knows: Ray's DAG and its channels. Refuses to know: plans and results, which are bytes here; scheduling.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from engine.config import EngineConfig
from engine.executor.base import ExecutorError
from engine.executor.messages import Kind, LoadedReport, decode_report
from engine.executor.ray_actor import ActorFacts
from engine.executor.ray_cluster import ActorWatch, RayCluster, describe_actor_end
from engine.executor.ray_environment import carried_environment
from engine.executor.ray_layout import lay_out
from engine.executor.ray_stage import StageActor, StageFault, StageOrder
from engine.placement import Placement, RankSpec

TIMEOUT_SECONDS = 300
"""Ray's own limits; the executor has a shorter one for each step."""
MAX_IN_FLIGHT = 16
_LOAD_SECONDS = 900.0
_KV_SECONDS = 120.0
_TEARDOWN_SECONDS = 2.5
_ENDED_SECONDS = 1.0
"""A graph's end, and after its actors were killed: within what a core gets to end (`core_process.STOP_SECONDS`)."""
_PLAN_BYTES = 1 << 20
Tell = Callable[[str], None]


class GraphFault(ExecutorError):
    """A step failed. `is_echo`: the fault is another rank's, which the graph's watch is about to name."""

    def __init__(self, message: str, *, is_echo: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.is_echo = is_echo


class RankGraph:
    """Actors for all ranks of an engine and, once `compile` was called, the graph over them."""

    def __init__(self, config: EngineConfig, placement: Placement, dp_rank: int, tell: Tell) -> None:
        """Check the cluster, take the placement's bundles, start an actor for each rank.

        Raises: RayRefused, ExecutorError.
        """
        # Read when Ray's DAG is imported; ten seconds by default, less than a long prefill.
        for name in ("get", "submit", "teardown"):
            os.environ.setdefault(f"RAY_CGRAPH_{name}_timeout", str(TIMEOUT_SECONDS))
        self._config, self._placement = config, placement
        self.ranks = placement.engine(dp_rank)
        self._stages = [placement.stage(dp_rank, pp) for pp in range(placement.pipeline_parallel_size)]
        nodes = config.nodes
        began = time.monotonic()
        deadline = began + nodes.placement_timeout_seconds
        layout = lay_out(placement, dp_rank, dict(zip(nodes.names, nodes.addresses, strict=False)))
        self._cluster = RayCluster(nodes.ray_address, nodes.head_host or config.node_address, layout)
        self._actors: list[Any] = []
        self._facts: list[ActorFacts] = []
        self._graph: Any = None
        self._in_flight: deque[Any] = deque()
        self._watch: ActorWatch | None = None
        try:
            self._cluster.await_resources(layout, deadline, tell)
            self._cluster.place(layout, f"hlaunch-graph-{os.getpid()}-{dp_rank}", deadline)
            self._actors = [self._cluster.start_actor(StageActor, layout, rank.node) for rank in self.ranks]
            looks = self._ask("look")
            self._facts = [msgspec.msgpack.decode(said, type=ActorFacts) for said in looks]
            for rank, facts in zip(self.ranks, self._facts, strict=True):
                wanted = layout.bundles[layout.index(rank.node)].address
                if wanted and facts.address != wanted:
                    raise ExecutorError(f"rank {rank.rank}: Ray runs it at {facts.address}, not at {wanted}")
            tell(f"Ray: {time.monotonic() - began:.1f} s (checked, connected, placed, an actor for each rank)")
        except BaseException:
            self.close()
            raise

    def load(self) -> list[LoadedReport]:
        """Have all ranks read their weights; returns their reports in rank order. Raises: ExecutorError."""
        stores = self._stores()
        config, placement = self._config.to_json(), self._placement.to_json()
        carried = carried_environment(os.environ)
        orders = [
            msgspec.msgpack.encode(StageOrder(config, placement, rank.rank, carried, stores.get(rank.pp_rank)))
            for rank in self.ranks
        ]
        reports = [decode_report(Kind.LOADED, body) for body in self._ask("load", orders, seconds=_LOAD_SECONDS)]
        return [report for report in reports if isinstance(report, LoadedReport)]

    def allocate_kv(self, num_blocks: int) -> None:
        """Make the KV pool on every rank. Raises: ExecutorError."""
        self._ask("allocate_kv", [num_blocks] * len(self._actors), seconds=_KV_SECONDS)

    def compile(self, tensor_bytes: int, on_end: Callable[[str], None]) -> None:
        """Bind the stages and compile the graph. `tensor_bytes` is the largest tensor that passes between two stages.

        `on_end` is told, from a thread, which rank's actor ended without being asked to, and how.
        """
        dag: Any = importlib.import_module("ray.dag")
        # Of a failure Ray's DAG logs every consequence with its trace; the cause comes from here.
        logging.getLogger("ray.dag").setLevel(logging.CRITICAL)
        with dag.InputNode() as plan:
            values: list[Any] = []
            for stage in self._stages:
                actors = [self._actors[self.ranks.index(rank)] for rank in stage]
                if values:
                    values = [actor.step.bind(plan, value) for actor, value in zip(actors, values, strict=True)]
                else:
                    values = [actor.step.bind(plan) for actor in actors]
            output = dag.MultiOutputNode(values)
        self._graph = output.experimental_compile(
            _submit_timeout=TIMEOUT_SECONDS,
            _buffer_size_bytes=tensor_bytes + _PLAN_BYTES,
            _max_inflight_executions=MAX_IN_FLIGHT,
        )
        # Each actor runs one task for as long as the graph lives: its end is the actor's.
        names = {
            actor: f"rank {rank.rank} (node {rank.node})" for actor, rank in zip(self._actors, self.ranks, strict=True)
        }
        running = {names[actor]: reference for actor, reference in self._graph.worker_task_refs.items()}
        self._watch = self._cluster.watch(running, lambda who, how: on_end(f"{who}: {how}"))

    def submit(self, plan: bytes) -> None:
        """Write a plan into the graph. Raises: ExecutorError."""
        with self._naming():
            self._in_flight.append(self._graph.execute(plan))

    def collect(self, timeout_seconds: float) -> bytes | None:
        """Take the oldest plan's result; None at the timeout. Raises: ExecutorError."""
        errors: Any = importlib.import_module("ray.exceptions")
        with self._naming():
            try:
                result = self._in_flight[0][0].get(timeout=timeout_seconds)
            except errors.RayChannelTimeoutError:
                return None
            self._in_flight.popleft()
            return bytes(result)

    def processes(self) -> str:
        """Say where each rank's process is, for whoever must look at them himself."""
        return ", ".join(
            f"rank {rank.rank} (process {facts.pid} at {facts.address})"
            for rank, facts in zip(self.ranks, self._facts, strict=True)
        )

    def close(self) -> None:
        """Take the graph down, end the actors, leave the cluster. Idempotent."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        if self._graph is not None:
            # The order is Ray's: actors that die inside a graph may take their raylet along. But one that hangs would
            # be waited for, so it has a few seconds.
            teardown = threading.Thread(target=_tear_down, args=(self._graph,), name="graph's end", daemon=True)
            teardown.start()
            teardown.join(_TEARDOWN_SECONDS)
            if teardown.is_alive():
                self._cluster.end_actors()
                teardown.join(_ENDED_SECONDS)
            self._graph = None
        # Results that nobody took are dropped after the graph: before, Ray would read on for them.
        self._in_flight.clear()
        self._cluster.close()

    def _stores(self) -> dict[int, tuple[str, int]]:
        """Where the ranks of each stage meet: at its first one."""
        firsts = {stage[0].pp_rank: self.ranks.index(stage[0]) for stage in self._stages if len(stage) > 1}
        asked = {f"stage {stage}": self._actors[index].open_store.remote() for stage, index in firsts.items()}
        answers = self._cluster.answers(asked)
        return {stage: tuple(answers[f"stage {stage}"]) for stage in firsts}

    def _ask(self, method: str, arguments: Sequence[Any] = (), *, seconds: float = 60.0) -> list[Any]:
        """Call a method of every actor, each with its own argument; returns the answers in rank order."""
        given: list[tuple[Any, ...]] = [(argument,) for argument in arguments] or [()] * len(self._actors)
        calls = {
            f"{rank.node} (rank {rank.rank})": getattr(actor, method).remote(*one)
            for rank, actor, one in zip(self.ranks, self._actors, given, strict=True)
        }
        return list(self._cluster.answers(calls, seconds).values())

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Turn what Ray raises into one line that names the rank."""
        errors: Any = importlib.import_module("ray.exceptions")
        try:
            yield
        except errors.RayActorError as error:
            dead = str(getattr(error, "actor_id", "") or "")
            who = [rank for rank, actor in zip(self.ranks, self._actors, strict=True) if actor._actor_id.hex() in dead]
            named = _named(who[0]) if who else "a rank"
            raise GraphFault(f"{named}: {describe_actor_end(error)}") from None
        except errors.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, StageFault):
                raise GraphFault(str(cause), is_echo=cause.is_echo) from None
            raise GraphFault(describe_actor_end(error), is_echo=isinstance(error, errors.RayChannelError)) from None


def _tear_down(graph: Any) -> None:
    errors: Any = importlib.import_module("ray.exceptions")
    with contextlib.suppress(errors.RayError):
        graph.teardown(kill_actors=True)


def _named(rank: RankSpec) -> str:
    return f"rank {rank.rank} (node {rank.node})"
