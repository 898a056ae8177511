"""From an entry's sizes to hosts and devices that can be ranks, and how ranks share a host's cores.

Knows: registry keys of sizes and placement, inventories. Refuses to know: who gets what (`engine.placement`), bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from engine.config import EngineConfig
from engine.placement import (
    Device,
    HostSpec,
    ParallelSizes,
    Placement,
    PlacementError,
    PlacementOptions,
    RankSpec,
    Strategy,
)
from launcher.errors import DoesNotFit
from launcher.plan.inventory import Gpu, Inventory
from launcher.registry.cluster import Cluster
from launcher.registry.types import Layer, ResolvedEntry


def whole_value(entry: ResolvedEntry, key: str, otherwise: int) -> int:
    """Read a number or flag of a key that an older schema may lack."""
    item = entry.values.get(key)
    return item.value if item is not None and isinstance(item.value, (bool, int)) else otherwise


def entry_sizes(entry: ResolvedEntry) -> ParallelSizes:
    """Read the parallel sizes that an entry asks for."""
    data, pipeline, tensor = (entry.integer(f"{axis}-parallel-size") for axis in ("data", "pipeline", "tensor"))
    return ParallelSizes(data, pipeline, tensor, bool(whole_value(entry, "enable-expert-parallel", False)))


def expert_notes(entry: ResolvedEntry, sizes: ParallelSizes) -> list[str]:
    """Say that expert parallel has no effect without tensor ranks; elsewhere data parallel engines share experts."""
    if not sizes.expert_parallel or sizes.tensor > 1:
        return []
    # A general `defaults:` is not a statement about this model.
    if entry.origin("enable-expert-parallel").layer is Layer.DEFAULTS:
        return []
    return ["expert parallel shares experts within a tensor group, and tp is 1: it changes nothing; set tp"]


_STRATEGIES: Mapping[str, Strategy] = {name: name for name in ("pack", "spread", "strict-pack", "strict-spread")}


def placement_options(entry: ResolvedEntry) -> PlacementOptions:
    """Read the wishes beside the sizes."""
    strategy = entry.values.get("placement.strategy")
    names = entry.values.get("placement.nodes")
    return PlacementOptions(
        strategy=_STRATEGIES[str(strategy.value)] if strategy is not None else "pack",
        nodes=names.value if names is not None and isinstance(names.value, tuple) else (),
        exact=bool(whole_value(entry, "placement.exact", False)),
        cpu_ranks=whole_value(entry, "placement.cpu-ranks", 0),
    )


def hosts_of(
    cluster: Cluster, hardware: Mapping[str, Inventory], world: int, *, is_gpu: bool, cpu_ranks: int = 0
) -> tuple[HostSpec, ...]:
    """List the devices of every node: its GPUs, or one CPU rank per NUMA node.

    CPU ranks that outnumber NUMA nodes share them, as many on each node as needed.
    """
    cpus_wanted = cpu_ranks if is_gpu else world
    slots = sum(hardware[node.name].numa_nodes for node in cluster.nodes)
    each = -(-cpus_wanted // len(cluster.nodes)) if cpus_wanted > slots else 0
    hosts = []
    for node in cluster.nodes:
        inventory = hardware[node.name]
        gpus = [Device(f"cuda:{gpu.index}", gpu.numa_node) for gpu in inventory.gpus] if is_gpu else []
        count = max(inventory.numa_nodes, each) if cpus_wanted else 0
        hosts.append(HostSpec(node.name, (*gpus, *(_cpu(inventory, slot) for slot in range(count)))))
    return tuple(hosts)


def this_host(inventory: Inventory, gpus: Mapping[int, Gpu], world: int) -> HostSpec:
    """List the devices of one host for `world` ranks: `gpus` by their number, else a CPU rank for each.

    Ranks take NUMA nodes in turn, so that all memory channels serve.
    """
    devices = [Device(f"cuda:{number}", gpu.numa_node) for number, gpu in gpus.items()]
    return HostSpec(inventory.node, tuple(devices or (_cpu(inventory, slot) for slot in range(world))))


def with_placement(config: EngineConfig, placement: Placement) -> EngineConfig:
    """Hand a placement to the engine, with the sizes that it was made for."""
    sizes = placement.sizes
    return replace(
        config,
        placement=placement.to_json(),
        tensor_parallel_size=sizes.tensor,
        pipeline_parallel_size=sizes.pipeline,
        data_parallel_size=sizes.data,
        enable_expert_parallel=sizes.expert_parallel,
    )


def threads_per_rank(ranks: Sequence[RankSpec], inventory: Inventory) -> int:
    """Share a host's cores out among its CPU ranks, one core left for the server; at least one thread each.

    Ranks of one NUMA node share its cores, and the fullest node decides: in every layer the slowest rank is waited for.
    """
    shares = [(inventory.cpu_cores - 1) // len(ranks)]
    for numa in inventory.numa:
        if count := sum(rank.numa_node == numa.index for rank in ranks):
            shares.append(len(numa.cores) // count)
    return max(1, min(shares))


def _cpu(inventory: Inventory, slot: int) -> Device:
    if not inventory.numa:
        return Device(f"cpu:{slot}", slot % inventory.numa_nodes)
    numa = inventory.numa[slot % len(inventory.numa)]
    return Device(f"cpu:{slot}", numa.index, numa.cores)


def no_placement(error: PlacementError, sizes: ParallelSizes) -> DoesNotFit:
    """Make the launcher's error of one that has no placement: the nearest sizes as settings to paste."""

    def settings_of(other: ParallelSizes) -> str:
        pairs = (
            ("tp", other.tensor, sizes.tensor),
            ("pp", other.pipeline, sizes.pipeline),
            ("dp", other.data, sizes.data),
        )
        return " ".join(f"--set {name}={size}" for name, size, old in pairs if size != old)

    ways = "  or  ".join(settings_of(other) for other in error.alternatives)
    return DoesNotFit(f"no placement: {error.message}", hint=f"possible: {ways}" if ways else "")
