"""Does it fit, and what would make it fit: the launcher's view of `engine.memory`.

Knows: which limits can be traded for memory. Refuses to know: how bytes are counted (`engine.memory`, shared with the
engine, so that the preview and the allocation cannot drift apart) and where the budget comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from engine.config import EngineConfig, ModelConfig
from engine.cpu_memory import CpuMemory, HalfExact, cpu_memory
from engine.exactness import half_exact_of
from engine.memory import (
    DTYPE_BYTES,
    MemoryFit,
    checkpoint_bytes,
    cpu_dtype,
    cpu_limits,
    fit,
    gpu_weight_bytes,
    loaded_weight_bytes,
    model_bytes,
    share_block_bytes,
    should_expand_experts,
)
from engine.placement import RankSpec, embedding_rows, shard
from launcher.plan.inventory import Inventory
from launcher.sizes import GIB

MAX_SHARE = 0.97
"""Largest gpu-memory-utilization to suggest: drivers keep a little for themselves."""

LIVE_MARGIN_BYTES = 256 << 20
"""Most that suggestions leave of memory that is free just now: seconds later a little less may be."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The settings that decide memory. Units: tokens, requests, bytes; 0 bytes lets the budget size the KV pool."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    kv_cache_bytes: int
    num_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Settings that together would fit: registry key -> value as the registry takes it."""

    settings: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return " ".join(f"--set {key}={value}" for key, value in self.settings)


@dataclass(frozen=True, slots=True)
class FitReport:
    """The fit of one rank with what led to it. `full_request_bytes` is the KV of one request of full length.

    `minimum_bytes`: what the budget must hold to serve one of them, which is no longer than the model takes.
    """

    memory: MemoryFit
    minimum_bytes: int
    limits: Limits
    checkpoint_bytes: int
    is_from_files: bool
    dtype: str
    kv_dtype: str
    is_expanded: bool
    suggestions: tuple[Suggestion, ...]
    is_gpu: bool = False
    cpu: CpuMemory | None = None

    @property
    def fits(self) -> bool:
        return self.memory.fits

    @property
    def full_request_bytes(self) -> int:
        return self.memory.blocks_per_full_request * self.memory.kv_block_bytes

    def cause(self) -> str:
        """Say in one line why it does not fit."""
        memory = self.memory
        fixed = memory.fixed_bytes
        loading = memory.weight_bytes + memory.load_bytes + memory.runtime_bytes
        if loading > max(fixed, memory.budget_bytes):
            return (
                f"reading the weights takes {loading / GIB:.1f} GiB for a moment, "
                f"{memory.budget_bytes / GIB:.1f} GiB are available"
            )
        if fixed > memory.budget_bytes:
            return (
                f"weights, activations and runtime need {fixed / GIB:.1f} GiB, "
                f"{memory.budget_bytes / GIB:.1f} GiB are available"
            )
        if memory.required_bytes > memory.budget_bytes:
            left = (memory.budget_bytes - fixed) / GIB
            return (
                f"the KV cache of {memory.kv_bytes / GIB:.2f} GiB is above the {left:.2f} GiB left beside the weights"
            )
        return (
            f"the KV cache of {memory.kv_bytes / GIB:.2f} GiB holds no request of {self.limits.max_model_len} tokens "
            f"(one needs {self.full_request_bytes / GIB:.2f} GiB)"
        )


def live_margin(inventory: Inventory, budget_bytes: int, share_bytes: int = 0) -> int:
    """Give the bytes of a budget that suggestions leave alone: some, where it is what this host has free just now.

    `share_bytes` of a GPU were asked: a budget that reaches them does not depend on the moment.
    """
    if not inventory.is_this_host or 0 < share_bytes <= budget_bytes:
        return 0
    return min(LIVE_MARGIN_BYTES, budget_bytes // 50)


def limits_of(config: EngineConfig, model: ModelConfig) -> Limits:
    """Read the limits out of an engine configuration, with the model's own where that leaves them open."""
    return Limits(
        max_model_len=config.max_model_len or model.max_position_embeddings,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        block_size=config.cache.block_size,
        kv_cache_bytes=config.cache.kv_cache_bytes,
        num_blocks=config.cache.num_blocks,
    )


