"""Nodes that join by themselves: who is let in, what they are told, and how a node's own command ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from executor_support import CONFIG, HERE, wait_until
from nodes_support import nodes_config, nodes_placement

from engine import node_desk
from engine.comm.node_listener import refuse
from engine.comm.node_messages import (
    Came,
    DeskMessage,
    Ended,
    Hello,
    NodeFacts,
    NodeKind,
    NodeNews,
    Order,
    Refusal,
    Wanted,
    Welcome,
    decode,
    encode,
    own_facts,
)
from engine.comm.secure_link import LinkLost, SecureLink, connect
from engine.config import ConfigError, EngineConfig
from engine.node_desk import NodeDesk
from engine.node_secret import SecretError, read_secret
from engine.placement import ParallelSizes

SECRET = "a secret of the test, long enough"
FACTS = NodeFacts("here", "1", "3.11.0", "2", model_digest="ab" * 32, fabric={"NCCL_ALGO": "Ring"})


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Iterator[NodeDesk]:
    monkeypatch.setenv("HLAUNCH_NODE_SECRET", SECRET)
    opened = NodeDesk(config_of(ParallelSizes(2, 1, 1)), FACTS)
    yield opened
    opened.close()


def config_of(sizes: ParallelSizes) -> EngineConfig:
    return nodes_config(CONFIG, nodes_placement(CONFIG, sizes))


def come(desk: NodeDesk, hello: Hello) -> tuple[SecureLink, int, bytes]:
    """Come to the desk; returns the link and the first frame of the answer."""
    link = connect("127.0.0.1", desk.port, SECRET.encode())
    link.send(NodeKind.HELLO, encode(hello))
    frame = link.receive(5)
    assert frame is not None
    return link, *frame


def news(channel: socket.socket) -> object:
    channel.settimeout(5)
    return msgspec.msgpack.decode(channel.recv(1 << 16), type=DeskMessage)


def test_a_node_joins_gets_orders_and_is_missed(desk: NodeDesk) -> None:
    link, kind, body = come(desk, Hello("node1", "", FACTS))
    assert (kind, decode(body, Welcome)) == (NodeKind.WELCOME, Welcome((1,), "tiny-oss"))
    link.start_heartbeat()
    assert wait_until(lambda: desk.joined == ("node1",), 2)
    core = desk.open_channel(1)
    core.send(msgspec.msgpack.encode(Wanted([("node1", "7")])))
    assert news(core) == NodeNews("node1", "here")
    frame = link.receive(5)
    assert frame is not None
    assert (frame[0], decode(frame[1], Order)) == (NodeKind.ORDER, Order(1, "7"))

    # Its host comes to the same door, and is handed to the core that ordered it, link and all.
    host = connect("127.0.0.1", desk.port, SECRET.encode())
    host.send(NodeKind.HELLO, encode(Hello("node1", "7", FACTS)))
    body, (fd,), _, _ = socket.recv_fds(core, 1 << 16, 1)
    came = msgspec.msgpack.decode(body, type=DeskMessage)
    assert isinstance(came, Came)
    handed = SecureLink(socket.socket(fileno=fd), came.link)
    handed.send(NodeKind.PREPARE, b"to the host")
    assert host.receive(5) == (NodeKind.PREPARE, b"to the host")
    host.send(1, b"to the core")
    assert handed.receive(5) == (1, b"to the core")
    handed.dispose()
    host.dispose()

    link.send(NodeKind.ENDED, encode(Ended("7", "its host broke")))
    assert news(core) == NodeNews("node1", "", "its host broke", True)
    # A core that is gone wants nothing any more.
    core.close()
    frame = link.receive(5)
    assert frame is not None
    assert (frame[0], decode(frame[1], Order)) == (NodeKind.CANCEL, Order(1, "7"))
    again = desk.open_channel(1)
    again.send(msgspec.msgpack.encode(Wanted([("node1", "8")])))
    assert news(again) == NodeNews("node1", "here")
    link.dispose()
    lost = news(again)
    assert isinstance(lost, NodeNews)
    assert "closed the connection" in lost.lost
    assert wait_until(lambda: desk.joined == (), 2)
    again.close()


def test_a_node_that_comes_late_finds_its_orders(desk: NodeDesk) -> None:
    core = desk.open_channel(1)
    core.send(msgspec.msgpack.encode(Wanted([("node1", "7")])))
    time.sleep(0.1)
    link, kind, _ = come(desk, Hello("node1", "", FACTS))
    assert kind == NodeKind.WELCOME
    frame = link.receive(5)
    assert frame is not None
    assert frame[0] == NodeKind.ORDER
    desk.close()
    frame = link.receive(5)
    assert frame is not None
    assert frame[0] == NodeKind.GOODBYE
    core.close()
    link.dispose()


def test_nothing_waits_for_the_models_digest_but_who_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights on a slow disk: the engine's start goes on meanwhile."""
    is_read = threading.Event()

    def digest(model: str, load_format: str) -> str:
        assert is_read.wait(30)
        return f"{model} {load_format}"

    monkeypatch.setenv("HLAUNCH_NODE_SECRET", SECRET)
    monkeypatch.setattr(node_desk, "digest_of", digest)
    desk = NodeDesk(config_of(ParallelSizes(2, 1, 1)))
    ours = own_facts("tiny-oss auto")
    try:
        link = connect("127.0.0.1", desk.port, SECRET.encode())
        link.send(NodeKind.HELLO, encode(Hello("node1", "", ours)))
        link.allow_silence(1.5)
        assert link.receive(3.0) is None, "the node is told that the head is there"
        assert desk.joined == ()
        is_read.set()
        frame = link.receive(5)
        assert frame is not None
        assert frame[0] == NodeKind.WELCOME
        link.dispose()
        assert wait_until(lambda: desk.joined == (), 5)
        link, kind, body = come(desk, Hello("node1", "", msgspec.structs.replace(ours, model_digest="another")))
        assert (kind, "has other weights" in decode(body, Refusal).message) == (NodeKind.REFUSED, True)
        link.dispose()
    finally:
        is_read.set()
        desk.close()


