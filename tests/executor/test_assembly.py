"""Nodes come together, and one of them cannot: its own words are the cause, and all others are let go."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import msgspec
import pytest
from executor_support import CONFIG, STAND_IN, leftovers, wait_until
from nodes_support import SECRET, HostStarter, nodes_config, nodes_placement

from engine.comm.node_messages import Hello, NodeKind, encode, own_facts
from engine.comm.secure_link import LinkLost, connect
from engine.executor.messages import FaultReport, encode_report
from engine.executor.multinode import MultiNodeExecutor
from engine.executor.node_starter import LostCallback, NodeOrder
from engine.executor.roster import NodeFailure, RankFailure
from engine.placement import ParallelSizes

THREE = ParallelSizes(1, 3, 1)


class Hosts(HostStarter):
    """Hosts of which node1's cannot prepare, and node2's would wait for as long as its link lives."""

    def __init__(self) -> None:
        super().__init__()
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
                if order.node == "node1" and frame[0] == NodeKind.PREPARE:
                    link.send(*encode_report(FaultReport(1, "spawn", "OSError", "no more memory files")))
                    # Its process ends then, which who started it sees at once.
                    self.lost("node1", "its node host ended by itself with code 2")
        except LinkLost as error:
            self.ends[order.node] = str(error)
        finally:
            link.dispose()


def test_a_node_that_cannot_prepare_is_quoted_and_the_others_are_let_go() -> None:
    before = leftovers()
    placement = nodes_placement(CONFIG, THREE, 3)
    hosts = Hosts()
    began = time.monotonic()
    with pytest.raises(NodeFailure, match="node node1 .* is lost: cannot prepare its ranks: no more memory files"):
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
