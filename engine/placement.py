"""Which rank runs where and owns what: a frozen value, computed once, before anything starts.

Pure: the launcher prints it, the executor obeys it, and nothing downstream asks a rank what kind of device it is in
order to decide policy. Rank order is `(dp * PP + pp) * TP + tp`.
"""

from __future__ import annotations

from dataclasses import dataclass


class PlacementError(ValueError):
    """No placement exists for what was asked; the message names the limit and the nearest possibility."""


@dataclass(frozen=True, slots=True)
class RankSpec:
    """One rank. `layers` is half-open; `kv_heads`, `mlp_units` and `experts` are half-open shares of the model.

    Units: an MLP unit is one block of 32 intermediate columns.
    """

    rank: int
    node: str
    device: str
    dp_rank: int
    pp_rank: int
    tp_rank: int
    layers: tuple[int, int]
    kv_heads: tuple[int, int]
    mlp_units: tuple[int, int]
    experts: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Placement:
    """All ranks of one launch, in rank order."""

    data_parallel_size: int
    pipeline_parallel_size: int
    tensor_parallel_size: int
    ranks: tuple[RankSpec, ...]

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    @property
    def is_single_rank(self) -> bool:
        return len(self.ranks) == 1


def single_rank(
    *, node: str, device: str, num_layers: int, num_kv_heads: int, intermediate_size: int, num_experts: int
) -> Placement:
    """Place a whole model on one device."""
    rank = RankSpec(
        rank=0,
        node=node,
        device=device,
        dp_rank=0,
        pp_rank=0,
        tp_rank=0,
        layers=(0, num_layers),
        kv_heads=(0, num_kv_heads),
        mlp_units=(0, -(-intermediate_size // 32)),
        experts=(0, num_experts),
    )
    return Placement(data_parallel_size=1, pipeline_parallel_size=1, tensor_parallel_size=1, ranks=(rank,))
