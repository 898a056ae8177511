"""The ways to split a model over a cluster, each placed, sized and estimated; and the seven of two nodes.

Knows: which figures rank them and why one is chosen. Refuses to know: how they are printed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.config import EngineConfig, ModelConfig
from engine.placement import HostSpec, ParallelSizes, Placement, PlacementOptions, find_sizes, place, remarks
from launcher.plan.cost import CostModel, Estimate, Load
from launcher.plan.inventory import Inventory
from launcher.plan.links import Link
from launcher.plan.picture import Picture, picture_of
from launcher.plan.rank_memory import MemoryReport, Sizing, report_memory
from launcher.registry.cluster import Cluster, Fabric, Node
from launcher.sizes import GIB, counted

Order = Literal["throughput", "latency"]


@dataclass(frozen=True, slots=True)
class Split:
    """One way to split. `requests` that one engine's KV holds at the load's context."""

    sizes: ParallelSizes
    placement: Placement
    memory: MemoryReport
    estimate: Estimate
    crossing: str

    @property
    def fits(self) -> bool:
        return self.memory.fits


@dataclass(frozen=True, slots=True)
class Study:
    """What splits are made for: model, hosts, links, load."""

    sizing: Sizing
    hosts: tuple[HostSpec, ...]
    between: Link
    load: Load
    options: PlacementOptions = PlacementOptions()

    @property
    def model(self) -> ModelConfig:
        return self.sizing.model

    def split(self, sizes: ParallelSizes) -> Split:
        """Place, size and estimate one split. Raises: PlacementError."""
        return self.judge(place(self.model, sizes, self.hosts, self.options))

    def judge(self, placement: Placement) -> Split:
        """Size and estimate a placement."""
        memory = report_memory(placement, self.sizing)
        cost = CostModel(self.model, self.sizing.inventories, self.between)
        tokens = min((rank.kv_tokens for rank in memory.ranks if rank.num_blocks), default=0)
        held = tokens / self.load.context if tokens else None
        estimate = cost.estimate(placement, self.load, held)
        return Split(placement.sizes, placement, memory, estimate, crossing_text(placement, self.model, self.between))

    def splits(self, order: Order = "throughput", *, expert_parallel: bool = False) -> tuple[Split, ...]:
        """All splits that leave no device idle, those that fit first, best first."""
        found = [
            self.split(sizes)
            for sizes in find_sizes(self.model, self.hosts, self.options, expert_parallel=expert_parallel)
        ]
        return tuple(sorted(found, key=lambda split: (not split.fits, self._rank(split, order))))

    def _rank(self, split: Split, order: Order) -> tuple[float, float]:
        rate, latency = -split.estimate.tokens_per_second, split.estimate.latency_seconds
        return (rate, latency) if order == "throughput" else (latency, rate)

    def picture(self, title: str, split: Split, roles: Mapping[str, tuple[str, str]]) -> Picture:
        """Gather the drawing of one split."""
        from launcher.plan.borders import weighed

        found = remarks(split.placement, self.model, has_rdma=self.between.name == "RDMA")
        return picture_of(
            title,
            split.placement,
            self.model,
            self.sizing.inventories,
            between=self.between,
            roles=roles,
            memory=split.memory.ranks,
            found=weighed(found, split.placement, self.sizing, self.between, self.load),
        )


def crossing_text(placement: Placement, model: ModelConfig, between: Link) -> str:
    """Say what crosses node borders in a step."""
    sums = placement.crossing(placement.tp_groups)
    if sums:
        return f"{2 * model.num_layers} all-reduces a step over {between.name}"
    borders = sum(
        placement.stage(dp, pp)[-1].node != placement.stage(dp, pp + 1)[0].node
        for dp in range(placement.data_parallel_size)
        for pp in range(placement.pipeline_parallel_size - 1)
    )
    if borders:
        each = f"{2 * model.hidden_size / 1000:.2f} kB per token"
        return f"{counted(borders, 'stage border')}, {each} over {between.name}"
    return "nothing but requests and answers" if len(placement.nodes) > 1 else "one node only"


def best_reason(best: Split, splits: Sequence[Split], order: Order) -> str:
    """Say in one line why the first of the ranking leads it."""
    estimate = best.estimate
    figure = (
        f"{estimate.tokens_per_second:,.0f} tok/s at {counted(estimate.requests, 'request')}"
        if order == "throughput"
        else f"{1e3 * estimate.latency_seconds:.2f} ms a token alone"
    )
    others = [split for split in splits if split.fits and split is not best]
    if not others:
        return f"{best.sizes} is the only split that fits: {figure}"
    return f"{best.sizes} leads by {order}: {figure}; across nodes: {best.crossing}"


@dataclass(frozen=True, slots=True)
class Case:
    """One of the seven known topologies of two nodes with eight GPUs each."""

    number: int
    sizes: ParallelSizes
    title: str
    why: str


CASES: tuple[Case, ...] = (
    Case(
        1,
        ParallelSizes(data=2, pipeline=1, tensor=8),
        "an engine per node",
        "Each engine sums inside its own node, and no tensor ever crosses the border: the first choice for a model "
        "that fits one node.",
    ),
    Case(
        2,
        ParallelSizes(data=2, pipeline=2, tensor=4),
        "two stages inside each node",
        "Groups of 4 sum faster than groups of 8, and both stages stay in the node; a lone request walks through "
        "both stages, so it pays for at least two requests to keep them busy.",
    ),
    Case(
        3,
        ParallelSizes(data=4, pipeline=2, tensor=2),
        "two engines of two stages per node",
        "More engines, each small: for models that fit four GPUs and many users at once.",
    ),
    Case(
        4,
        ParallelSizes(data=2, pipeline=4, tensor=2),
        "a deep pipeline per node",
        "Sums involve pairs only, where links inside the node are slow (PCIe); the pipeline wants at least four "
        "requests in flight.",
    ),
    Case(
        5,
        ParallelSizes(data=4, pipeline=4, tensor=1),
        "pipelines without sums",
        "No all-reduce anywhere, one hidden state per token and border: for GPUs with no fast link between them.",
    ),
    Case(
        6,
        ParallelSizes(data=16, pipeline=1, tensor=1),
        "an engine per GPU",
        "Nothing travels between GPUs, so throughput adds up; the model and its KV cache must fit one GPU, and every "
        "GPU holds all weights.",
    ),
    Case(
        7,
        ParallelSizes(data=1, pipeline=16, tensor=1),
        "one pipeline over both nodes",
        "For a model that fits no single node: one stage border crosses, all weights are held once, and a lone "
        "request is slow.",
    ),
)

REFERENCE = Cluster(
    "two nodes of 8 H100",
    (
        Node("node-0", "head", "10.0.0.1", gpus=8, gpu_memory_bytes=80 * GIB),
        Node("node-1", "worker", "10.0.0.2", gpus=8, gpu_memory_bytes=80 * GIB),
    ),
    platform="hopper",
    fabric=Fabric(rdma="required"),
)
"""What the seven topologies are drawn for when no cluster is named."""


def study_of(
    model: ModelConfig,
    config: EngineConfig,
    hosts: tuple[HostSpec, ...],
    inventories: Mapping[str, Inventory],
    between: Link,
    load: Load,
) -> Study:
    """Gather a study of a model on hosts; memory is sized from the shape."""
    return Study(Sizing(config, model, inventories), hosts, between, load)


def split_data(split: Split) -> dict[str, Any]:
    """A split as plain values, for `--json`."""
    estimate, sizes = split.estimate, split.sizes
    return {
        "tensor": sizes.tensor,
        "pipeline": sizes.pipeline,
        "data": sizes.data,
        "expert_parallel": sizes.expert_parallel,
        "fits": split.fits,
        "tokens_per_second": round(estimate.tokens_per_second, 1),
        "requests": estimate.requests,
        "latency_ms": round(1e3 * estimate.latency_seconds, 4),
        "ttft_ms": round(1e3 * estimate.ttft_seconds, 3),
        "latency_parts_ms": {name: round(1e3 * seconds, 4) for name, seconds in estimate.parts},
        "bound": estimate.bound,
        "max_full_requests_per_engine": round(split.memory.max_full_requests, 2),
        "largest_rank_gib": round(max(rank.required_bytes for rank in split.memory.ranks) / GIB, 2),
        "crosses_nodes": split.crossing,
    }
