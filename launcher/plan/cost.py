"""How fast a placement would serve: bytes over bandwidth per rank, sums per layer, hops per stage. Estimates only.

Knows: the floors of `launcher.benchmark.floor` and the links of `launcher.plan.links`. Refuses to know: measurements;
kernels reach less than a copy does, so figures rank placements and are not what a benchmark will show.

    rank      max(bytes read / copy bandwidth, FLOP / peak) of its share, and what launching its layers takes
    stage     its slowest rank + 2 all-reduces a layer
    latency   all stages + hops between them, one request
    rate      requests in as many microbatches as stages; the slowest stage of the fullest engine sets the pace
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from engine.config import ModelConfig
from engine.placement import Placement, RankSpec, shard
from launcher.benchmark.floor import decode_flops, find_device, prefill_flops, step_bytes
from launcher.plan.inventory import Gpu, Inventory
from launcher.plan.links import Link, inside_link

# Read bandwidth and bfloat16 peak where the table of floors has no device of that name: makers' figures.
OTHER_GPUS: Mapping[str, tuple[float, float]] = {
    "GB10": (0.273e12, 100e12),
    "B200": (7.7e12, 2.25e15),
    "T4": (0.3e12, 65e12),
}
UNKNOWN_GPU = (1.0e12, 150e12)
UNKNOWN_CPU = (40e9, 1e12)
"""Bytes and FLOP per second of a CPU rank whose memory nobody has measured."""
BF16_BYTES = 2


@dataclass(frozen=True, slots=True)
class Launches:
    """What a step takes beside bytes and sums: starting and draining the kernels of a layer, the host between steps."""

    layer_seconds: float
    step_seconds: float
    source: str


GPU_LAUNCHES = Launches(20e-6, 50e-6, "what one, two and four H200 and one H100 took of 24 layers beyond their bytes")
CPU_LAUNCHES = Launches(100e-6, 100e-6, "what two cores took of 6 small layers beyond their bytes")
"""Without them a small model would seem to need no time at all: its bytes are read in microseconds."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is to be served: `requests` at once over all engines, each `context` tokens long, prompts of `prompt`."""

    requests: int = 64
    context: int = 1024
    prompt: int = 1024


@dataclass(frozen=True, slots=True)
class Estimate:
    """Figures of one placement. `latency_seconds`: one token of a lone request. `bound`: what that time goes to.

    `tokens_per_second` over all busy engines at `requests` together: as many as the KV cache holds of those asked.
    """

    latency_seconds: float
    tokens_per_second: float
    requests: int
    ttft_seconds: float
    sum_seconds: float
    hop_seconds: float
    launch_seconds: float

    @property
    def read_seconds(self) -> float:
        """The part of the latency that is reading weights and KV."""
        return self.latency_seconds - self.sum_seconds - self.hop_seconds - self.launch_seconds

    @property
    def bound(self) -> str:
        return max(self.parts, key=lambda part: part[1])[0]

    @property
    def parts(self) -> tuple[tuple[str, float], ...]:
        """What the latency consists of, each in seconds."""
        return (
            ("memory", self.read_seconds),
            ("sums", self.sum_seconds),
            ("hops", self.hop_seconds),
            ("launches", self.launch_seconds),
        )


