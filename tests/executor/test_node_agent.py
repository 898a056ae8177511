"""A node's own process at a head that the test plays: it joins, runs what is ordered, comes again, and ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from executor_support import CONFIG, HERE, children_of, wait_until
from nodes_support import nodes_config, nodes_placement

from engine.comm.node_listener import NodeArrival, NodeListener
from engine.comm.node_messages import Ended, NodeKind, Order, Welcome, decode, encode, own_facts
from engine.config import MAX_CONFIG_BYTES, ConfigError, EngineConfig
from engine.executor import node_agent
from engine.executor.node_agent import NodeAgent
from engine.placement import ParallelSizes
from engine.process import StatusPipe

SECRET = "a secret of the test, long enough"


@pytest.fixture
def head() -> Iterator[NodeListener]:
    listener = NodeListener("127.0.0.1", 0, SECRET.encode())
    yield listener
    listener.close()


@pytest.fixture
def node(head: NodeListener, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    config = nodes_config(CONFIG, nodes_placement(CONFIG, ParallelSizes(2, 1, 1)), silence_seconds=10.0)
    path = tmp_path / "engine.json"
    path.write_text(replace(config, nodes=replace(config.nodes, rank=1, head_port=head.port)).to_json())
    process = subprocess.Popen(
        [sys.executable, "-m", "engine.executor.node_agent", "--config", str(path)],
        cwd=HERE.parents[1],
        env={"PATH": os.environ["PATH"], "HLAUNCH_NODE_SECRET": SECRET},
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"{" + b" " * MAX_CONFIG_BYTES, f"larger than {MAX_CONFIG_BYTES} bytes"),
        (b'{"model": "\xff"}', "not UTF-8: invalid start byte at byte 11"),
        (b"{", "not valid JSON"),
    ],
    ids=["missing", "large", "bytes", "half"],
)
def test_a_configuration_that_cannot_be_read_is_named(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        EngineConfig.read(path)
    assert str(caught.value).startswith(f"{path}: {said}")


@pytest.mark.parametrize("module", ["engine.server", "engine.executor.node_agent"])
def test_a_process_without_its_configuration_ends_with_3(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", module, "--config", str(tmp_path / "none.json")]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 3
    assert done.stderr == f"error: {tmp_path}/none.json: cannot be read: No such file or directory\n"


def welcome(head: NodeListener) -> NodeArrival:
    arrival = head.accept(20)
    assert arrival is not None
    assert (arrival.hello.node, arrival.hello.order_id) == ("node1", "")
    arrival.link.start_heartbeat()
    arrival.link.send(NodeKind.WELCOME, encode(Welcome((1,), "tiny-oss")))
    return arrival


def test_a_node_runs_hosts_tells_of_their_end_and_leaves_with_the_head(
    head: NodeListener, node: subprocess.Popen[str]
) -> None:
    joined = welcome(head).link
    joined.send(NodeKind.ORDER, encode(Order(1, "7")))
    host = head.accept(20)
    assert host is not None
    assert (host.hello.node, host.hello.order_id) == ("node1", "7")
    assert host.hello.facts.model_digest
    host.link.start_heartbeat()
    (pid,) = children_of(node.pid)
    assert SECRET not in Path(f"/proc/{pid}/cmdline").read_text()
    os.kill(pid, signal.SIGKILL)
    frame = joined.receive(5)
    assert frame is not None
    assert (frame[0], decode(frame[1], Ended)) == (
        NodeKind.ENDED,
        Ended("7", "its node host was killed by SIGKILL (out of memory?)"),
    )
    joined.send(NodeKind.ORDER, encode(Order(1, "8")))
    again = head.accept(20)
    assert again is not None
    assert again.hello.order_id == "8"
    joined.send(NodeKind.GOODBYE)
    assert node.wait(10) == 0
    assert wait_until(lambda: not Path(f"/proc/{pid}").exists(), 2)
    for link in (host.link, again.link, joined):
        link.dispose()


def test_a_head_that_talks_nonsense_is_lost_and_joined_again(head: NodeListener, node: subprocess.Popen[str]) -> None:
    first = welcome(head).link
    first.send(NodeKind.ORDER, b"nonsense")
    second = welcome(head).link
    second.send(NodeKind.GOODBYE)
    _, words = node.communicate(timeout=10)
    assert (node.returncode, "lost the head: not a Order" in words, "Traceback" in words) == (0, True, False), words
    first.dispose()
    second.dispose()


def test_a_head_that_lets_a_node_go_at_once_is_not_asked_in_a_tight_loop(
    head: NodeListener, node: subprocess.Popen[str]
) -> None:
    welcome(head).link.dispose()
    began, count = time.monotonic(), 0
    while time.monotonic() - began < 2.5:
        arrival = head.accept(0.1)
        if arrival is not None:
            arrival.link.send(NodeKind.WELCOME, encode(Welcome((1,), "tiny-oss")))
            arrival.link.dispose()
            count += 1
    assert 1 <= count <= 4
    assert node.poll() is None


def test_a_host_that_cannot_be_started_is_told_to_the_head(head: NodeListener, monkeypatch: pytest.MonkeyPatch) -> None:
    config = nodes_config(CONFIG, nodes_placement(CONFIG, ParallelSizes(2, 1, 1)))
    config = replace(config, nodes=replace(config.nodes, rank=1, head_port=head.port))
    monkeypatch.setattr(node_agent, "HOST_COMMAND", ("/nowhere/python",))
    before = len(os.listdir("/proc/self/fd"))
    agent = NodeAgent(config, SECRET.encode(), StatusPipe(None), own_facts())
    thread = threading.Thread(target=agent.run)
    thread.start()
    joined = welcome(head).link
    joined.send(NodeKind.ORDER, encode(Order(1, "7")))
    frame = joined.receive(5)
    assert frame is not None
    ended = Ended("7", "its node host cannot be started: No such file or directory")
    assert (frame[0], decode(frame[1], Ended)) == (NodeKind.ENDED, ended)
    joined.send(NodeKind.GOODBYE)
    thread.join(10)
    joined.dispose()
    assert not thread.is_alive()
    assert len(os.listdir("/proc/self/fd")) == before
