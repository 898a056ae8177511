"""A node host and the door that it comes to."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from nodes_support import SECRET

from engine.comm.node_listener import MAX_STRANGERS_PER_ADDRESS, NodeListener
from engine.comm.node_messages import NodeKind
from engine.executor import node_host
from engine.executor.node_host import EXIT_LOST, EXIT_REFUSED, HostTask, run_node_host


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