def report_fit(
    config: EngineConfig,
    model: ModelConfig,
    folder: Path | None,
    budget_bytes: int,
    *,
    rank: RankSpec | None = None,
    total_bytes: int = 0,
    margin_bytes: int = 0,
) -> FitReport:
    """Fit one rank whose budget is `budget_bytes`: `rank`'s share, else the whole model on `config.device`.

    `folder` None counts the checkpoint from the shape alone. `total_bytes` of a GPU lets the report suggest a larger
    share of it. What is suggested leaves `margin_bytes` of the budget if it can. Raises: ConfigError when a safetensors
    header on disk is malformed.
    """
    is_gpu = (rank.device if rank is not None else config.device).startswith("cuda")
    dtype = "bfloat16" if is_gpu else cpu_dtype(config.dtype)
    kv_dtype = dtype if is_gpu or config.cache.dtype == "auto" else config.cache.dtype
    on_disk = sum(checkpoint_bytes(folder).values()) if folder is not None else 0
    limits = limits_of(config, model)
    own = model if rank is None else shard(model, rank)
    block_bytes = None
    if rank is not None:
        heads = rank.kv_heads[1] - rank.kv_heads[0]
        block_bytes = share_block_bytes(model, rank.layers, heads, limits.block_size, kv_dtype)
    is_expanded = not is_gpu and should_expand_experts(own, dtype, budget_bytes)
    half_exact = HalfExact() if is_gpu else half_exact_of(config, model, folder)

    def cpu_of(tried: Limits) -> CpuMemory | None:
        if is_gpu:
            return None
        wanted = cpu_limits(config, tried.max_model_len, kv_dtype, is_expanded, half_exact)
        seqs, tokens = tried.max_num_seqs, tried.max_num_batched_tokens
        return cpu_memory(own, replace(wanted, max_num_seqs=seqs, max_num_batched_tokens=tokens))

    def fit_in(bytes_in_all: int, tried: Limits) -> MemoryFit:
        # The rotary table is as long as the context, so weights are counted anew for each one that is tried.
        weight_bytes = rank_weight_bytes(
            model, rank, is_gpu=is_gpu, dtype=dtype, is_expanded=is_expanded, num_positions=tried.max_model_len
        )
        return fit(
            model,
            budget_bytes=bytes_in_all,
            weight_bytes=weight_bytes,
            kv_dtype=kv_dtype,
            block_size=tried.block_size,
            max_model_len=tried.max_model_len,
            max_num_seqs=tried.max_num_seqs,
            max_num_batched_tokens=tried.max_num_batched_tokens,
            kv_cache_bytes=tried.kv_cache_bytes,
            num_blocks=tried.num_blocks,
            cpu=cpu_of(tried),
            block_bytes=block_bytes,
            share=own,
        )

    memory = fit_in(budget_bytes, limits)
    longest = replace(limits, max_model_len=min(limits.max_model_len, model.max_position_embeddings))
    report = FitReport(
        memory=memory,
        minimum_bytes=_minimum(fit_in(budget_bytes, longest)),
        limits=limits,
        checkpoint_bytes=on_disk or model_bytes(model),
        is_from_files=on_disk > 0,
        dtype=dtype,
        kv_dtype=kv_dtype,
        is_expanded=is_expanded,
        is_gpu=is_gpu,
        suggestions=(),
        cpu=cpu_of(limits),
    )
    if memory.fits:
        return report

    def suggestions(bytes_in_all: int) -> tuple[Suggestion, ...]:
        try_fit = partial(fit_in, bytes_in_all)
        if longest != limits:
            # Whatever else is changed, no model takes more; so this is what to change, and the rest goes by it.
            return _suggest_context(longest, lambda tried: try_fit(tried).fits)
        return suggest(limits, try_fit, can_fix_pool=not is_gpu)

    found = suggestions(budget_bytes - margin_bytes)
    if not found and margin_bytes:
        # Better what just fits than nothing.
        found = suggestions(budget_bytes)
    larger = _larger_share(report, config, total_bytes) if longest == limits else ()
    return replace(report, suggestions=(*larger, *found))


def _minimum(memory: MemoryFit) -> int:
    """Bytes with which one request of full length can be served, and the weights be loaded."""
    serving = memory.fixed_bytes + (memory.blocks_per_full_request + 1) * memory.kv_block_bytes
    return max(serving, memory.weight_bytes + memory.load_bytes + memory.runtime_bytes)


