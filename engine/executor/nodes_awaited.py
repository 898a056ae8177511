"""The wait for node hosts that were ordered: who is taken in, who is sent away, what is said meanwhile.

Knows: orders, the hello of each that comes, a deadline. Refuses to know: how hosts come to life
(`engine.executor.node_starter`), what they do once all are here (`engine.executor.multinode`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from engine.comm.node_listener import NodeArrival, refuse
from engine.comm.node_messages import NodeFacts, Refusal, check_facts
from engine.comm.secure_link import LinkRefused
from engine.executor.node_starter import NodeOrder, NodeStarter
from engine.executor.roster import RankFailure, Roster

_SAY_SECONDS = 2.0
_HINT = "the same hlaunch, Python, torch, model files and NCCL settings on all nodes"


class NodesAwaited:
    """The node hosts that one run of an engine needs. `tell` hears a line whenever one comes, and while some lack."""

    def __init__(
        self, orders: Sequence[NodeOrder], roster: Roster, facts: NodeFacts, tell: Callable[[str], None]
    ) -> None:
        self._wanted = {order.node: order for order in orders}
        self._came: dict[str, NodeArrival] = {}
        self._roster = roster
        self._facts = facts
        self._tell = tell

    def collect(self, starter: NodeStarter, timeout_seconds: float) -> dict[str, NodeArrival]:
        """Wait until all are here. Raises: RankFailure naming one that did not come in time, or what failed first."""
        began = say_at = time.monotonic()
        try:
            while missing := [node for node in self._wanted if node not in self._came]:
                if self._roster.failure is not None:
                    raise self._roster.failure
                waited = time.monotonic() - began
                if waited > timeout_seconds:
                    what = f"{_list(missing)} did not come within {waited:.0f} s"
                    raise self._fail(missing[0], what, waited, starter.advice(missing[0]))
                if time.monotonic() >= say_at:
                    say_at = time.monotonic() + _SAY_SECONDS
                    self._tell(f"waiting for {_list(missing)}; {starter.advice(missing[0])}")
                arrival = starter.accept(0.5)
                if arrival is not None and self._is_wanted(arrival):
                    self._came[arrival.hello.node] = arrival
        except BaseException:
            for arrival in self._came.values():
                arrival.link.dispose()
            raise
        return self._came

    def _is_wanted(self, arrival: NodeArrival) -> bool:
        """Take a host in, or send it away with the reason. Raises: RankFailure when it can never serve."""
        hello = arrival.hello
        order = self._wanted.get(hello.node)
        if order is None or hello.order_id != order.order_id:
            return self._send_away(arrival, f"no host of {hello.node} is wanted for this run of the engine")
        if hello.node in self._came:
            return self._send_away(arrival, f"{hello.node} is here already")
        try:
            check_facts(self._facts, hello.node, hello.facts)
        except LinkRefused as error:
            # It is the host of this very run, and no other will come.
            refuse(arrival.link, Refusal(str(error)))
            seconds = time.monotonic() - self._roster.views[order.ranks[0].rank].since
            raise self._fail(hello.node, str(error), seconds, _HINT) from None
        # Others may take long to come: it must not take that for silence.
        arrival.link.start_heartbeat()
        self._tell(f"{hello.node} came from {hello.facts.hostname or arrival.link.peer}")
        return True

    def _send_away(self, arrival: NodeArrival, why: str) -> bool:
        refuse(arrival.link, Refusal(why))
        self._tell(why)
        return False

    def _fail(self, node: str, what: str, seconds: float, hint: str) -> RankFailure:
        """Settle on a node's absence as the cause: its first rank has nowhere to run."""
        first = self._wanted[node].ranks[0]
        what = f"has no node to run on: {what}"
        return self._roster.fail(RankFailure(first, "nodes", what, seconds=seconds, hint=hint))


def _list(nodes: Sequence[str]) -> str:
    return f"node {nodes[0]}" if len(nodes) == 1 else f"nodes {', '.join(nodes)}"
