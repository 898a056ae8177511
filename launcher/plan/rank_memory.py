"""Expected memory of every rank of a placement, and what would make it fit where it does not.

Knows: budgets of GPUs and CPU ranks, which share belongs to whom. Refuses to know: how bytes are counted
(`engine.memory`), where inventories come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine.config import EngineConfig, ModelConfig
from engine.cpu_memory import HalfExact, cpu_memory
from engine.memory import (
    CPU_KV_CAP_BYTES,
    CPU_RUNTIME_BYTES,
    GPU_RUNTIME_BYTES,
    cpu_dtype,
    cpu_limits,
    gpu_activation_bytes,
)
from engine.placement import (
    HostSpec,
    Placement,
    PlacementError,
    PlacementOptions,
    RankSpec,
    find_sizes,
    place,
    shard,
)
from launcher.errors import DoesNotFit
from launcher.plan.fit import FitReport, Suggestion, limits_of, live_margin, rank_weight_bytes, report_fit
from launcher.plan.inventory import Inventory
from launcher.sizes import GIB


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Expected bytes of one rank. `kv_tokens` of one request at most; `max_full_requests` of full length at once.

    `held_bytes` are second layouts of weights, and tables, on a CPU; `load_bytes` are needed only while weights load.
    The pool holds no more than the `asked_requests` that may run at once.
    """

    rank: int
    device: str
    budget_bytes: int
    weight_bytes: int
    activation_bytes: int
    runtime_bytes: int
    kv_bytes: int
    num_blocks: int
    kv_tokens: int
    max_full_requests: float
    problem: str = ""
    held_bytes: int = 0
    load_bytes: int = 0
    asked_requests: int = 0

    @property
    def stored_bytes(self) -> int:
        """Weights in all their layouts."""
        return self.weight_bytes + self.held_bytes

    @property
    def required_bytes(self) -> int:
        serving = self.stored_bytes + self.activation_bytes + self.runtime_bytes + self.kv_bytes
        return max(serving, self.weight_bytes + self.load_bytes + self.runtime_bytes)

    @property
    def room_requests(self) -> int:
        """Requests of full length that the budget has room for, were as many asked; 0 where there is no cache."""
        if not self.num_blocks or self.max_full_requests <= 0:
            return 0
        free = self.budget_bytes - self.stored_bytes - self.activation_bytes - self.runtime_bytes
        if not self.device.startswith("cuda"):
            free = min(free, CPU_KV_CAP_BYTES)
        return max(0, int(free / (self.kv_bytes / self.max_full_requests)))

    @property
    def is_capped(self) -> bool:
        """Whether the pool is what was asked for, and memory has room for more."""
        return 0 < self.asked_requests <= self.max_full_requests and self.room_requests > self.asked_requests

    @property
    def fits(self) -> bool:
        return not self.problem


@dataclass(frozen=True, slots=True)
class Sizing:
    """What sizing needs beside the placement. `spare_bytes` stay free on unified memory."""

    config: EngineConfig
    model: ModelConfig
    inventories: Mapping[str, Inventory]
    folder: Path | None = None
    spare_bytes: int = 0

    def budget(self, rank: RankSpec, num_cpu_ranks: int) -> tuple[int, int, int]:
        """Give (bytes that a rank may take, bytes of its GPU in all, bytes that no suggestion counts on).

        CPU ranks share their node's free memory.
        """
        inventory = self.inventories[rank.node]
        if rank.backend != "cuda":
            budget = inventory.memory_available_bytes // max(1, num_cpu_ranks)
            return budget, 0, live_margin(inventory, budget)
        gpu = inventory.gpus[int(rank.device.partition(":")[2])]
        share = int(self.config.cache.gpu_memory_utilization * gpu.memory_bytes)
        free = gpu.free_bytes or gpu.memory_bytes
        if gpu.is_unified:
            free = inventory.memory_available_bytes - self.spare_bytes
        budget = max(0, min(share, free))
        return budget, gpu.memory_bytes, live_margin(inventory, budget, share)


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """All ranks' memory. `suggestions` are empty where everything fits, or where nothing helps."""

    ranks: tuple[RankMemory, ...]
    suggestions: tuple[Suggestion, ...] = ()

    @property
    def fits(self) -> bool:
        return all(rank.fits for rank in self.ranks)

    @property
    def max_full_requests(self) -> float:
        """Requests of full length that one engine holds at once: its tightest rank decides."""
        return min((rank.max_full_requests for rank in self.ranks if rank.num_blocks), default=0.0)


def report_memory(placement: Placement, sizing: Sizing) -> MemoryReport:
    """Size every rank. Ranks with equal shares and budgets are computed once."""
    known: dict[tuple[object, ...], tuple[RankMemory, FitReport | None]] = {}
    memory: list[RankMemory] = []
    worst: FitReport | None = None
    for rank in placement.ranks:
        same = [other for other in placement.on_node(rank.node) if other.backend != "cuda"]
        budget, total, margin = sizing.budget(rank, len(same))
        key = (_share(rank), rank.backend, budget, total, margin)
        if key not in known:
            known[key] = _size(rank, sizing, budget, total, margin)
        found, report = known[key]
        if report is not None and not report.fits and (worst is None or report.minimum_bytes > worst.minimum_bytes):
            worst = report
        memory.append(replace(found, rank=rank.rank, device=rank.device))
    return MemoryReport(_levelled(memory, placement), worst.suggestions if worst is not None else ())