def test_no_order_comes_before_the_welcome(desk: NodeDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A core may ask for a node at the moment in which it joins."""
    core = desk.open_channel(1)
    send = SecureLink.send

    def send_late(link: SecureLink, kind: int, body: bytes = b"") -> None:
        if kind == NodeKind.WELCOME:
            core.send(msgspec.msgpack.encode(Wanted([("node1", "7")])))
            time.sleep(0.2)
        send(link, kind, body)

    monkeypatch.setattr(SecureLink, "send", send_late)
    link, kind, _ = come(desk, Hello("node1", "", FACTS))
    assert kind == NodeKind.WELCOME
    frame = link.receive(5)
    assert frame is not None
    assert (frame[0], decode(frame[1], Order)) == (NodeKind.ORDER, Order(1, "7"))
    assert link.receive(0.3) is None
    link.dispose()
    core.close()


@pytest.mark.parametrize(
    ("hello", "expected"),
    [
        (Hello("node2", "", FACTS), "no node is called node2; expected: node1"),
        (Hello("node0", "", FACTS), "no node is called node0"),
        (Hello("node1", "", NodeFacts("there", "0.9", "3.11.0", "2")), "node1 (there) has hlaunch 0.9, the head 1"),
        (
            Hello("node1", "", NodeFacts("there", "1", "3.11.0", "2", model_digest="cd" * 32)),
            "node1 (there) has other weights",
        ),
        (
            Hello("node1", "", msgspec.structs.replace(FACTS, fabric={"NCCL_ALGO": "Tree"})),
            "node1 (here) has NCCL_ALGO = Tree, the head (here) = Ring",
        ),
        (Hello("node1", "9", FACTS), "no host of node1 is wanted for this run"),
    ],
)
def test_who_does_not_belong_is_told_why(desk: NodeDesk, hello: Hello, expected: str) -> None:
    link, kind, body = come(desk, hello)
    assert kind == NodeKind.REFUSED
    assert expected in decode(body, Refusal).message
    assert decode(body, Refusal).is_final
    assert ("--node-rank" in decode(body, Refusal).hint) is expected.startswith("no node is called")
    assert desk.joined == ()
    link.dispose()


def test_who_is_refused_does_not_hold_up_the_others(desk: NodeDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that does not read may take seconds to be told."""
    was_locked: list[bool] = []

    def watched(link: SecureLink, refusal: Refusal) -> None:
        was_locked.append(desk._lock.locked())
        refuse(link, refusal)

    monkeypatch.setattr(node_desk, "refuse", watched)
    first, _, _ = come(desk, Hello("node1", "", FACTS))
    for hello in (Hello("node1", "", FACTS), Hello("node1", "9", FACTS), Hello("node2", "", FACTS)):
        link, kind, _ = come(desk, hello)
        assert kind == NodeKind.REFUSED
        link.dispose()
    assert was_locked == [False] * 3
    first.dispose()


def test_a_second_node_of_one_name_waits(desk: NodeDesk) -> None:
    first, _, _ = come(desk, Hello("node1", "", FACTS))
    second, kind, body = come(desk, Hello("node1", "", FACTS))
    assert kind == NodeKind.REFUSED
    assert "node1 has joined already, from here (127.0.0.1)" in decode(body, Refusal).message
    assert not decode(body, Refusal).is_final
    with pytest.raises(LinkLost):
        second.receive(5)
    first.dispose()
    second.dispose()


def test_a_desk_without_a_secret_or_an_address_does_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(ParallelSizes(2, 1, 1))
    for name in ("HLAUNCH_NODE_SECRET", "HLAUNCH_NODE_SECRET_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="nodes need a secret that they share") as caught:
        NodeDesk(config, FACTS)
    assert "HLAUNCH_NODE_SECRET_FILE=node.secret" in caught.value.hint
    monkeypatch.setenv("HLAUNCH_NODE_SECRET", SECRET)
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0 for other nodes"):
        NodeDesk(replace(config, nodes=replace(config.nodes, head_host="192.0.2.1")), FACTS)


def test_what_is_no_secret_says_what_would_be(tmp_path: Path) -> None:
    path = tmp_path / "node.secret"
    path.write_text(f"  {SECRET}\n")
    path.chmod(0o600)
    assert read_secret({"HLAUNCH_NODE_SECRET_FILE": str(path)}) == SECRET.encode()
    assert read_secret({"HLAUNCH_NODE_SECRET": SECRET}) == SECRET.encode()
    path.chmod(0o644)
    for environ, expected in (
        ({"HLAUNCH_NODE_SECRET_FILE": str(path)}, "can be read by others"),
        ({"HLAUNCH_NODE_SECRET_FILE": str(tmp_path / "none")}, "No such file"),
        ({"HLAUNCH_NODE_SECRET": "short"}, "has 5 bytes, not 16"),
        ({"HLAUNCH_NODE_SECRET": SECRET, "HLAUNCH_NODE_SECRET_FILE": str(path)}, "are both set"),
        ({}, "none is set"),
    ):
        with pytest.raises(SecretError, match=expected) as caught:
            read_secret(environ)
        assert caught.value.hint
        assert SECRET not in str(caught.value)


def agent(folder: Path, config: EngineConfig, environ: dict[str, str]) -> tuple[int, str, list[dict[str, object]]]:
    """Run a node's own process to its end; returns its code, its words and its status records."""
    path = folder / "engine.json"
    path.write_text(config.to_json())
    read_end, write_end = os.pipe()
    done = subprocess.run(
        [sys.executable, "-m", "engine.executor.node_agent", "--config", str(path), "--status-fd", str(write_end)],
        cwd=HERE.parents[1],
        env={"PATH": os.environ["PATH"], **environ},
        pass_fds=(write_end,),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    os.close(write_end)
    with open(read_end) as pipe:
        return done.returncode, done.stderr, [json.loads(line) for line in pipe]


def test_a_node_whose_head_does_not_come_ends_by_its_deadline(tmp_path: Path) -> None:
    config = config_of(ParallelSizes(2, 1, 1))
    nodes = replace(config.nodes, rank=1, head_port=9, join_timeout_seconds=0.2)
    code, words, records = agent(tmp_path, replace(config, nodes=nodes), {"HLAUNCH_NODE_SECRET": SECRET})
    assert code == 8
    assert "error: the head did not take this node in within 0.2 s: nobody answers at 127.0.0.1:9" in words
    assert "hint: is `hlaunch up … --node-rank 0 --head-addr 127.0.0.1:9` running" in words
    assert [record["kind"] for record in records][-1] == "fatal"
    assert records[-1]["exit_code"] == 8


@pytest.mark.parametrize(
    ("environ", "changes", "code", "expected"),
    [
        ({}, {}, 5, "nodes need a secret that they share, and none is set"),
        ({"HLAUNCH_NODE_SECRET": SECRET}, {"model": "/nowhere"}, 1, "'/nowhere' is not on this node"),
    ],
)
def test_a_node_that_lacks_something_says_what(
    environ: dict[str, str], changes: dict[str, str], code: int, expected: str, tmp_path: Path
) -> None:
    config = config_of(ParallelSizes(2, 1, 1))
    config = replace(config, nodes=replace(config.nodes, rank=1), **changes)  # type: ignore[arg-type]
    found, words, _ = agent(tmp_path, config, environ)
    assert (found, expected in words) == (code, True), words


def test_a_node_with_another_secret_says_so_and_ends(desk: NodeDesk, tmp_path: Path) -> None:
    config = config_of(ParallelSizes(2, 1, 1))
    config = replace(config, nodes=replace(config.nodes, rank=1, head_port=desk.port))
    code, words, records = agent(tmp_path, config, {"HLAUNCH_NODE_SECRET": "quite another secret of the test"})
    assert code == 5
    assert "error: 127.0.0.1 refuses this node's secret" in words
    assert "hint: the same HLAUNCH_NODE_SECRET_FILE (its content) on all nodes" in words
    assert (records[-1]["kind"], records[-1]["phase"]) == ("fatal", "join")
    assert desk.joined == ()
