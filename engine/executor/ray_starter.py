"""Node hosts by Ray: the cluster is checked, the placement becomes a placement group, each node gets one actor.

Knows: the order of these steps and their deadline, the door at which the hosts come in, whom to call lost. Refuses to
know: ranks' processes, plans; Ray's API (`ray_cluster`). Ray places, watches and ends; never on the way of a step.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence

import msgspec

from engine.comm.node_listener import NodeArrival, NodeListener
from engine.config import EngineConfig
from engine.executor.base import ExecutorError
from engine.executor.node_starter import LostCallback, NodeOrder
from engine.executor.ray_actor import ActorFacts, HostOrder, NodeHostActor
from engine.executor.ray_cluster import ActorWatch, RayCluster
from engine.executor.ray_environment import carried_environment
from engine.executor.ray_layout import Layout, lay_out
from engine.placement import Placement
from engine.process import say

GRACE_SECONDS = 2.0
"""What node hosts get to end by themselves, once their engine has said goodbye."""
Tell = Callable[[str], None]


class RayStarter:
    """Starts the node hosts of one engine once; see `NodeStarter`. `tell` hears, in one line, what is waited for."""

    def __init__(self, config: EngineConfig, placement: Placement, tell: Tell | None = None) -> None:
        self._config = config
        self._placement = placement
        self._tell = tell or _say
        self._secret = secrets.token_bytes(32)
        self._listener: NodeListener | None = None
        self._awaited: dict[str, str] = {}
        self._cluster: RayCluster | None = None
        self._watch: ActorWatch | None = None
        self._advice: dict[str, str] = {}
        self._ends: dict[str, str] = {}
        self._is_stopping = False

    def start(self, orders: Sequence[NodeOrder], on_lost: LostCallback) -> None:
        """Check, place, start one actor for each order. Blocks until all actors are there, not for their hosts.

        Raises: RayRefused, ExecutorError with what is missing on which node.
        """
        nodes, began = self._config.nodes, time.monotonic()
        deadline = began + nodes.placement_timeout_seconds
        host = nodes.head_host or self._config.node_address
        addresses = dict(zip(nodes.names, nodes.addresses, strict=False))
        layout = lay_out(self._placement, self._config.data_parallel_rank, addresses)
        cluster = self._cluster = RayCluster(nodes.ray_address, host, layout)
        connected = time.monotonic()
        cluster.await_resources(layout, deadline, self._tell)
        name = orders[0].order_id if orders else "head"
        cluster.place(layout, f"hlaunch-{name}", deadline)
        placed = time.monotonic()
        self._listener = NodeListener(host, 0, self._secret)
        self._awaited = {order.node: order.order_id for order in orders}
        actors = {order.node: cluster.start_actor(NodeHostActor, layout, order.node) for order in orders}
        looks = cluster.answers({node: actor.look.remote() for node, actor in actors.items()})
        for node, said in looks.items():
            self._check(node, msgspec.msgpack.decode(said, type=ActorFacts), layout)

        def lost(node: str, how: str) -> None:
            self._ends[node] = how
            if not self._is_stopping:
                on_lost(node, how)

        now = time.monotonic()
        self._tell(
            f"Ray: {now - began:.1f} s (checked and connected {connected - began:.1f}, "
            f"placed {placed - connected:.2f}, actors {now - placed:.1f})"
        )
        calls = {order.node: actors[order.node].run.remote(self._task(order)) for order in orders}
        self._watch = cluster.watch(calls, lost)

    def accept(self, timeout_seconds: float) -> NodeArrival | None:
        """See `NodeStarter.accept`. Raises: ExecutorError when a node's actor has ended already."""
        if self._listener is None:
            raise ExecutorError("no node hosts were ordered")
        for node, how in self._ends.items():
            raise ExecutorError(f"node {node}: {how}")
        arrival = self._listener.accept(timeout_seconds)
        if arrival is not None and self._awaited.get(arrival.hello.node) == arrival.hello.order_id:
            del self._awaited[arrival.hello.node]
            if not self._awaited:
                # All are here: nobody else has any business at the door.
                self._listener.close()
        return arrival

    def advice(self, node: str) -> str:
        """See `NodeStarter.advice`."""
        return self._ends.get(node) or self._advice.get(node, "Ray has started no actor for it")

    def stop(self) -> None:
        """See `NodeStarter.stop`."""
        self._is_stopping = True
        if self._watch is not None:
            self._watch.stop(GRACE_SECONDS)
            self._watch = None
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _task(self, order: NodeOrder) -> bytes:
        assert self._listener is not None
        carried = carried_environment(os.environ)
        host, port = self._listener.host, self._listener.port
        load_format = self._config.load_format
        return msgspec.msgpack.encode(
            HostOrder(order.node, order.order_id, host, port, self._secret, carried, load_format)
        )

    def _check(self, node: str, facts: ActorFacts, layout: Layout) -> None:
        """Hold an actor against the placement. Raises: ExecutorError."""
        bundle = layout.bundles[layout.index(node)]
        if bundle.address and facts.address != bundle.address:
            raise ExecutorError(f"node {node}: Ray runs its actor at {facts.address}, not at {bundle.address}")
        ranks = [self._placement.ranks[rank] for rank in bundle.ranks]
        wanted = sorted(int(rank.device.partition(":")[2]) for rank in ranks if rank.backend == "cuda")
        if wanted != sorted(facts.gpus):
            raise ExecutorError(
                f"node {node}: the placement uses GPUs {_numbers(wanted)}, Ray gives {_numbers(facts.gpus)}: "
                "something else on the cluster has taken the others"
            )
        if facts.niceness:
            self._tell(f"node {node}: Ray runs at niceness {facts.niceness}, and its CPU ranks with it")
            self._advice[node] = f"set RAY_worker_niceness=0 for `ray start` on {node}"
        else:
            self._advice[node] = f"its Ray actor runs as process {facts.pid} at {facts.address}; see its log there"


def _numbers(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers) or "none"


def _say(line: str) -> None:
    say(f"ray: {line}")
