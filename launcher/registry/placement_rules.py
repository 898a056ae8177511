"""Rules between a model's ranks and the cluster it runs on.

Knows: numbers of ranks, GPUs and nodes, the shape of models that are known without their files, ports. Refuses to know:
memory (the planner), what the hosts really have. Whether ranks find their places is asked of `engine.placement`, so a
registry that passes here is one that the planner can place.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, cast

from engine.config import ModelConfig
from engine.placement import Device, HostSpec, ParallelSizes, PlacementError, PlacementOptions, place, remarks
from launcher.registry.cluster import Cluster, Node
from launcher.registry.cluster_rules import EPHEMERAL_PORTS, RAY_CLIENT_PORT, ray_ports
from launcher.registry.findings import Finding, Values, highest, whole
from launcher.registry.suggest import did_you_mean
from launcher.registry.types import DeclaredCluster

_UNIFIED_SHARE = 0.85
_SIZES = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")


def placement_findings(values: Values, declared: DeclaredCluster | None) -> Iterator[Finding]:
    """Return every broken rule about ranks; `declared` None: this host, or a cluster that is itself in doubt."""
    yield from _backend(values, declared)
    shape = _known_shape(str(values["model"].value))
    shape_problems = list(shape_findings(values, shape)) if shape is not None else []
    yield from shape_problems
    if declared is None:
        return
    cluster = declared.cluster
    unknown = list(_node_names(values, cluster))
    yield from unknown
    yield from _ports(values, cluster)
    yield from _shared_memory(values, cluster)
    if not unknown and not shape_problems:
        yield from _ranks(values, cluster, shape)


def _backend(values: Values, declared: DeclaredCluster | None) -> Iterator[Finding]:
    key = "distributed-executor-backend"
    backend = values[key].value
    ranks = whole(values, _SIZES[0]) * whole(values, _SIZES[1]) * whole(values, _SIZES[2])
    if backend == "uni" and ranks > 1:
        yield Finding(
            "error",
            "backend-ranks",
            key,
            f"uni runs one rank, but tensor x pipeline x data parallel asks for {ranks}",
            "use mp, ray or auto",
        )
    if backend in ("ray", "ray-cgraph") and declared is not None and declared.cluster.ray is None:
        yield Finding(
            "error",
            "backend-ranks",
            key,
            f"{backend} needs Ray, but the cluster {declared.name} has no ray block",
            "add ray: {} to the cluster, or use auto",
        )


@lru_cache(maxsize=64)
def _known_shape(model: str) -> ModelConfig | None:
    from launcher.plan.known_models import known_model

    return known_model(model)


def shape_findings(values: Values, shape: ModelConfig) -> Iterator[Finding]:
    """Return what a model's own numbers forbid: splits that do not come out even, a context beyond its limit."""
    tp, pp = whole(values, _SIZES[0]), whole(values, _SIZES[1])
    heads, kv_heads = shape.num_attention_heads, shape.num_kv_heads
    if heads % tp or (kv_heads % tp and tp % kv_heads):
        fits = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
        yield Finding(
            "error",
            "heads-tp",
            _SIZES[0],
            f"{heads} attention heads and {kv_heads} KV heads cannot be split over {tp} ranks",
            f"use one of {', '.join(map(str, fits))}",
        )
    if pp > shape.num_layers:
        yield Finding(
            "error",
            "layers-pp",
            _SIZES[1],
            f"{shape.num_layers} layers cannot fill {pp} stages",
            f"use at most {shape.num_layers}",
        )
    length = values["max-model-len"].value
    if isinstance(length, int) and length > shape.max_position_embeddings:
        yield Finding(
            "error",
            "context-too-long",
            "max-model-len",
            f"the model's limit is {shape.max_position_embeddings} tokens, not {length}",
            f"use at most {shape.max_position_embeddings}, or auto",
        )


def _node_names(values: Values, cluster: Cluster) -> Iterator[Finding]:
    names = [node.name for node in cluster.nodes]
    for name in _asked_nodes(values):
        if name not in names:
            hint = did_you_mean(name, names) or f"nodes: {', '.join(names[:8])}"
            yield Finding("error", "unknown-ref", "placement.nodes", f"{cluster.name} has no node {name!r}", hint)


def _asked_nodes(values: Values) -> tuple[str, ...]:
    asked = values["placement.nodes"].value
    return tuple(str(name) for name in asked) if isinstance(asked, tuple) else ()


def _ports(values: Values, cluster: Cluster) -> Iterator[Finding]:
    port = whole(values, "port")
    if cluster.ray is not None:
        owners = {RAY_CLIENT_PORT: "Ray's client server's"}
        owners |= {number: f"ray.{key} of the cluster" for key, number in ray_ports(cluster.ray).items()}
        first, last = cluster.ray.worker_ports
        if port in owners:
            yield Finding(
                "error", "port-clash", "port", f"{port} is already {owners[port]}", "choose another, such as 8000"
            )
            return
        if first <= port <= last:
            message = f"{port} is inside ray.worker-ports {first}-{last} of the cluster"
            yield Finding("error", "port-clash", "port", message, "choose a port outside, such as 8000")
            return
    if EPHEMERAL_PORTS[0] <= port <= EPHEMERAL_PORTS[1]:
        message = f"{port} is in Linux's range for outgoing connections ({'-'.join(map(str, EPHEMERAL_PORTS))})"
        yield Finding("warning", "ephemeral-overlap", "port", message, "choose a port below 32768")


