"""What a drawing of a placement shows, gathered from whichever plan there is: nodes, ranks, links, memory, remarks.

Pure; both the terminal's drawing and the SVG are made from this value, so they cannot tell different things.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING

from engine.config import ModelConfig
from engine.placement import KVRoute, Placement, RankSpec, Remark, remarks
from launcher.plan.inventory import Inventory
from launcher.plan.links import TCP, Link, between_link, inside_link
from launcher.plan.rank_memory import RankMemory, Sizing

if TYPE_CHECKING:
    from launcher.plan.cluster_plan import ClusterPlan
    from launcher.plan.launch_plan import LaunchPlan


@dataclass(frozen=True, slots=True)
class PictureNode:
    """One node: `hardware` in words, `inside` joins its ranks, `idle` devices have none, `nics` by rank."""

    name: str
    role: str
    address: str
    hardware: str
    inside: Link
    ranks: tuple[RankSpec, ...]
    idle: tuple[str, ...]
    network: str = ""
    nics: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Hop:
    """A stage border of one engine: from the last stage's node to the next one's."""

    engine: int
    stage: int
    source: str
    target: str
    link: Link


@dataclass(frozen=True, slots=True)
class KVFlow:
    """Finished KV blocks on their way from one engine to another: `routes` between ranks, in bfloat16 per token."""

    source: int
    target: int
    routes: tuple[KVRoute, ...]
    nodes: tuple[str, ...]
    link: Link
    bytes_per_token: int


@dataclass(frozen=True, slots=True)
class Picture:
    """Everything a drawing needs. `memory` by rank may be empty."""

    title: str
    placement: Placement
    model: ModelConfig
    nodes: tuple[PictureNode, ...]
    between: Link
    memory: Mapping[int, RankMemory]
    remarks: tuple[Remark, ...]

    @property
    def bytes_per_token(self) -> int:
        """What one hop carries for one token: its hidden state in bfloat16."""
        return 2 * self.model.hidden_size

    def hops(self) -> tuple[Hop, ...]:
        """All stage borders, engine by engine."""
        placement = self.placement
        by_name = {node.name: node for node in self.nodes}
        found = []
        for engine in range(placement.data_parallel_size):
            for stage in range(placement.pipeline_parallel_size - 1):
                source = placement.stage(engine, stage)[-1].node
                target = placement.stage(engine, stage + 1)[0].node
                link = by_name[source].inside if source == target else self.between
                found.append(Hop(engine, stage, source, target, link))
        return tuple(found)

    def kv_flows(self) -> tuple[KVFlow, ...]:
        """What every KV link of the placement moves. A head that several ranks keep is counted once per receiver."""
        placement = self.placement
        found = []
        for link in placement.kv_links:
            alone = replace(placement, kv_links=(link,)).kv_routes()
            ends = [rank for route in alone for rank in (route.source, route.target)]
            received = {(route.target, route.layers, route.kv_heads) for route in alone}
            cells = sum((layers[1] - layers[0]) * (heads[1] - heads[0]) for _, layers, heads in received)
            nodes = tuple(dict.fromkeys(placement.ranks[rank].node for rank in ends))
            apart = any(placement.ranks[r.source].node != placement.ranks[r.target].node for r in alone)
            edge = self.between if apart or not ends else self.group_link(ends[:2])
            size = 2 * 2 * cells * self.model.head_dim
            found.append(KVFlow(link.source_dp, link.target_dp, alone, nodes, edge, size))
        return tuple(found)

    def group_link(self, ranks: Sequence[int]) -> Link:
        names = {self.placement.ranks[rank].node for rank in ranks}
        return self.between if len(names) > 1 else next(n.inside for n in self.nodes if n.name in names)


def picture_of(
    title: str,
    placement: Placement,
    model: ModelConfig,
    inventories: Mapping[str, Inventory],
    *,
    between: Link = TCP,
    roles: Mapping[str, tuple[str, str]] | None = None,
    memory: Sequence[RankMemory] = (),
    found: Sequence[Remark] | None = None,
) -> Picture:
    """Gather a picture; `roles` gives (role, address) by node name, `found` the remarks if they are known."""
    nodes = tuple(
        _node(name, inventory, placement, *(roles or {}).get(name, ("", ""))) for name, inventory in inventories.items()
    )
    if found is None:
        found = remarks(placement, model, has_rdma=between.name == "RDMA")
    return Picture(title, placement, model, nodes, between, {item.rank: item for item in memory}, tuple(found))


def picture_of_cluster(plan: ClusterPlan) -> Picture | None:
    """Gather the picture of a planned cluster; None without a placement."""
    if plan.placement is None or plan.model is None:
        return None
    inventories = {item.node.name: inventory for item, inventory in zip(plan.nodes, plan.inventories, strict=True)}
    return picture_of(
        f"{plan.name} on {plan.cluster.name}",
        plan.placement,
        plan.model,
        inventories,
        between=between_link(plan.cluster, inventories),
        roles={item.name: (item.node.role, item.node.ip) for item in plan.nodes},
        memory=[memory for item in plan.nodes for memory in item.memory],
        found=plan.remarks,
    )


def picture_of_launch(plan: LaunchPlan) -> Picture | None:
    """Gather the picture of a launch on one host, or on nodes that join and are taken to be like it."""
    if plan.placement is None or plan.model is None:
        return None
    nodes = plan.config.nodes.names or (plan.inventory.node,)
    where = plan.inventory.node if len(nodes) == 1 else f"{len(nodes)} nodes"
    inventories = dict.fromkeys(nodes, plan.inventory)
    found = remarks(plan.placement, plan.model, has_rdma=False)
    if plan.placement.crossing(plan.placement.tp_groups):
        from launcher.plan.borders import weighed

        found = weighed(found, plan.placement, Sizing(plan.config, plan.model, inventories), TCP)
    return picture_of(
        f"{plan.name} on {where}",
        plan.placement,
        plan.model,
        inventories,
        memory=plan.memory,
        found=found,
    )


def _node(name: str, inventory: Inventory, placement: Placement, role: str, address: str) -> PictureNode:
    ranks = placement.on_node(name)
    used = {rank.device for rank in ranks}
    is_gpu = any(rank.backend == "cuda" for rank in ranks) or bool(inventory.gpus and not ranks)
    idle = tuple(device for gpu in inventory.gpus if (device := f"cuda:{gpu.index}") not in used)
    return PictureNode(
        name=name,
        role=role,
        address=address,
        hardware=hardware(inventory),
        inside=inside_link(inventory, is_gpu=is_gpu),
        ranks=ranks,
        idle=idle,
        network=network(inventory),
        nics={rank.rank: nics_of(inventory, rank) for rank in ranks},
    )


def hardware(inventory: Inventory) -> str:
    """Say what a host computes with: `8 x NVIDIA H100 80GB HBM3`, or its processor."""
    if not inventory.gpus:
        return f"{inventory.cpu_cores} cores, {inventory.memory_total_bytes / (1 << 30):.0f} GiB, no GPU"
    names = [gpu.name for gpu in inventory.gpus]
    return ", ".join(
        f"{len(list(group))} x {name}" if names.count(name) > 1 else name for name, group in groupby(names)
    )


def network(inventory: Inventory) -> str:
    """Say what leads out of a host: active RDMA ports, else interfaces that are up with an address."""
    ports = [port for port in inventory.rdma_ports if port.is_active]
    if ports:
        return ", ".join(port.device + (f" {port.rate_gbps:g} Gb/s" if port.rate_gbps else "") for port in ports)
    return ", ".join(nic.name for nic in inventory.nics if nic.addresses)


def nics_of(inventory: Inventory, rank: RankSpec) -> tuple[str, ...]:
    """List what a rank reaches other nodes by: active RDMA ports, of its NUMA node where that is known.

    Without RDMA the interfaces that are up with an address; empty where the inventory has neither.
    """
    ports = [port for port in inventory.rdma_ports if port.is_active]
    if ports:
        near = [port for port in ports if None not in (rank.numa_node, port.numa_node)]
        near = [port for port in near if port.numa_node == rank.numa_node]
        return tuple(dict.fromkeys(port.device for port in near or ports))
    return tuple(nic.name for nic in inventory.nics if nic.addresses)


def device_span(devices: Sequence[str]) -> str:
    """Write devices briefly: `cuda:0-3`, `cpu:0, cpu:2`."""
    runs: list[tuple[str, int, int]] = []
    for device in devices:
        kind, _, number = device.partition(":")
        if not number.isdigit():
            runs.append((device, -1, -1))
        elif runs and runs[-1][0] == kind and runs[-1][2] + 1 == int(number):
            runs[-1] = (kind, runs[-1][1], int(number))
        else:
            runs.append((kind, int(number), int(number)))
    return ", ".join(
        kind if first < 0 else f"{kind}:{first}" + (f"-{last}" if last > first else "") for kind, first, last in runs
    )


def alike(memory: Mapping[int, RankMemory], ranks: Sequence[int]) -> list[tuple[list[int], RankMemory]]:
    """Group ranks whose memory is the same in all but number and device, in rank order."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for rank in ranks:
        if rank in memory:
            item = memory[rank]
            key = (item.budget_bytes, item.stored_bytes, item.activation_bytes, item.runtime_bytes, item.kv_bytes)
            groups.setdefault(key, []).append(rank)
    return [(members, memory[members[0]]) for members in groups.values()]


def rank_span(ranks: Sequence[int]) -> str:
    """Write ranks briefly: `0-3, 6`."""
    return device_span([f"r:{rank}" for rank in ranks]).replace("r:", "")


def span(bounds: tuple[int, int]) -> str:
    """Write a half-open range as people count: `0-3`, `5`, and `-` for an empty one."""
    begin, end = bounds
    return "-" if begin == end else str(begin) if end == begin + 1 else f"{begin}-{end - 1}"
