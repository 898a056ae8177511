"""Find a device for every rank, and a share of the model for it.

Knows: the model's shape, sizes, hosts, strategies. Refuses to know: bytes and speed (`engine.memory`, the launcher).

A stage (the ranks of one tensor-parallel group) is what is placed. It lies inside one node whenever any node is large
enough: its ranks talk in every layer. Stages of an engine talk once per step and may cross a border; engines never
talk at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from engine.config import ModelConfig
from engine.placement.shares import MLP_UNIT, Shares, spans, split_evenly, split_layers
from engine.placement.values import (
    Device,
    HostSpec,
    ParallelSizes,
    Placement,
    PlacementError,
    RankSpec,
    Span,
)

Strategy = Literal["pack", "spread", "strict-pack", "strict-spread"]


@dataclass(frozen=True, slots=True)
class PlacementOptions:
    """Wishes beside the sizes.

    `strategy`: pack fills a node before the next; spread puts the stages of an engine on different nodes while there
    are any, and keeps a tensor group together; the strict forms refuse where they cannot. `nodes` restricts and orders
    the nodes; `exact` forbids idle devices; `cpu_ranks` ranks of every engine run on CPUs beside its GPU ranks: the
    first stages, or with one stage the last tensor ranks (lm_head stays on a GPU either way).
    """

    strategy: Strategy = "pack"
    nodes: tuple[str, ...] = ()
    exact: bool = False
    cpu_ranks: int = 0
    shares: Shares = field(default_factory=Shares)


def place(
    model: ModelConfig,
    sizes: ParallelSizes,
    hosts: Sequence[HostSpec],
    options: PlacementOptions | None = None,
    *,
    suggests: bool = True,
) -> Placement:
    """Place a model on hosts. GPUs are used where there are any, else CPUs.

    Raises: PlacementError, with the nearest sizes that would work (unless `suggests` is off).
    """
    options = options or PlacementOptions()
    try:
        chosen = _restrict(hosts, options.nodes)
        shares = _Shares(model, sizes, options.shares)
        seats = _Seating(sizes, chosen, options).seats()
        return _build(model, sizes, seats, shares)
    except PlacementError as error:
        if not suggests or error.alternatives:
            raise
        raise PlacementError(error.message, _nearest(model, sizes, hosts, options)) from None


def find_sizes(
    model: ModelConfig,
    hosts: Sequence[HostSpec],
    options: PlacementOptions | None = None,
    *,
    expert_parallel: bool = False,
    uses_all: bool = True,
) -> tuple[ParallelSizes, ...]:
    """List the sizes that can be placed, larger tensor groups first; with `uses_all` only those without idle devices.

    Otherwise, for each (tensor, pipeline), every number of engines that fits.
    """
    options = options or PlacementOptions()
    chosen = _restrict(hosts, options.nodes)
    total = sum(len(host.of(_backend(chosen))) for host in chosen)
    found = []
    for tensor in (tp for tp in range(total, 0, -1) if _heads_problem(model, tp) is None):
        for pipeline in range(1, min(total // tensor, model.num_layers) + 1):
            for data in range(total // (tensor * pipeline), 0, -1):
                if uses_all and data * tensor * pipeline != total:
                    break
                sizes = ParallelSizes(data, pipeline, tensor, expert_parallel)
                try:
                    place(model, sizes, hosts, options, suggests=False)
                except PlacementError:
                    continue
                found.append(sizes)
    return tuple(found)


def _nearest(
    model: ModelConfig, asked: ParallelSizes, hosts: Sequence[HostSpec], options: PlacementOptions
) -> tuple[ParallelSizes, ...]:
    """Up to three sizes that work: those with about the most ranks first, then fewest and least changes."""
    plain = PlacementOptions(strategy=options.strategy, nodes=options.nodes)
    try:
        found = find_sizes(model, hosts, plain, expert_parallel=asked.expert_parallel, uses_all=False)
    except PlacementError:
        return ()

    most = max((min(sizes.world, asked.world) for sizes in found), default=0)

    def distance(sizes: ParallelSizes) -> tuple[bool, int, int, int, bool]:
        pairs = ((sizes.data, asked.data), (sizes.pipeline, asked.pipeline), (sizes.tensor, asked.tensor))
        changed = sum(one != other for one, other in pairs)
        apart = sum(abs(one - other) for one, other in pairs)
        ranks = min(sizes.world, asked.world)
        # Who asked for many ranks is not helped by one that leaves most devices idle.
        return 4 * ranks < 3 * most, changed, -ranks, apart, sizes.data != asked.data

    return tuple(sorted((sizes for sizes in found if sizes != asked), key=distance)[:3])


def _restrict(hosts: Sequence[HostSpec], names: Sequence[str]) -> tuple[HostSpec, ...]:
    by_name = {host.name: host for host in hosts}
    for name in names:
        if name not in by_name:
            raise PlacementError(f"no node is called {name}: there are {', '.join(by_name) or 'none'}")
    return tuple(by_name[name] for name in names) if names else tuple(hosts)


def _backend(hosts: Sequence[HostSpec]) -> str:
    return "cuda" if any(host.of("cuda") for host in hosts) else "cpu"


def _heads_problem(model: ModelConfig, tensor: int) -> str | None:
    heads, kv_heads = model.num_attention_heads, model.num_kv_heads
    if heads % tensor:
        return f"tp {tensor}: {heads} attention heads do not divide by it"
    if kv_heads % tensor and tensor % kv_heads:
        return f"tp {tensor}: neither divides {kv_heads} KV heads nor is a multiple of them"
    return None


class _Shares:
    """What each stage and each tensor rank owns."""

    def __init__(self, model: ModelConfig, sizes: ParallelSizes, asked: Shares) -> None:
        tp, pp = sizes.tensor, sizes.pipeline
        if pp > model.num_layers:
            raise PlacementError(f"pp {pp}: the model has {model.num_layers} layers, each stage needs one")
        self.layers = spans(
            _checked("layers", asked.layers, pp, model.num_layers) or split_layers(model.layer_windows, pp)
        )
        self.kv_heads, self.query_heads = self._heads(model, tp, asked.kv_heads)
        units = -(-model.intermediate_size // MLP_UNIT)
        if sizes.expert_parallel:
            if tp > model.num_experts:
                raise PlacementError(f"tp {tp} with expert parallel: the model has {model.num_experts} experts")
            counts = _checked("experts", asked.experts, tp, model.num_experts) or split_evenly(model.num_experts, tp)
            self.experts: tuple[Span, ...] = spans(counts)
            self.mlp_units: tuple[Span, ...] = ((0, units),) * tp
        else:
            if tp > units:
                raise PlacementError(f"tp {tp}: the experts have {units} units of {MLP_UNIT} columns")
            self.experts = ((0, model.num_experts),) * tp
            self.mlp_units = spans(_checked("mlp_units", asked.mlp_units, tp, units) or split_evenly(units, tp))
        vocab = _checked("vocab", asked.vocab, tp, model.vocab_size)
        self.vocab = spans(vocab or split_evenly(model.vocab_size, tp))

    def _heads(
        self, model: ModelConfig, tensor: int, asked: tuple[int, ...]
    ) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
        kv_heads, group = model.num_kv_heads, model.num_attention_heads // model.num_kv_heads
        if asked:
            owned = spans(_checked("kv_heads", asked, tensor, kv_heads))
            return owned, tuple((begin * group, end * group) for begin, end in owned)
        if (problem := _heads_problem(model, tensor)) is not None:
            raise PlacementError(problem)
        queries = spans(split_evenly(model.num_attention_heads, tensor))
        if tensor <= kv_heads:
            return spans(split_evenly(kv_heads, tensor)), queries
        # More ranks than KV heads: each head is kept by as many ranks, which share its query heads out.
        copies = tensor // kv_heads
        return tuple((rank // copies, rank // copies + 1) for rank in range(tensor)), queries


def _checked(name: str, counts: tuple[int, ...], parts: int, whole: int) -> tuple[int, ...]:
    if counts and (len(counts) != parts or sum(counts) != whole or min(counts) < 0):
        raise PlacementError(f"shares of {name}: {list(counts)} is not {parts} counts that add up to {whole}")
    if name == "layers" and counts and min(counts) < 1:
        raise PlacementError(f"shares of layers: {list(counts)} leaves a stage without a layer")
    return counts


Seat = tuple[str, Device]


class _Seating:
    """Take devices for every rank, in rank order."""

    def __init__(self, sizes: ParallelSizes, hosts: Sequence[HostSpec], options: PlacementOptions) -> None:
        self._sizes, self._options = sizes, options
        self._hosts = tuple(hosts)
        self._main = _backend(hosts)
        self._stages = self._stage_needs()
        backends = {"cpu", self._main}
        self._free = {host.name: {kind: list(host.of(kind)) for kind in backends} for host in hosts}

    def _stage_needs(self) -> list[dict[str, int]]:
        """Devices of each kind for every stage of an engine."""
        tp, pp, cpus = self._sizes.tensor, self._sizes.pipeline, self._options.cpu_ranks
        if self._main == "cpu" or not cpus:
            return [{self._main: tp}] * pp
        if cpus >= tp * pp:
            raise PlacementError(f"cpu-ranks {cpus}: an engine has {tp * pp} ranks, and one must stay on a GPU")
        if pp == 1:
            return [{"cuda": tp - cpus, "cpu": cpus}]
        if cpus % tp:
            raise PlacementError(f"cpu-ranks {cpus}: with pp {pp} whole stages of {tp} move, a multiple of {tp}")
        return [{"cpu": tp}] * (cpus // tp) + [{"cuda": tp}] * (pp - cpus // tp)

    def seats(self) -> list[Seat]:
        """Raises: PlacementError naming what is missing."""
        total = sum(len(host.of(self._main)) for host in self._hosts)
        need = self._sizes.data * sum(stage.get(self._main, 0) for stage in self._stages)
        if need > total:
            raise PlacementError(f"{self._sizes} needs {need} {_kind(self._main, need)}, {self._have()}")
        if self._options.strategy == "strict-spread" and self._sizes.pipeline == 1 and self._sizes.tensor > 1:
            raise PlacementError(
                f"{self._sizes}: strict-spread puts the stages of an engine on different nodes, and with pp 1 there is "
                f"one: its {self._sizes.tensor} tensor ranks stay together (use pp, or spread)"
            )
        seats: list[Seat] = []
        for engine in range(self._sizes.data):
            taken = self._take_engine()
            if taken is None:
                raise PlacementError(self._refusal(engine))
            seats += taken
        idle = sum(len(free[self._main]) for free in self._free.values())
        if self._options.exact and idle:
            raise PlacementError(f"{self._sizes} leaves {idle} {_kind(self._main, idle)} idle, and exact forbids that")
        return seats

    def _have(self) -> str:
        counts = [len(host.of(self._main)) for host in self._hosts]
        if len(counts) == 1:
            return f"{self._hosts[0].name} has {counts[0]}"
        if len(set(counts)) == 1:
            return f"{len(counts)} nodes have {counts[0]} each"
        return "there are " + ", ".join(f"{n} on {host.name}" for n, host in zip(counts, self._hosts, strict=True))

    def _refusal(self, engine: int) -> str:
        strategy = self._options.strategy
        where = {
            "strict-pack": "no node has room for a whole engine",
            "strict-spread": f"its {len(self._stages)} stages find no {len(self._stages)} different nodes",
        }.get(strategy, "its ranks find no free devices together")
        return f"{self._sizes}: engine {engine} cannot be placed by {strategy}: {where} ({self._have()})"

    def _take_engine(self) -> list[Seat] | None:
        strategy = self._options.strategy
        if strategy.endswith("pack"):
            whole = {kind: sum(stage.get(kind, 0) for stage in self._stages) for kind in ("cuda", "cpu")}
            for host in self._hosts:
                if self._has(host.name, whole):
                    return [seat for stage in self._stages for seat in self._take(host.name, stage)]
            if strategy == "strict-pack":
                return None
        seats: list[Seat] = []
        used: list[str] = []
        for stage in self._stages:
            names = [host.name for host in self._hosts if self._has(host.name, stage)]
            if strategy.endswith("spread"):
                fresh = [name for name in names if name not in used]
                names = sorted(fresh or ([] if strategy == "strict-spread" else names), key=self._room, reverse=True)
            elif used and used[-1] in names:
                names = [used[-1]]
            taken = self._take(names[0], stage) if names else self._take_across(stage)
            if taken is None:
                return None
            used.append(taken[-1][0])
            seats += taken
        return seats

    def _take_across(self, stage: dict[str, int]) -> list[Seat] | None:
        """Spread one stage over nodes in equal parts, only where no node could ever hold it."""
        (kind, count), *mixed = stage.items()
        if mixed or self._options.strategy.startswith("strict"):
            return None
        if any(len(host.of(kind)) >= count for host in self._hosts):
            return None
        for parts in range(2, len(self._hosts) + 1):
            if count % parts:
                continue
            names = [host.name for host in self._hosts if self._has(host.name, {kind: count // parts})]
            if len(names) >= parts:
                return [seat for name in names[:parts] for seat in self._take(name, {kind: count // parts})]
        return None

    def _room(self, name: str) -> int:
        return len(self._free[name][self._main])

    def _has(self, name: str, need: dict[str, int]) -> bool:
        return all(len(self._free[name].get(kind, ())) >= count for kind, count in need.items())

    def _take(self, name: str, need: dict[str, int]) -> list[Seat]:
        seats: list[Seat] = []
        for kind in ("cuda", "cpu"):
            free = self._free[name].get(kind, [])
            seats += [(name, free.pop(0)) for _ in range(need.get(kind, 0))]
        return seats


def _kind(backend: str, count: int) -> str:
    return ("GPU" if backend == "cuda" else "CPU rank") + ("" if count == 1 else "s")


def _build(model: ModelConfig, sizes: ParallelSizes, seats: Sequence[Seat], shares: _Shares) -> Placement:
    ranks = []
    for index, (node, device) in enumerate(seats):
        rest, tp = divmod(index, sizes.tensor)
        dp, pp = divmod(rest, sizes.pipeline)
        ranks.append(
            RankSpec(
                rank=index,
                node=node,
                device=device.name,
                dp_rank=dp,
                pp_rank=pp,
                tp_rank=tp,
                layers=shares.layers[pp],
                kv_heads=shares.kv_heads[tp],
                mlp_units=shares.mlp_units[tp],
                experts=shares.experts[tp],
                query_heads=shares.query_heads[tp],
                vocab=shares.vocab[tp] if pp == sizes.pipeline - 1 else (0, 0),
                has_embedding=pp == 0,
                numa_node=device.numa_node,
                cores=device.cores,
            )
        )
    return Placement(sizes.data, sizes.pipeline, sizes.tensor, tuple(ranks), sizes.expert_parallel)