def _levelled(memory: Sequence[RankMemory], placement: Placement) -> tuple[RankMemory, ...]:
    """Give all ranks of an engine as many blocks as its tightest one has: they follow the same block tables."""
    found: list[RankMemory] = []
    for engine in range(placement.data_parallel_size):
        ranks = [memory[rank.rank] for rank in placement.engine(engine)]
        cached = [rank for rank in ranks if rank.num_blocks]
        least = min(cached, key=lambda rank: rank.num_blocks, default=None)
        for rank in ranks:
            if least is None or not rank.num_blocks or not all(other.fits for other in ranks):
                found.append(rank)
                continue
            found.append(
                replace(
                    rank,
                    kv_bytes=rank.kv_bytes // rank.num_blocks * least.num_blocks,
                    num_blocks=least.num_blocks,
                    kv_tokens=least.kv_tokens,
                    max_full_requests=least.max_full_requests,
                )
            )
    return tuple(found)


def _share(rank: RankSpec) -> tuple[object, ...]:
    return rank.layers, rank.kv_heads, rank.mlp_units, rank.experts, rank.copied_experts, rank.vocab, rank.has_embedding


def _size(rank: RankSpec, sizing: Sizing, budget: int, total: int, margin: int) -> tuple[RankMemory, FitReport | None]:
    if rank.kv_heads[0] == rank.kv_heads[1]:
        return _without_cache(rank, sizing, budget), None
    report = report_fit(
        sizing.config, sizing.model, sizing.folder, budget, rank=rank, total_bytes=total, margin_bytes=margin
    )
    return memory_of(report, rank.rank, rank.device), report


def memory_of(report: FitReport, rank: int, device: str) -> RankMemory:
    """Name a fit's rank."""
    memory = report.memory
    tokens = int(memory.max_full_requests * report.limits.max_model_len) if memory.num_blocks else 0
    return RankMemory(
        rank=rank,
        device=device,
        budget_bytes=memory.budget_bytes,
        weight_bytes=memory.weight_bytes,
        activation_bytes=memory.activation_bytes,
        runtime_bytes=memory.runtime_bytes,
        kv_bytes=memory.kv_bytes,
        num_blocks=memory.num_blocks,
        kv_tokens=max(0, tokens),
        max_full_requests=max(0.0, memory.max_full_requests),
        problem="" if report.fits else report.cause(),
        held_bytes=memory.held_bytes,
        load_bytes=memory.load_bytes,
        asked_requests=report.limits.max_num_seqs,
    )


def _without_cache(rank: RankSpec, sizing: Sizing, budget: int) -> RankMemory:
    """A rank that owns no KV head: experts alone."""
    model, config = sizing.model, sizing.config
    is_gpu = rank.backend == "cuda"
    limits = limits_of(config, model)
    dtype = "bfloat16" if is_gpu else cpu_dtype(config.dtype)
    weights = rank_weight_bytes(
        model, rank, is_gpu=is_gpu, dtype=dtype, is_expanded=False, num_positions=limits.max_model_len
    )
    own = shard(model, rank)
    held = load = 0
    if is_gpu:
        activations = gpu_activation_bytes(own, limits.max_num_batched_tokens, limits.max_num_seqs)
    else:
        cpu = cpu_memory(own, cpu_limits(config, limits.max_model_len, dtype, False, HalfExact()))
        activations, held, load = cpu.activation_bytes, cpu.held_bytes, cpu.load_bytes
    memory = RankMemory(
        rank=rank.rank,
        device=rank.device,
        budget_bytes=budget,
        weight_bytes=weights,
        activation_bytes=activations,
        runtime_bytes=GPU_RUNTIME_BYTES if is_gpu else CPU_RUNTIME_BYTES,
        kv_bytes=0,
        num_blocks=0,
        kv_tokens=0,
        max_full_requests=0.0,
        held_bytes=held,
        load_bytes=load,
    )
    needed = memory.required_bytes
    problem = "" if needed <= budget else f"needs {needed / GIB:.1f} GiB, {budget / GIB:.1f} GiB are available"
    return replace(memory, problem=problem)


def ranks_do_not_fit(report: MemoryReport, suggestions: Sequence[Suggestion]) -> DoesNotFit:
    """Make the error of ranks that do not fit: the first of them, and what would fit."""
    first = next(rank for rank in report.ranks if not rank.fits)
    count = sum(not rank.fits for rank in report.ranks)
    who = f"rank {first.rank}" if count == 1 else f"{count} of {len(report.ranks)} ranks, rank {first.rank}"
    ways = "  or  ".join(str(suggestion) for suggestion in suggestions)
    needed = "larger or more GPUs" if first.device.startswith("cuda") else "more memory, or fewer ranks"
    hint = f"would fit: {ways}" if ways else f"no setting helps: this needs {needed}"
    return DoesNotFit(f"does not fit: {who} ({first.device}): {first.problem}", hint=hint)


def smallest_fitting_split(
    placement: Placement, sizing: Sizing, hosts: Sequence[HostSpec], options: PlacementOptions
) -> tuple[Suggestion, ...]:
    """Suggest the fewest ranks per engine, more than now, with which all of them would fit; none when none do."""
    now = placement.sizes
    try:
        tried = find_sizes(sizing.model, hosts, options, expert_parallel=now.expert_parallel, uses_all=False)
    except PlacementError:
        return ()
    larger = [sizes for sizes in tried if sizes.engine_ranks > now.engine_ranks]
    # One engine first: more of them are a wish, not a way to fit.
    larger.sort(key=lambda sizes: (sizes.engine_ranks, abs(sizes.data - now.data), -sizes.tensor))
    for sizes in larger:
        if report_memory(place(sizing.model, sizes, hosts, options, suggests=False), sizing).fits:
            asked = (
                ("tp", sizes.tensor, now.tensor),
                ("pp", sizes.pipeline, now.pipeline),
                ("dp", sizes.data, now.data),
            )
            return (Suggestion(tuple((key, str(size)) for key, size, old in asked if size != old)),)
    return ()
