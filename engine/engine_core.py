"""The loop: scheduler and executor joined, without text and without sockets.

    plan = scheduler.plan(now); result = executor.execute(plan); outputs = scheduler.advance(result)

The overlapped loop makes plan k+1 while plan k computes; it has the same shape and stands beside the plain one.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import ConfigError, EngineConfig, ModelConfig, load_model_config, resolve_model_folder
from engine.core.request import EngineRequest, FinishReason, RequestOutput, SchedulerStats
from engine.core.scheduler import RequestRejected, Scheduler
from engine.executor.base import Executor, ExecutorError
from engine.executor.choice import open_executor, runs_in_process
from engine.memory import MemoryFit, kv_cache_groups
from engine.placement import Device, HostSpec, ParallelSizes, Placement, PlacementError, RankSpec, single_rank
from engine.placement import place as place_on_hosts
from engine.usage import EngineUsage

if TYPE_CHECKING:
    from engine.executor.node_starter import NodeStarter

PhaseReport = Callable[[str, str, float | None, str], None]


class OutOfMemoryPlan(ConfigError):
    """The model does not fit the memory at hand; nothing was allocated."""


@dataclass(frozen=True, slots=True)
class ServingFacts:
    """What the engine settled on at start: sizes in bytes and counts, for the launcher's summary and for tests."""

    max_model_len: int
    weight_bytes: int
    kv_bytes: int
    num_blocks: int
    block_size: int
    max_full_requests: float
    device: str
    device_name: str
    dtype: str


