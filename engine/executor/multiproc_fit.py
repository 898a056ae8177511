"""Size the KV pool of an engine whose ranks hold shares, and make one progress of theirs.

Knows: what a block takes on each rank; that ranks on one host share its memory. Refuses to know: how ranks are reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.config import EngineConfig, ModelConfig
from engine.executor.messages import LoadedReport, PhaseReport
from engine.memory import MemoryFit, fit_engine, share_block_bytes
from engine.placement import Placement, RankSpec, shard


def block_bytes_of_rank(model: ModelConfig, rank: RankSpec, block_size: int, kv_dtype: str) -> int:
    """Bytes of one block on a rank: its KV heads, in as many layers as its stage has of the largest group."""
    return share_block_bytes(model, rank.layers, rank.kv_heads[1] - rank.kv_heads[0], block_size, kv_dtype)


def fit_ranks(
    config: EngineConfig,
    model: ModelConfig,
    placement: Placement,
    ranks: Sequence[RankSpec],
    loaded: Sequence[LoadedReport],
    max_model_len: int,
) -> MemoryFit:
    """Size the pool of an engine, `ranks` of the placement: the blocks that its tightest rank has room for."""
    # CPU ranks of a node share its memory, those of other engines too; a GPU rank has its device to itself.
    sharing = {
        rank.rank: 1 if rank.backend == "cuda" else sum(o.backend != "cuda" for o in placement.on_node(rank.node))
        for rank in ranks
    }
    fits = [
        fit_engine(
            config,
            model,
            max_model_len,
            budget_bytes=report.budget_bytes // sharing[rank.rank] + report.weight_bytes,
            weight_bytes=report.weight_bytes,
            kv_dtype=report.kv_dtype,
            is_gpu=rank.backend == "cuda",
            block_bytes=block_bytes_of_rank(model, rank, config.cache.block_size, report.kv_dtype),
            share=shard(model, rank),
        )
        for rank, report in zip(ranks, loaded, strict=True)
    ]
    return min(fits, key=lambda fit: fit.num_blocks)


class LoadProgress:
    """Turns the phases of many ranks into one progress: as far as the one that is furthest behind."""

    def __init__(self, report: Callable[[str, str, float | None, str], None]) -> None:
        self._report = report
        self._fractions: dict[int, float] = {}

    def __call__(self, phase: PhaseReport) -> None:
        if phase.phase == "load":
            self._fractions[phase.rank] = phase.fraction
            least = min(self._fractions.values())
            self._report("load", "progress", least, f"rank {phase.rank}: {phase.detail}" if phase.detail else "")
