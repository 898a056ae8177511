"""The pipeline as a Ray Compiled Graph, for those who ask for it: `executor: ray-cgraph`.

Same plans, same ranks' work, same tokens as the queue path; plans, tensors between stages and results go through Ray's
channels, so Ray is on the way of every step. Knows: the executor's contract. Refuses to know: Ray (`ray_graph`).

A failure names the rank that Ray blames. Ray does not tell which rank a late step waits for: there the queue path,
whose ranks have a board, knows more.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from engine.config import ConfigError, EngineConfig, load_model_config, resolve_model_folder
from engine.core.plan import AdmittedRow, ExecutionPlan, StepResult
from engine.core.sampling_params import SamplingParams
from engine.executor.base import ExecutorError
from engine.executor.messages import LoadedReport, PhaseReport
from engine.executor.ray_graph import RankGraph
from engine.executor.steps_in_flight import StepsInFlight
from engine.memory import kv_cache_groups
from engine.placement import Placement
from engine.usage import EngineUsage

_FLOAT_BYTES = 4
_ECHO_SECONDS = 3.0


class CompiledGraphExecutor:
    """The ranks of one engine behind a compiled graph. Methods and order as `MultiNodeExecutor`'s.

    Not for two threads at once. Raises: ConfigError for ranks on GPUs; ExecutorError from every method.
    """

    def __init__(
        self,
        config: EngineConfig,
        placement: Placement,
        *,
        dp_rank: int = 0,
        on_phase: Callable[[PhaseReport], None] = lambda _: None,
        on_nodes: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.ranks = placement.engine(dp_rank)
        if any(rank.backend != "cpu" for rank in self.ranks):
            raise ConfigError("executor", "ray-cgraph runs CPU ranks", "use the executor ray for GPUs")
        folder = resolve_model_folder(config.model)
        if folder is None:
            raise ConfigError("model", f"{config.model!r} is not on this node")
        self._model = load_model_config(folder)
        self._config = config
        self._on_phase = on_phase
        self._timeout = config.step_timeout_seconds
        self._steps = StepsInFlight(
            timeout_seconds=config.step_timeout_seconds, has_stages=placement.pipeline_parallel_size > 1
        )
        self._failure: ExecutorError | None = None
        self._callback: Callable[[ExecutorError], None] = lambda _: None
        self._is_stopped = False
        self._graph = RankGraph(config, placement, dp_rank, on_nodes)

    @property
    def num_in_flight(self) -> int:
        return len(self._steps)

    @property
    def pids(self) -> tuple[int, ...]:
        """None: ranks are Ray's processes."""
        return ()

    def on_failure(self, callback: Callable[[ExecutorError], None]) -> None:
        """See `Executor.on_failure`."""
        self._callback = callback
        if self._failure is not None:
            callback(self._failure)

    def wait_loaded(self) -> list[LoadedReport]:
        """Have all ranks read their weights; returns their reports in rank order."""
        for rank in self.ranks:
            self._on_phase(PhaseReport(rank.rank, "load"))
        loaded = self._graph.load()
        for rank in self.ranks:
            self._on_phase(PhaseReport(rank.rank, "load", 1.0))
        return loaded

    def allocate_kv(self, num_blocks: int) -> None:
        """Make the KV pools, and the graph over the ranks."""
        self._graph.allocate_kv(num_blocks)
        self._num_blocks = num_blocks
        tokens = self._config.scheduler.max_num_batched_tokens
        self._graph.compile(tokens * self._model.hidden_size * _FLOAT_BYTES, self._on_end)

    def warm_up(self) -> None:
        """Run a short prompt and one decode step through the graph."""
        for plan in _warm_up_plans(self._config, len(kv_cache_groups(self._model)), self._num_blocks):
            self.submit(plan)
            self.collect()

    def submit(self, plan: ExecutionPlan) -> None:
        """Write a plan into the graph."""
        self._check()
        with self._settling():
            self._graph.submit(self._steps.encode(plan))
        self._steps.add(plan)

    def collect(self) -> StepResult:
        """Wait for the oldest plan's result, at most for the step's deadline."""
        self._check()
        step_id, deadline = self._steps.oldest()
        with self._settling():
            body = self._graph.collect(max(0.0, deadline - time.monotonic()))
            if body is None:
                raise ExecutorError(
                    f"step {step_id} did not come out of the compiled graph within {self._timeout:.0f} s; "
                    f"Ray does not tell which rank holds it up: {self._graph.processes()}"
                )
        return self._steps.finish(body)

    def usage(self) -> EngineUsage:
        """Nothing: ranks are Ray's processes, and have no board."""
        return EngineUsage()

    def stop(self) -> None:
        """End all ranks and leave the Ray cluster. Idempotent."""
        if not self._is_stopped:
            self._is_stopped = True
            self._graph.close()
            self._steps.clear()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._is_stopped:
            raise ExecutorError("the executor was stopped")

    @contextlib.contextmanager
    def _settling(self) -> Iterator[None]:
        """Keep the first failure: what follows from it says less."""
        try:
            yield
        except ExecutorError as error:
            deadline = time.monotonic() + _ECHO_SECONDS
            # An echo has an origin, of which the watch is about to hear.
            while getattr(error, "is_echo", False) and self._failure is None and time.monotonic() < deadline:
                time.sleep(0.02)
            self._failure = self._failure or error
            raise self._failure from None

    def _on_end(self, how: str) -> None:
        if self._is_stopped or self._failure is not None:
            return
        self._failure = ExecutorError(how)
        self._callback(self._failure)


def _warm_up_plans(config: EngineConfig, num_groups: int, num_blocks: int) -> list[ExecutionPlan]:
    """A prompt of a few tokens, one decode step, and the row's release; nothing where the pool is too small."""
    if num_blocks <= num_groups:
        return []
    count = min(8, config.cache.block_size)
    row = AdmittedRow(
        row=0,
        generation=0,
        request_id="warm-up",
        token_ids=[0] * count,
        num_prompt_tokens=count,
        num_computed_tokens=0,
        block_ids=tuple([1 + group] for group in range(num_groups)),
        params=SamplingParams(temperature=0.0, max_tokens=2),
        seed=0,
        stop_token_ids=(),
    )
    return [
        ExecutionPlan(-3, [0], [count - 1], [True], admits=[row]),
        ExecutionPlan(-2, [0], [1], [True]),
        ExecutionPlan(-1, [], [], [], released=[0]),
    ]