class EngineCore:
    """Serve one model on one placement: add requests, step, take outputs."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        executor: Executor,
        memory: MemoryFit,
        max_model_len: int,
        facts: ServingFacts,
        num_stages: int = 1,
    ) -> None:
        self.config = config
        self.model = model
        self.max_model_len = max_model_len
        self.facts = facts
        self.scheduler = Scheduler(
            config.scheduler,
            num_blocks=memory.num_blocks,
            block_size=memory.block_size,
            group_windows=tuple(group.window for group in kv_cache_groups(model)),
            max_model_len=max_model_len,
            hash_seed=secrets.token_bytes(16),
            num_stages=num_stages,
        )
        self.executor = executor
        self._num_stages = num_stages
        self.step = self._step_overlapped if config.scheduler.async_scheduling else self._step_plain
        if num_stages > 1:
            self.step = self._step_pipelined

    @classmethod
    def start(
        cls, config: EngineConfig, report: PhaseReport = lambda *_: None, starter: NodeStarter | None = None
    ) -> EngineCore:
        """Load the model, size the KV pool, warm up. `starter` brings ranks to life on nodes that join.

        Raises: ConfigError (and its kinds), CheckpointError; each names what, where and the fix.
        """
        report("load", "begin", 0.0, "")
        folder, model = open_model(config)
        max_model_len = config.max_model_len or model.max_position_embeddings
        if max_model_len > model.max_position_embeddings:
            raise ConfigError(
                "max_model_len",
                f"{max_model_len} is above the model's {model.max_position_embeddings} positions",
                f"use at most {model.max_position_embeddings}",
            )
        placement = place(config, model)
        if not runs_in_process(config, placement):
            _check_gpus(placement, placement.engine(config.data_parallel_rank))
            return cls._start_ranks(config, model, placement, max_model_len, report, starter)
        from engine.executor.inline import make_executor, make_worker

        worker = make_worker(config, model, placement.engine(config.data_parallel_rank)[0])
        worker.load(lambda fraction, detail: report("load", "progress", fraction, detail))
        report("load", "end", 1.0, f"{worker.weight_bytes / 2**20:.1f} MiB of weights from {folder.name}")

        report("kv", "begin", None, "")
        memory = worker.fit_memory(max_model_len)
        _check_fit(config, memory, max_model_len)
        worker.allocate_kv(memory.num_blocks)
        report("kv", "end", None, f"{memory.num_blocks} blocks, {memory.max_full_requests:.1f} full requests")

        report("warmup", "begin", None, "")
        worker.warm_up()
        report("warmup", "end", None, "")
        facts = ServingFacts(
            max_model_len=max_model_len,
            weight_bytes=worker.weight_bytes,
            kv_bytes=memory.kv_bytes,
            num_blocks=memory.num_blocks,
            block_size=memory.block_size,
            max_full_requests=memory.max_full_requests,
            device=placement.engine(config.data_parallel_rank)[0].device,
            device_name=worker.device_name,
            dtype=worker.dtype_name,
        )
        executor = make_executor(worker, overlapped=config.scheduler.async_scheduling)
        return cls(config, model, executor, memory, max_model_len, facts)

    @classmethod
    def _start_ranks(
        cls,
        config: EngineConfig,
        model: ModelConfig,
        placement: Placement,
        max_model_len: int,
        report: PhaseReport,
        starter: NodeStarter | None,
    ) -> EngineCore:
        """Do the same with ranks in processes of their own."""
        from engine.executor.multiproc_fit import LoadProgress, fit_ranks

        if config.has_other_nodes:
            report("nodes", "begin", None, "")
        executor = open_executor(
            config,
            placement,
            on_phase=LoadProgress(report),
            on_nodes=lambda line: report("nodes", "progress", None, line),
            starter=starter,
        )
        if config.has_other_nodes:
            report("nodes", "end", None, "")
        try:
            loaded = executor.wait_loaded()
            weight_bytes = sum(rank.weight_bytes for rank in loaded)
            report("load", "end", 1.0, f"{weight_bytes / 2**20:.1f} MiB of weights on {len(loaded)} ranks")
            report("kv", "begin", None, "")
            memory = fit_ranks(config, model, placement, executor.ranks, loaded, max_model_len)
            _check_fit(config, memory, max_model_len)
            executor.allocate_kv(memory.num_blocks)
            report("kv", "end", None, f"{memory.num_blocks} blocks, {memory.max_full_requests:.1f} full requests")
            report("warmup", "begin", None, "")
            executor.warm_up()
            report("warmup", "end", None, "")
            facts = ServingFacts(
                max_model_len=max_model_len,
                weight_bytes=weight_bytes,
                kv_bytes=memory.kv_bytes,
                num_blocks=memory.num_blocks,
                block_size=memory.block_size,
                max_full_requests=memory.max_full_requests,
                device=f"{executor.ranks[0].backend} ({placement.sizes})",
                device_name=loaded[0].device_name,
                dtype=loaded[0].dtype,
            )
            return cls(config, model, executor, memory, max_model_len, facts, placement.pipeline_parallel_size)
        except BaseException:
            executor.stop()
            raise

    def add(self, request: EngineRequest) -> RequestOutput | None:
        """Queue a request. A refusal, or the end of one that asks for no tokens, comes back as its only output."""
        try:
            return self.scheduler.add(request)
        except RequestRejected as error:
            return RequestOutput(
                request.request_id, [], finish_reason=FinishReason.ERROR, error=f"{error.code}: {error.message}"
            )

    def abort(self, request_id: str) -> None:
        self.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_unfinished or self.executor.num_in_flight > 0

    def stats(self) -> SchedulerStats:
        return self.scheduler.stats()

    def usage(self) -> EngineUsage:
        """What each rank does and holds; from any thread, until `stop`."""
        return self.executor.usage()

    def on_failure(self, callback: Callable[[ExecutorError], None]) -> None:
        """Have `callback` called, from any thread, when a rank fails, also while the loop waits for requests."""
        self.executor.on_failure(callback)

    def stop(self) -> None:
        self.executor.stop()

    def _step_plain(self) -> list[RequestOutput]:
        plan = self.scheduler.plan(time.monotonic())
        if plan is None:
            return []
        self.executor.submit(plan)
        return self.scheduler.advance(self.executor.collect())

    def _step_overlapped(self) -> list[RequestOutput]:
        plan = self.scheduler.plan(time.monotonic())
        if plan is not None:
            self.executor.submit(plan)
        # One plan computes while the next is made: collect once two are in flight, or when there is nothing to add.
        if self.executor.num_in_flight > 1 or (plan is None and self.executor.num_in_flight):
            return self.scheduler.advance(self.executor.collect())
        return []

    def _step_pipelined(self) -> list[RequestOutput]:
        # Each plan holds rows that no plan in flight samples: one plan per stage keeps all stages busy.
        while self.executor.num_in_flight < self._num_stages:
            plan = self.scheduler.plan(time.monotonic())
            if plan is None:
                break
            self.executor.submit(plan)
        if self.executor.num_in_flight:
            return self.scheduler.advance(self.executor.collect())
        return []


def _check_gpus(placement: Placement, ranks: Sequence[RankSpec]) -> None:
    """Refuse ranks on GPUs that are not here, before any of them starts; other nodes' look for themselves."""
    here = [rank for rank in ranks if rank.node == ranks[0].node and rank.backend == "cuda"]
    if not here:
        return
    from engine.device import count_gpus  # with torch, which this process does without where its ranks are CPUs

    wanted = max(1 + int(rank.device.partition(":")[2] or 0) for rank in here)
    if wanted > (found := count_gpus()):
        raise ConfigError(
            "device", f"{placement.sizes} needs cuda:{wanted - 1}, and {found} GPUs are here", "see nvidia-smi"
        )


