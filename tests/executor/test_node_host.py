"""A node host and the door that it comes to."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

import pytest
from executor_support import CONFIG, children_of, wait_until
from nodes_support import SECRET, HostStarter, nodes_config, nodes_placement

from engine.comm.node_listener import MAX_STRANGERS_PER_ADDRESS, NodeListener
from engine.comm.node_messages import NodeKind, Prepare
from engine.executor import node_host
from engine.executor.messages import Kind
from engine.executor.multiproc_wiring import LEAST_PLAN_SLOTS
from engine.executor.node_host import EXIT_LOST, EXIT_REFUSED, HostTask, run_node_host
from engine.executor.node_starter import orders_for
from engine.executor.remote_node import RemoteNode
from engine.executor.roster import Roster
from engine.placement import ParallelSizes


def test_a_slow_disk_does_not_keep_the_door_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def take_long(model: str, load_format: str) -> str:
        time.sleep(0.8)
        return "ab" * 32

    monkeypatch.setattr(node_host, "digest_of", take_long)
    refusals: list[str] = []
    door = NodeListener("127.0.0.1", 0, SECRET, refused=refusals.append, handshake_seconds=0.3)
    codes: list[int] = []
    task = HostTask("127.0.0.1", door.port, SECRET, "node1", "1", model="tiny-oss")
    thread = threading.Thread(target=lambda: codes.append(run_node_host(task)))
    thread.start()
    try:
        arrival = door.accept(10)
        assert arrival is not None, refusals
        assert arrival.hello.facts.model_digest == "ab" * 32
        arrival.link.send(NodeKind.GOODBYE)
        thread.join(10)
        assert codes == [EXIT_REFUSED]
        arrival.link.dispose()
    finally:
        door.close()
    assert refusals == []


def test_a_door_that_is_full_is_tried_again() -> None:
    refusals: list[str] = []
    door = NodeListener("127.0.0.1", 0, SECRET, refused=refusals.append, handshake_seconds=0.8)
    others = [socket.create_connection(("127.0.0.1", door.port)) for _ in range(MAX_STRANGERS_PER_ADDRESS)]
    codes: list[int] = []
    task = HostTask("127.0.0.1", door.port, SECRET, "node1", "1")
    thread = threading.Thread(target=lambda: codes.append(run_node_host(task)))
    thread.start()
    try:
        arrival = door.accept(10)
        assert arrival is not None, refusals
        assert any("was turned away" in line for line in refusals)
        arrival.link.dispose()
        thread.join(10)
        assert codes == [EXIT_LOST]
    finally:
        door.close()
        for sock in others:
            sock.close()


def test_a_host_whose_ranks_read_nothing_still_answers_and_ends() -> None:
    placement = nodes_placement(CONFIG, ParallelSizes(1, 2, 2))
    config = nodes_config(CONFIG, placement)
    starter = HostStarter()
    orders = orders_for(placement, 0, "node0", "1")
    starter.start(orders, lambda node, why: None)
    host = starter.hosts["node1"]
    arrival = starter.accept(30)
    assert arrival is not None
    roster = Roster(placement.engine(0), lambda _: None)
    node = RemoteNode(arrival, orders[0].ranks, roster, 10.0)
    try:
        node.prepare(Prepare(config.to_json(), placement.to_json(), 0), 30)
        node.spawn(("127.0.0.1", 1))
        assert wait_until(lambda: len(children_of(host.pid)) == 2, 10)
        for pid in children_of(host.pid):
            os.kill(pid, signal.SIGSTOP)
        for _ in range(2 * LEAST_PLAN_SLOTS):
            node.write(b"a plan", Kind.PLAN)
        # Its deadline for a full ring is thirty seconds.
        assert [line.spec.rank for line in node.lines(5)] == [2, 3]
        node.begin_stop()
        assert host.wait(5) == 0
    finally:
        node.stop()
        roster.close()
        starter.stop()
        host.kill()
        host.wait()