class CostModel:
    """Estimates placements of one model on known hosts."""

    def __init__(self, model: ModelConfig, inventories: Mapping[str, Inventory], between: Link) -> None:
        self._model = model
        self._inventories = inventories
        self._between = between
        self._shards: dict[tuple[object, ...], ModelConfig] = {}

    def estimate(self, placement: Placement, load: Load, held_requests: float | None = None) -> Estimate:
        """Estimate one placement; `held_requests` is how many of `load.context` tokens the KV of one engine holds."""
        engines = placement.data_parallel_size
        stages = placement.pipeline_parallel_size
        # Engines are alike but for where they lie; the slowest one is what a user may meet.
        chosen = max(range(engines), key=lambda dp: self._lone(placement, dp, load)[0])
        latency, sums, hops, launches = self._lone(placement, chosen, load)
        # Requests cannot be divided: fewer than engines leave some of them idle, and the fullest one sets the pace.
        busy = min(engines, load.requests)
        per_engine = -(-load.requests // busy)
        if held_requests is not None:
            per_engine = min(per_engine, max(1, int(held_requests)))
        served = min(load.requests, busy * per_engine)
        batches = min(stages, per_engine)
        rows = -(-per_engine // batches)
        times = [sum(self._stage(placement, chosen, pp, rows, load.context)) for pp in range(stages)]
        handed = [self._hop(placement, chosen, pp, rows) for pp in range(stages - 1)]
        cycle = max(sum(times) + sum(handed), batches * max(times))
        return Estimate(
            latency_seconds=latency,
            tokens_per_second=served / cycle,
            requests=served,
            ttft_seconds=self._ttft(placement, chosen, load.prompt),
            sum_seconds=sums,
            hop_seconds=hops,
            launch_seconds=launches,
        )

    def group_link(self, placement: Placement, ranks: Sequence[int]) -> Link:
        """The link that joins a group: the one between hosts as soon as any two are apart."""
        members = [placement.ranks[rank] for rank in ranks]
        if len({rank.node for rank in members}) > 1:
            return self._between
        is_gpu = all(rank.backend == "cuda" for rank in members)
        return inside_link(self._inventories[members[0].node], is_gpu=is_gpu)

    def _lone(self, placement: Placement, dp: int, load: Load) -> tuple[float, float, float, float]:
        """(latency, all-reduces, hops, launches) of one token of one request."""
        stages = placement.pipeline_parallel_size
        parts = [self._stage(placement, dp, pp, 1, load.context) for pp in range(stages)]
        sums = sum(summing for _, summing, _ in parts)
        hops = sum(self._hop(placement, dp, pp, 1) for pp in range(stages - 1))
        launches = sum(launching for _, _, launching in parts)
        return sum(reading for reading, _, _ in parts) + sums + hops + launches, sums, hops, launches

    def _stage(self, placement: Placement, dp: int, pp: int, rows: int, context: int) -> tuple[float, float, float]:
        """(slowest rank, all-reduces, launches) of one stage for `rows` requests."""
        ranks = placement.stage(dp, pp)
        slowest = max(self._rank(rank, rows, context, placement) for rank in ranks)
        link = self.group_link(placement, [rank.rank for rank in ranks])
        num_bytes = rows * self._model.hidden_size * BF16_BYTES
        return slowest, 2 * ranks[0].num_layers * link.all_reduce(num_bytes, len(ranks)), launching(ranks)

    def _rank(self, rank: RankSpec, rows: int, context: int, placement: Placement) -> float:
        part = self._shard(rank)
        experts = None
        if placement.expert_parallel:
            experts = busiest_experts(
                self._model.num_experts, self._model.num_experts_per_token, rows, placement.tensor_parallel_size
            )
            experts = min(experts, part.num_experts)
        bandwidth, flops = self._speed(rank)
        read = step_bytes(part, rows, context, experts).total / bandwidth
        # Every rank of an expert-parallel stage computes its share of the tokens' experts.
        spread = placement.tensor_parallel_size if placement.expert_parallel else 1
        return max(read, decode_flops(part, rows, context) / spread / flops)

    def _hop(self, placement: Placement, dp: int, pp: int, rows: int) -> float:
        one, other = placement.stage(dp, pp)[0], placement.stage(dp, pp + 1)[0]
        return self.group_link(placement, (one.rank, other.rank)).hop(rows * self._model.hidden_size * BF16_BYTES)

    def _ttft(self, placement: Placement, dp: int, prompt: int) -> float:
        """Time of a lone prompt: each stage computes it, sums it, hands it on."""
        total = 0.0
        for pp in range(placement.pipeline_parallel_size):
            ranks = placement.stage(dp, pp)
            times = []
            for rank in ranks:
                bandwidth, flops = self._speed(rank)
                part = self._shard(rank)
                spread = placement.tensor_parallel_size if placement.expert_parallel else 1
                read = step_bytes(part, prompt, 0, part.num_experts).weights / bandwidth
                times.append(max(read, prefill_flops(part, 1, prompt) / spread / flops))
            link = self.group_link(placement, [rank.rank for rank in ranks])
            num_bytes = prompt * self._model.hidden_size * BF16_BYTES
            total += max(times) + 2 * ranks[0].num_layers * link.all_reduce(num_bytes, len(ranks)) + launching(ranks)
            if pp:
                total += self._hop(placement, dp, pp - 1, prompt)
        return total

    def _shard(self, rank: RankSpec) -> ModelConfig:
        key = (rank.layers, rank.query_heads, rank.mlp_units, rank.experts, rank.vocab)
        if key not in self._shards:
            self._shards[key] = shard(self._model, rank)
        return self._shards[key]

    def _speed(self, rank: RankSpec) -> tuple[float, float]:
        inventory = self._inventories[rank.node]
        if rank.backend == "cuda":
            return gpu_speed(inventory.gpus[int(rank.device.partition(":")[2])])
        return inventory.memory_bandwidth or UNKNOWN_CPU[0], UNKNOWN_CPU[1]


def launches_of(backend: str) -> Launches:
    """Choose what launching costs on a kind of device."""
    return GPU_LAUNCHES if backend == "cuda" else CPU_LAUNCHES


def launching(ranks: Sequence[RankSpec]) -> float:
    """Time that a stage spends beside bytes and sums, in every step: that of its slowest kind of rank."""
    kinds = (launches_of(rank.backend) for rank in ranks)
    return max(kind.step_seconds + ranks[0].num_layers * kind.layer_seconds for kind in kinds)


def gpu_speed(gpu: Gpu) -> tuple[float, float]:
    """Bytes and FLOP per second of a GPU: what a copy reached where that was measured, else the maker's figure."""
    known = find_device(gpu.name)
    if known is not None:
        return known.copy or known.spec or UNKNOWN_GPU[0], known.flops or UNKNOWN_GPU[1]
    return next((speed for key, speed in OTHER_GPUS.items() if key in gpu.name), UNKNOWN_GPU)


@cache
def busiest_experts(num_experts: int, per_token: int, num_tokens: int, ranks: int) -> float:
    """Mean number of distinct experts that the busiest of `ranks` ranks reads per layer, under uniform routing.

    By drawing, always the same draws: the mean of a maximum has no short formula.
    """
    random = Random(0)
    draws = max(8, min(200, 20_000 // (num_tokens * per_token)))
    owned = -(-num_experts // ranks)
    total = 0
    for _ in range(draws):
        touched: set[int] = set()
        for _ in range(num_tokens):
            touched.update(random.sample(range(num_experts), per_token))
            if len(touched) == num_experts:
                break
        counts = [0] * ranks
        for expert in touched:
            counts[expert // owned] += 1
        total += max(counts)
    return total / draws
