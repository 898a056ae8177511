"""Nodes come together, and one of them cannot: its own words are the cause, and all others are let go."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import msgspec
import pytest
from executor_support import CONFIG, STAND_IN, leftovers, wait_until
from nodes_support import SECRET, HostStarter, nodes_config, nodes_placement

from engine.comm.node_messages import Hello, NodeKind, Prepared, encode, own_facts
from engine.comm.secure_link import LinkLost, connect
from engine.executor.messages import FaultReport, encode_report
from engine.executor.multinode import MultiNodeExecutor
from engine.executor.node_starter import LostCallback, NodeOrder
from engine.executor.roster import NodeFailure, RankFailure
from engine.placement import ParallelSizes

THREE = ParallelSizes(1, 3, 1)


class Hosts(HostStarter):
    """Hosts of which that of `failing` cannot prepare, and the others would wait for as long as their links live.

    Where none fails, each answers once all have been asked, and leaves once it is to start its ranks.
    """

    def __init__(self, failing: str = "") -> None:
        super().__init__()
        self.failing = failing
        self.asked = threading.Barrier(2)
        self.ends: dict[str, str] = {}
        self.threads: list[threading.Thread] = []

    def start(self, orders: Sequence[NodeOrder], on_lost: LostCallback) -> None:
        self.lost = on_lost
        for order in orders:
            thread = threading.Thread(target=self.host, args=(order,))
            thread.start()
            self.threads.append(thread)

    def host(self, order: NodeOrder) -> None:
        link = connect("127.0.0.1", self.listener.port, SECRET)
        link.start_heartbeat()
        link.send(NodeKind.HELLO, encode(Hello(order.node, order.order_id, own_facts())))
        try:
            while (frame := link.receive(30)) is not None:
                if frame[0] == NodeKind.PREPARE and not self.failing:
                    self.asked.wait(5)
                    link.send(NodeKind.PREPARED, encode(Prepared(("127.0.0.1", 1))))
                elif frame[0] == NodeKind.PREPARE and self.failing == order.node:
                    rank = order.ranks[0].rank
                    link.send(*encode_report(FaultReport(rank, "spawn", "OSError", "no more memory files")))
                    # Its process ends then, which who started it sees at once.
                    self.lost(order.node, "its node host ended by itself with code 2")
        except LinkLost as error:
            self.ends[order.node] = str(error)
        finally:
            link.dispose()


def test_nodes_prepare_at_the_same_time() -> None:
    placement = nodes_placement(CONFIG, THREE, 3)
    hosts = Hosts()
    executor = MultiNodeExecutor(
        nodes_config(CONFIG, placement), placement, command=STAND_IN, starter=hosts, node=placement.nodes[0]
    )
    assert not hosts.asked.broken, "each answers only once both have been asked"
    executor.stop()
    for thread in hosts.threads:
        thread.join()


@pytest.mark.parametrize("failing", ["node1", "node2"])
def test_a_node_that_cannot_prepare_is_quoted_and_the_others_are_let_go(failing: str) -> None:
    before = leftovers()
    placement = nodes_placement(CONFIG, THREE, 3)
    hosts = Hosts(failing)
    began = time.monotonic()
    with pytest.raises(NodeFailure, match=f"node {failing} .* is lost: cannot prepare its ranks: no more memory files"):
        MultiNodeExecutor(
            nodes_config(CONFIG, placement), placement, command=STAND_IN, starter=hosts, node=placement.nodes[0]
        )
    assert wait_until(lambda: len(hosts.ends) == 2, 5)
    assert time.monotonic() - began < 10
    assert all("closed the connection" in end or "reset" in end for end in hosts.ends.values()), hosts.ends
    for thread in hosts.threads:
        thread.join()
    assert leftovers() == before


def test_a_node_of_another_version_is_the_cause_and_not_waited_for() -> None:
    placement = nodes_placement(CONFIG, ParallelSizes(1, 2, 1))
    starter = HostStarter()
    began = time.monotonic()
    with pytest.raises(RankFailure, match=r"rank 1 \(node node1, cpu:0\) has no node to run on: node1 .* has torch"):
        MultiNodeExecutor(
            nodes_config(CONFIG, placement), placement, command=STAND_IN, starter=starter, node="node0",
            facts=msgspec.structs.replace(own_facts(), torch="0.1"),
        )  # fmt: skip
    assert time.monotonic() - began < 20, "it does not wait for the deadline, which is five minutes"
    assert starter.end() == {"node1": 2}