def _check_fit(config: EngineConfig, memory: MemoryFit, max_model_len: int) -> None:
    if memory.max_full_requests < 1.0 and not config.cache.num_blocks:
        raise OutOfMemoryPlan(
            "memory",
            f"{memory.num_blocks} KV blocks hold no request of {max_model_len} tokens "
            f"(one needs {memory.blocks_per_full_request})",
            "lower max-model-len or max-num-batched-tokens, or give more memory",
        )


def import_worker(config: EngineConfig) -> None:
    """Load what an engine computes with, torch above all, if it does so in this process and not in ranks of its own."""
    with contextlib.suppress(ConfigError):  # `start` will say it
        if runs_in_process(config, place(config, open_model(config)[1])):
            import engine.executor.inline  # noqa: F401


def open_model(config: EngineConfig) -> tuple[Path, ModelConfig]:
    """Find the model's folder and read its shape.

    Raises: ConfigError naming where it was looked for.
    """
    folder = resolve_model_folder(config.model)
    if folder is None:
        raise ConfigError("model", f"{config.model!r} is neither a bundled model nor a folder with a config.json")
    return folder, load_model_config(folder)


def place(config: EngineConfig, model: ModelConfig) -> Placement:
    """Place the model as the configuration says, or by its sizes on this host.

    Raises: ConfigError when there is no such placement.
    """
    sizes = ParallelSizes(
        config.data_parallel_size,
        config.pipeline_parallel_size,
        config.tensor_parallel_size,
        config.enable_expert_parallel,
    )
    try:
        if config.placement:
            placement = Placement.from_json(config.placement)
        elif sizes.world > 1:
            backend = config.device.partition(":")[0]
            devices = tuple(Device(f"{backend}:{index}") for index in range(sizes.world))
            placement = place_on_hosts(model, sizes, [HostSpec("localhost", devices)])
        else:
            placement = _place_alone(config, model)
    except PlacementError as error:
        raise ConfigError("placement", error.message) from error
    if config.data_parallel_rank >= placement.data_parallel_size:
        raise ConfigError(
            "data_parallel_rank",
            f"{config.data_parallel_rank}: the placement has {placement.data_parallel_size} engines",
        )
    ranks = placement.engine(config.data_parallel_rank)
    nodes = sorted({rank.node for rank in ranks})
    if unknown := [node for node in nodes if node not in config.nodes.names]:
        if config.has_other_nodes:
            raise ConfigError(
                "placement", f"no node is called {unknown[0]}", f"nodes are {', '.join(config.nodes.names)}"
            )
        if len(nodes) > 1:
            raise ConfigError(
                "placement",
                f"the ranks of engine {config.data_parallel_rank} are on {', '.join(nodes)}, and only this node serves",
                "start them with: hlaunch up --nnodes",
            )
    if len(kinds := sorted({rank.backend for rank in ranks})) > 1:
        raise ConfigError(
            "placement", f"{placement.sizes}: ranks on {' and '.join(kinds)} do not serve together yet", "use one kind"
        )
    _check_built(placement)
    return placement


def _check_built(placement: Placement) -> None:
    """Refuse what a placement can say and no worker does. Raises: ConfigError naming it."""
    if placement.kv_links:
        links = ", ".join(f"{link.source_dp} to {link.target_dp}" for link in placement.kv_links)
        raise ConfigError(
            "placement", f"KV blocks that move between engines ({links}) are not built", "leave kv_links empty"
        )
    for rank in placement.ranks:
        if rank.copied_experts:
            experts = ", ".join(map(str, rank.copied_experts))
            raise ConfigError(
                "placement", f"copied experts ({experts} on rank {rank.rank}) are not built", "place each expert once"
            )


def _place_alone(config: EngineConfig, model: ModelConfig) -> Placement:
    return single_rank(
        node="localhost",
        device=config.device,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        intermediate_size=model.intermediate_size,
        num_experts=model.num_experts,
        num_query_heads=model.num_attention_heads,
        vocab_size=model.vocab_size,
    )
