"""Nodes that are started by hand and join: what the head plans for all of them, and each of them for itself.

Knows: `--nnodes`, `--node-rank`, `--head-addr`, that nodes are taken to be alike until they join. Refuses to know: how
they join (the engine's business), clusters that a registry declares (`launcher.plan.cluster_plan`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from engine.config import EngineConfig, NodesConfig
from engine.node_secret import SECRET_FILE_VARIABLE, SECRET_VARIABLE, SecretError, read_secret
from engine.placement import HostSpec, ParallelSizes, Placement, RankSpec
from launcher.addresses import host_and_port
from launcher.errors import DoesNotFit, HlaunchError, PreflightError, UsageError
from launcher.plan.environment import Variable
from launcher.plan.inventory import Gpu, Inventory
from launcher.plan.placing import this_host
from launcher.sizes import counted

DEFAULT_HEAD_PORT = 29540
MAX_NODES = 64
_ANY_ADDRESS = ("0.0.0.0", "::", "*")


def parse_nodes(nnodes: int, node_rank: int | None, head_addr: str | None, node_addr: str | None) -> NodesConfig | None:
    """Read the options of `up`; None means one node. Raises: UsageError naming the option that is wrong or missing."""
    if nnodes == 1 and node_rank in (None, 0) and head_addr is None and node_addr is None:
        return None
    if not 2 <= nnodes <= MAX_NODES:
        raise UsageError(f"--nnodes {nnodes}: 2 to {MAX_NODES} nodes, or leave all three away for one")
    if node_rank is None or head_addr is None:
        raise UsageError(
            "several nodes need --nnodes, --node-rank and --head-addr",
            hint=f"on the head: --nnodes {nnodes} --node-rank 0 --head-addr ITS_ADDRESS; elsewhere --node-rank 1, 2, …",
        )
    if not 0 <= node_rank < nnodes:
        raise UsageError(f"--node-rank {node_rank}: the nodes of --nnodes {nnodes} are 0 to {nnodes - 1}")
    if node_rank == 0 and node_addr is not None:
        raise UsageError(
            f"--node-addr {node_addr}: the head's own address is that of --head-addr",
            hint="leave --node-addr away; where the head is reached otherwise, say so in --head-addr on every node",
        )
    host, port = _split(head_addr)
    for option, address in (("--head-addr", host), ("--node-addr", node_addr)):
        if address in _ANY_ADDRESS:
            # Ranks would listen on every network that this host is on, and nobody can come to such an address.
            raise UsageError(f"{option} {address} is no address of one node", hint="name the one on the nodes' network")
    names = tuple(f"node{rank}" for rank in range(nnodes))
    addresses = tuple(node_addr or "" if rank == node_rank else "" for rank in range(nnodes)) if node_addr else ()
    return NodesConfig(names=names, rank=node_rank, addresses=addresses, head_host=host, head_port=port)


def _split(address: str) -> tuple[str, int]:
    """Split HOST[:PORT]; an IPv6 address with a port stands in brackets."""
    host, port = address, ""
    if address.startswith("["):
        host, bracket, rest = address[1:].partition("]")
        host, port = (host if bracket and rest[:1] in ("", ":") else ""), rest.removeprefix(":")
    elif address.count(":") == 1:
        host, _, port = address.partition(":")
    if not host or (port and not (port.isdecimal() and len(port) <= 5 and 1 <= int(port) <= 65535)):
        raise UsageError(f"--head-addr {address!r} is not HOST[:PORT]", hint="for example: --head-addr 10.0.0.1:29540")
    return host, int(port) if port else DEFAULT_HEAD_PORT


def head_to_join(nodes: NodesConfig) -> str:
    """Write where this node joins the head, HOST:PORT; empty on the head, and where there is one node."""
    return host_and_port(nodes.head_host, nodes.head_port) if nodes.rank else ""


def hosts_of_nodes(
    nodes: NodesConfig, inventory: Inventory, gpus: Mapping[int, Gpu], world: int
) -> tuple[HostSpec, ...]:
    """List every node's devices, as this one's: its GPUs, or an equal part of the CPU ranks."""
    each = -(-world // len(nodes.names))
    return tuple(replace(this_host(inventory, gpus, each), name=name) for name in nodes.names)


def fullest_node(placement: Placement) -> tuple[RankSpec, ...]:
    """The ranks of the node that has most of them."""
    return max((placement.on_node(node) for node in placement.nodes), key=len)


def node_problems(nodes: NodesConfig, sizes: ParallelSizes, placement: Placement | None) -> list[HlaunchError]:
    """List what makes these nodes senseless for a placement."""
    count = len(nodes.names)
    if sizes.world < count:
        return [
            DoesNotFit(
                f"{sizes}: {counted(sizes.world, 'rank')} for {count} nodes",
                hint=f"add --set pp={count}, or --set dp={count}: one engine on each node",
            )
        ]
    idle = [name for name in nodes.names if placement is not None and name not in placement.nodes]
    if not idle:
        return []
    return [
        DoesNotFit(
            f"{sizes} leaves {', '.join(idle)} without a rank",
            hint="fewer --nnodes, more ranks, or --set placement.strategy=spread",
        )
    ]


def secret_blockers(environ: Mapping[str, str]) -> list[HlaunchError]:
    """Say what keeps the nodes' secret from being used: none, two, a file that others may read, one too short."""
    try:
        read_secret(environ)
    except SecretError as error:
        return [PreflightError(str(error), hint=error.hint)]
    return []


def secret_variables(environ: Mapping[str, str]) -> tuple[Variable, ...]:
    """Hand the secret's place on to the engine, which starts in another folder."""
    found = []
    for name in (SECRET_VARIABLE, SECRET_FILE_VARIABLE):
        if value := environ.get(name):
            place = str(Path(value).absolute()) if name == SECRET_FILE_VARIABLE else value
            found.append(Variable(name, place, "inherited"))
    return tuple(found)


def with_nodes(config: EngineConfig, nodes: NodesConfig) -> EngineConfig:
    """Tell the engine of the nodes."""
    return replace(config, nodes=nodes, executor="multinode")


def join_remarks(nodes: NodesConfig, crossing_tensor_groups: Sequence[tuple[int, ...]]) -> list[str]:
    """Say what is slow over a network, and what is possible instead."""
    if not crossing_tensor_groups:
        return []
    better = f"prefer tp inside a node and pp={len(nodes.names)} over nodes"
    return [f"tensor ranks on different nodes wait for the network in every layer: {better}"]