def _shared_memory(values: Values, cluster: Cluster) -> Iterator[Finding]:
    """On a machine whose GPU and CPU share one memory, the usual share starves the system while weights load."""
    share = values["gpu-memory-utilization"].value
    if cluster.platform == "gb10" and isinstance(share, float) and share > _UNIFIED_SHARE:
        message = f"{share} of a memory that the system needs too: nodes of {cluster.name} may kill processes or hang"
        yield Finding("warning", "unified-memory", "gpu-memory-utilization", message, f"use at most {_UNIFIED_SHARE}")


def _ranks(values: Values, cluster: Cluster, shape: ModelConfig | None) -> Iterator[Finding]:
    """Whether the ranks find their places. On CPUs the planner decides: cores are no units."""
    asked = _asked_nodes(values)
    nodes = [node for node in cluster.nodes if not asked or node.name in asked]
    gpus = sum(node.gpus for node in nodes)
    if gpus == 0 or values["device"].value == "cpu" or cluster.platform == "cpu":
        return
    tp, pp, dp = (whole(values, key) for key in _SIZES)
    cpu_ranks = whole(values, "placement.cpu-ranks")
    need = dp * (tp * pp - cpu_ranks)
    blamed = highest(values, "placement.cpu-ranks", *_SIZES) if need != gpus else "model"
    counts = ", ".join(f"{node.name} {node.gpus}" for node in nodes[:6]) + (", …" if len(nodes) > 6 else "")
    if cpu_ranks >= tp * pp and cpu_ranks:
        yield Finding(
            "error",
            "world-exceeds-gpus",
            "placement.cpu-ranks",
            f"{cpu_ranks} CPU ranks leave none of an engine's {tp * pp} on a GPU",
            f"use at most {tp * pp - 1}, or device: cpu",
        )
    elif need > gpus:
        message = f"tp {tp} x pp {pp} x dp {dp} needs {need} GPUs, {cluster.name} has {gpus} ({counts})"
        outcome = None if shape is None else _placed(values, cluster, tuple(nodes), shape)
        hint = _alternatives(outcome, ParallelSizes(dp, pp, tp)) if isinstance(outcome, PlacementError) else ""
        hint = hint or f"lower tp, pp or dp: their product is at most {gpus}"
        yield Finding("error", "world-exceeds-gpus", blamed, message, hint)
    elif values["placement.exact"].value is True and need < gpus:
        message = f"tp {tp} x pp {pp} x dp {dp} leaves {gpus - need} of {gpus} GPUs idle ({counts})"
        yield Finding("error", "world-exceeds-gpus", "placement.exact", message, "raise a size, or remove exact")
    elif shape is not None:
        yield from _seats(values, cluster, tuple(nodes), shape)


def _seats(values: Values, cluster: Cluster, nodes: tuple[Node, ...], shape: ModelConfig) -> Iterator[Finding]:
    """Ask the engine's own placing, and pass on what it warns about."""
    is_strict = str(values["placement.strategy"].value).startswith("strict")
    first = ("placement.strategy",) if is_strict else ()
    blamed = highest(values, *first, *_SIZES, "placement.nodes")
    tp, pp, dp = (whole(values, key) for key in _SIZES)
    outcome = _placed(values, cluster, nodes, shape)
    if isinstance(outcome, PlacementError):
        hint = _alternatives(outcome, ParallelSizes(dp, pp, tp)) or "lower a size"
        yield Finding("error", "rank-spread", blamed, outcome.message, hint)
        return
    for code, message, hint in outcome:
        yield Finding("warning", code, _SIZES[0], message, hint)


_Outcome = PlacementError | tuple[tuple[str, str, str], ...]
"""Why ranks find no place, or what is to be said of the place they found: code, message, hint."""


def _placed(values: Values, cluster: Cluster, nodes: tuple[Node, ...], shape: ModelConfig) -> _Outcome:
    strategy = cast(Literal["pack", "spread", "strict-pack", "strict-spread"], str(values["placement.strategy"].value))
    options = PlacementOptions(
        strategy, _asked_nodes(values), values["placement.exact"].value is True, whole(values, "placement.cpu-ranks")
    )
    tp, pp, dp = (whole(values, key) for key in _SIZES)
    seats = tuple((node.name, node.gpus) for node in nodes)
    return _judge(shape, ParallelSizes(dp, pp, tp), seats, options, cluster.fabric.rdma != "off")


def _alternatives(error: PlacementError, asked: ParallelSizes) -> str:
    """Write the nearest sizes that have a place: `use tp 2, or tp 1 pp 2`; empty where there are none."""
    ways = []
    for sizes in error.alternatives:
        axes = (
            ("tp", sizes.tensor, asked.tensor),
            ("pp", sizes.pipeline, asked.pipeline),
            ("dp", sizes.data, asked.data),
        )
        ways.append(" ".join(f"{name} {size}" for name, size, old in axes if size != old or size > 1))
    return f"use {', or '.join(way for way in ways if way)}" if any(ways) else ""


@lru_cache(maxsize=256)
def _judge(
    shape: ModelConfig,
    sizes: ParallelSizes,
    seats: tuple[tuple[str, int], ...],
    options: PlacementOptions,
    has_rdma: bool,
) -> _Outcome:
    hosts = [
        HostSpec(
            name,
            (
                *(Device(f"cuda:{index}") for index in range(gpus)),
                *(Device(f"cpu:{index}") for index in range(options.cpu_ranks)),
            ),
        )
        for name, gpus in seats
    ]
    try:
        placement = place(shape, sizes, hosts, options)
    except PlacementError as error:
        return error
    if has_rdma:
        return ()
    found = remarks(placement, shape, has_rdma=has_rdma)
    return tuple((item.code, item.message, item.hint) for item in found if item.code == "tp-over-slow-link")