def rank_weight_bytes(
    model: ModelConfig, rank: RankSpec | None, *, is_gpu: bool, dtype: str, is_expanded: bool, num_positions: int
) -> int:
    """Bytes of the weights that one rank holds; `rank` None holds the whole model."""

    def held(part: ModelConfig) -> int:
        if is_gpu:
            return gpu_weight_bytes(part, num_positions)
        # The rotary table, 8 bytes for each pair of a head, is part of what a rank holds as weights.
        return loaded_weight_bytes(part, dtype, is_expanded) + num_positions * part.head_dim * 4

    if rank is None:
        return held(model)
    own, unit = shard(model, rank), DTYPE_BYTES[dtype]
    # Embedding and lm_head are shared out differently, so they are counted apart; routers score every expert.
    layers = held(replace(own, vocab_size=0, tie_word_embeddings=True))
    tables = (embedding_rows(model, rank) + own.vocab_size) * model.hidden_size * unit
    routers = own.num_layers * max(0, model.num_experts - own.num_experts) * (model.hidden_size + 1) * unit
    return layers + tables + routers


def _larger_share(report: FitReport, config: EngineConfig, total_bytes: int) -> tuple[Suggestion, ...]:
    """The share of a GPU's memory that would do, in hundredths; none when others hold what is missing."""
    if not report.is_gpu or not total_bytes:
        return ()
    share = -(-100 * report.minimum_bytes // total_bytes) / 100
    asked = config.cache.gpu_memory_utilization
    if not asked < share <= MAX_SHARE or report.memory.budget_bytes < int(asked * total_bytes):
        return ()
    return (Suggestion((("gpu-memory-utilization", f"{share:g}"),)),)


def suggest(
    limits: Limits, try_fit: Callable[[Limits], MemoryFit], *, can_fix_pool: bool = True
) -> tuple[Suggestion, ...]:
    """Find the smallest changes that fit: each setting alone, else all of them together, else none.

    `can_fix_pool`: a pool of fixed size may stand in for the default one, which a CPU caps.
    """
    found: list[Suggestion] = []

    def fits(tried: Limits) -> bool:
        return try_fit(tried).fits

    current = try_fit(limits)
    # One request's blocks and the null block: enough when only the default cap of the pool is in the way.
    needed = (current.blocks_per_full_request + 1) * current.kv_block_bytes
    if can_fix_pool and not limits.num_blocks and fits(replace(limits, kv_cache_bytes=needed)):
        found.append(Suggestion((("kv-cache-memory-bytes", f"{-(-needed // (1 << 20))}MiB"),)))
    unit = limits.block_size
    blocks = _largest_context(limits, fits)
    if blocks:
        found.append(Suggestion((("max-model-len", str(blocks * unit)),)))
    seqs = _largest(limits.max_num_seqs, lambda n: fits(replace(limits, max_num_seqs=n)))
    if seqs:
        found.append(Suggestion((("max-num-seqs", str(seqs)),)))
    tokens = _largest(
        limits.max_num_batched_tokens,
        lambda n: n >= limits.max_num_seqs and fits(replace(limits, max_num_batched_tokens=n)),
        low=limits.max_num_seqs,
    )
    if tokens:
        found.append(Suggestion((("max-num-batched-tokens", str(tokens)),)))
    return tuple(found) if found else _suggest_together(limits, fits)


def _suggest_context(limits: Limits, fits: Callable[[Limits], bool]) -> tuple[Suggestion, ...]:
    blocks = _largest_context(limits, fits)
    if not blocks:
        return _suggest_together(limits, fits)
    return (Suggestion((("max-model-len", str(blocks * limits.block_size)),)),)


def _suggest_together(limits: Limits, fits: Callable[[Limits], bool]) -> tuple[Suggestion, ...]:
    unit = limits.block_size
    for seqs, tokens in ((limits.max_num_seqs, max(256, limits.max_num_seqs)), (1, 256), (1, unit)):
        if seqs > limits.max_num_seqs or tokens > limits.max_num_batched_tokens:
            continue
        small = replace(limits, max_num_seqs=seqs, max_num_batched_tokens=tokens)
        blocks = _largest_context(small, fits)
        if blocks:
            settings = (("max-num-seqs", seqs), ("max-num-batched-tokens", tokens), ("max-model-len", blocks * unit))
            return (Suggestion(tuple((key, str(value)) for key, value in settings)),)
    return ()


def _largest_context(limits: Limits, fits: Callable[[Limits], bool]) -> int:
    """The largest context that fits, in blocks."""
    unit = limits.block_size
    return _largest(limits.max_model_len // unit, lambda n: fits(replace(limits, max_model_len=n * unit)))


def _largest(high: int, fits: Callable[[int], bool], low: int = 1) -> int:
    """The largest n in [low, high] that fits, 0 when none does. `fits` must not become true again above a failure."""
    if high < low or not fits(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
