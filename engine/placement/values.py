"""The values of a placement: ranks, groups, and the JSON in which they travel to every node."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Span = tuple[int, int]
"""A half-open range."""


class PlacementError(ValueError):
    """No placement exists for what was asked; the message names the limit, `alternatives` the nearest that exist."""

    def __init__(self, message: str, alternatives: Sequence[ParallelSizes] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.alternatives = tuple(alternatives)


@dataclass(frozen=True, slots=True)
class ParallelSizes:
    """How many engines (`data`), stages of an engine (`pipeline`), ranks of a stage (`tensor`).

    With `expert_parallel` the ranks of a stage share out whole experts, not columns of every expert.
    """

    data: int = 1
    pipeline: int = 1
    tensor: int = 1
    expert_parallel: bool = False

    def __post_init__(self) -> None:
        for name in ("data", "pipeline", "tensor"):
            if getattr(self, name) < 1:
                raise PlacementError(f"{name} parallel size {getattr(self, name)}: must be at least 1")

    @property
    def world(self) -> int:
        return self.data * self.pipeline * self.tensor

    @property
    def engine_ranks(self) -> int:
        return self.pipeline * self.tensor

    def __str__(self) -> str:
        return f"tp {self.tensor} pp {self.pipeline} dp {self.data}" + (" ep" if self.expert_parallel else "")


@dataclass(frozen=True, slots=True)
class Device:
    """Something that can be a rank: `cuda:3`, or `cpu:0` with its NUMA node and the cores it may use."""

    name: str
    numa_node: int | None = None
    cores: tuple[int, ...] = ()

    @property
    def backend(self) -> str:
        return self.name.partition(":")[0]


@dataclass(frozen=True, slots=True)
class HostSpec:
    """A node as placing sees it: its name and its devices, in the order in which they are filled."""

    name: str
    devices: tuple[Device, ...]

    def of(self, backend: str) -> tuple[Device, ...]:
        return tuple(device for device in self.devices if device.backend == backend)


@dataclass(frozen=True, slots=True)
class RankSpec:
    """One rank. `layers`, heads, `mlp_units`, `experts` and `vocab` are half-open shares of the model.

    Units: an MLP unit is one block of 32 intermediate columns; `vocab` counts rows of lm_head and is empty on all but
    the last stage. A share may be empty: a rank with no KV head has no KV cache. `copied_experts` are experts that
    another rank owns and this one holds as well.
    """

    rank: int
    node: str
    device: str
    dp_rank: int
    pp_rank: int
    tp_rank: int
    layers: Span
    kv_heads: Span
    mlp_units: Span
    experts: Span
    query_heads: Span = (0, 0)
    vocab: Span = (0, 0)
    has_embedding: bool = True
    numa_node: int | None = None
    cores: tuple[int, ...] = ()
    copied_experts: tuple[int, ...] = ()

    @property
    def backend(self) -> str:
        return self.device.partition(":")[0]

    @property
    def num_layers(self) -> int:
        return self.layers[1] - self.layers[0]


@dataclass(frozen=True, slots=True)
class KVLink:
    """Finished KV blocks of one engine move to another: a prefill engine hands its requests to a decoding one."""

    source_dp: int
    target_dp: int


@dataclass(frozen=True, slots=True)
class KVRoute:
    """What one rank sends to another over a KVLink: the layers and KV heads that both own."""

    source: int
    target: int
    layers: Span
    kv_heads: Span


@dataclass(frozen=True, slots=True)
class Placement:
    """All ranks of one launch, in rank order `(dp * PP + pp) * TP + tp`."""

    data_parallel_size: int
    pipeline_parallel_size: int
    tensor_parallel_size: int
    ranks: tuple[RankSpec, ...]
    expert_parallel: bool = False
    kv_links: tuple[KVLink, ...] = ()

    def __post_init__(self) -> None:
        expected = self.data_parallel_size * self.pipeline_parallel_size * self.tensor_parallel_size
        if len(self.ranks) != expected:
            raise PlacementError(f"{len(self.ranks)} ranks where {self.sizes} makes {expected}")
        for index, rank in enumerate(self.ranks):
            if rank.rank != index or self.index(rank.dp_rank, rank.pp_rank, rank.tp_rank) != index:
                raise PlacementError(f"rank {rank.rank} stands at place {index}: order is (dp * PP + pp) * TP + tp")
        for link in self.kv_links:
            if not (0 <= link.source_dp < self.data_parallel_size and 0 <= link.target_dp < self.data_parallel_size):
                raise PlacementError(f"KV link {link.source_dp} -> {link.target_dp}: no such engine")

    @property
    def sizes(self) -> ParallelSizes:
        return ParallelSizes(
            self.data_parallel_size, self.pipeline_parallel_size, self.tensor_parallel_size, self.expert_parallel
        )

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    @property
    def is_single_rank(self) -> bool:
        return len(self.ranks) == 1

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes in use, in the order of their first rank."""
        return tuple(dict.fromkeys(rank.node for rank in self.ranks))

    def index(self, dp: int, pp: int, tp: int) -> int:
        return (dp * self.pipeline_parallel_size + pp) * self.tensor_parallel_size + tp

    def on_node(self, node: str) -> tuple[RankSpec, ...]:
        return tuple(rank for rank in self.ranks if rank.node == node)

    def engine(self, dp: int) -> tuple[RankSpec, ...]:
        """The ranks of one data-parallel engine."""
        size = self.pipeline_parallel_size * self.tensor_parallel_size
        return self.ranks[dp * size : (dp + 1) * size]

    def only_rank(self, dp: int, node: str = "") -> RankSpec | None:
        """Return the rank that is all of an engine, if there is such a one on `node`; empty: wherever it is."""
        ranks = self.engine(dp)
        return ranks[0] if len(ranks) == 1 and node in ("", ranks[0].node) else None

    def stage(self, dp: int, pp: int) -> tuple[RankSpec, ...]:
        """The ranks of one pipeline stage of one engine."""
        first = self.index(dp, pp, 0)
        return self.ranks[first : first + self.tensor_parallel_size]

    @property
    def tp_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that sum their partial results in every layer."""
        size = self.tensor_parallel_size
        return tuple(tuple(range(first, first + size)) for first in range(0, self.world_size, size))

    @property
    def pp_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that hand one token's hidden state on, in order of stages."""
        return tuple(
            tuple(self.index(dp, pp, tp) for pp in range(self.pipeline_parallel_size))
            for dp in range(self.data_parallel_size)
            for tp in range(self.tensor_parallel_size)
        )

    @property
    def dp_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that own the same part of the model in different engines; no tensor passes between them."""
        return tuple(
            tuple(self.index(dp, pp, tp) for dp in range(self.data_parallel_size))
            for pp in range(self.pipeline_parallel_size)
            for tp in range(self.tensor_parallel_size)
        )

    @property
    def ep_groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that share out the experts: the ranks of a stage. All of them see all tokens, so one sum suffices."""
        return self.tp_groups if self.expert_parallel else ()

    def crossing(self, groups: Iterable[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
        """The groups that have ranks on more than one node."""
        return tuple(group for group in groups if len({self.ranks[rank].node for rank in group}) > 1)

    def kv_routes(self) -> tuple[KVRoute, ...]:
        """Resolve the KV links into pairs of ranks: unequal splits on both sides meet in their common parts."""
        routes = []
        for link in self.kv_links:
            for source in self.engine(link.source_dp):
                for target in self.engine(link.target_dp):
                    layers, heads = _common(source.layers, target.layers), _common(source.kv_heads, target.kv_heads)
                    if layers and heads:
                        routes.append(KVRoute(source.rank, target.rank, layers, heads))
        return tuple(routes)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Placement:
        """Read what `to_json` wrote. Raises: PlacementError when it is anything else."""
        try:
            data = json.loads(text)
            ranks = tuple(RankSpec(**_tuples(rank)) for rank in data.pop("ranks"))
            links = tuple(KVLink(**link) for link in data.pop("kv_links"))
            return cls(ranks=ranks, kv_links=links, **data)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise PlacementError(f"not a placement: {error}") from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _common(one: Span, other: Span) -> Span | None:
    begin, end = max(one[0], other[0]), min(one[1], other[1])
    return (begin, end) if begin < end else None


def single_rank(
    *,
    node: str,
    device: str,
    num_layers: int,
    num_kv_heads: int,
    intermediate_size: int,
    num_experts: int,
    num_query_heads: int = 0,
    vocab_size: int = 0,
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
        query_heads=(0, num_query_heads),
        vocab=(0, vocab_size),
    )
    return Placement(data_parallel_size=1, pipeline_parallel_size=1, tensor_parallel_size=1, ranks=(rank,))
