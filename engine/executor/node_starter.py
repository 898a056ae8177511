"""The seam between an engine and whatever brings its node hosts to life on other nodes.

Knows: what is ordered, and what comes back: a node host that is connected, authenticated and named. Refuses to know:
ranks' processes, plans. Two starters exist: `join_starter` (nodes that were started by hand and joined) and
`ray_starter`, each imported only when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.comm.node_listener import NodeArrival
from engine.placement import Placement, RankSpec

LostCallback = Callable[[str, str], None]
"""Told the name of a node and, in one line, what became of it."""


@dataclass(frozen=True, slots=True)
class NodeOrder:
    """One node host to be run: on `node`, for `ranks` of engine `engine`. `order_id` names this run of the engine; a
    host says it in its hello, so that one of an earlier run is never taken for this one's.
    """

    node: str
    engine: int
    ranks: tuple[RankSpec, ...]
    order_id: str


class NodeStarter(Protocol):
    """Has node hosts run on other nodes. Every method is called from one thread, and may block for its own checks."""

    def start(self, orders: Sequence[NodeOrder], on_lost: LostCallback) -> None:
        """Order node hosts. Returns without waiting until they have come.

        `on_lost` may be called from any thread, until `stop`, when a host that was started is known to be gone, with
        why: sooner, or better informed, than its connection would tell. Raises: ExecutorError when they cannot come.
        """
        ...

    def accept(self, timeout_seconds: float) -> NodeArrival | None:
        """Take the next node host that has connected; None at the timeout. Raises: ExecutorError as `start`."""
        ...

    def advice(self, node: str) -> str:
        """Say in one line what is known, or what to do, about a node whose host has not come."""
        ...

    def stop(self) -> None:
        """End what `start` began, hosts included, and give everything back. Idempotent."""
        ...


def orders_for(placement: Placement, engine: int, local_node: str, order_id: str) -> list[NodeOrder]:
    """List the node hosts that one engine needs beyond this node, in the order of their first ranks."""
    by_node: dict[str, list[RankSpec]] = {}
    for rank in placement.engine(engine):
        if rank.node != local_node:
            by_node.setdefault(rank.node, []).append(rank)
    return [NodeOrder(node, engine, tuple(ranks), order_id) for node, ranks in by_node.items()]
