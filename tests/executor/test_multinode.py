"""Ranks on several nodes: the same plans and results, and whatever fails on a node is named on the head, in time."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from executor_support import (
    CONFIG,
    STAND_IN,
    add_requests,
    children_of,
    drive,
    is_running,
    leftovers,
    new_scheduler,
    wait_until,
)
from nodes_support import SECRET, HostStarter, nodes_config, nodes_placement, start_on_nodes
from test_parallel_tokens import BASE, requests, run

from engine.comm.node_messages import Hello, NodeKind, Refusal, decode, encode, own_facts
from engine.comm.secure_link import connect
from engine.core.request import FinishReason
from engine.engine_core import EngineCore
from engine.executor.base import ExecutorError
from engine.executor.join_starter import JoinStarter
from engine.executor.multinode import MultiNodeExecutor
from engine.executor.rank_host import RANK_COMMAND
from engine.executor.roster import NodeFailure, RankFailure
from engine.placement import ParallelSizes

PP2 = ParallelSizes(1, 2, 1)


def serve(executor: MultiNodeExecutor, num_tokens: int = 20) -> int:
    scheduler = new_scheduler()
    add_requests(scheduler, 6, num_tokens)
    outputs = drive(executor, scheduler)
    assert sum(output.finish_reason is FinishReason.LENGTH for output in outputs) == 6
    return sum(len(output.new_token_ids) for output in outputs)


def serve_for_ever(executor: MultiNodeExecutor) -> None:
    while True:
        serve(executor, 200)


@pytest.mark.parametrize(
    ("sizes", "num_nodes"),
    [(PP2, 2), (ParallelSizes(1, 3, 2), 3)],
    ids=["pp2 over 2 nodes", "tp2 pp3 over 3 nodes"],
)
def test_plans_go_to_all_nodes_and_results_come_back(sizes: ParallelSizes, num_nodes: int) -> None:
    before = leftovers()
    said: list[str] = []
    executor, starter = start_on_nodes(sizes, num_nodes=num_nodes, on_nodes=said.append)
    ranks = [*executor.pids, *(pid for host in starter.hosts.values() for pid in children_of(host.pid))]
    assert len(ranks) == sizes.world
    assert serve(executor) == 6 * 20
    assert any(line.startswith("node1 came from") for line in said)
    began = time.monotonic()
    executor.stop()
    executor.stop()
    assert time.monotonic() - began < 5
    assert starter.end() == dict.fromkeys(starter.hosts, 0)
    assert not any(map(is_running, ranks))
    with pytest.raises(ExecutorError, match="stopped"):
        executor.submit(None)  # type: ignore[arg-type]
    assert leftovers() == before


FAULTS = {
    "raise": r"rank 1 \(node node1, cpu:0\) failed: RuntimeError: a kernel went wrong; phase serve",
    "kill": r"rank 1 \(node node1, cpu:0\) was killed by SIGKILL \(out of memory\?\); phase serve",
    "hang": r"rank 1 \(node node1, cpu:0\) did not finish step 5 within 1 s: computing in step 5 for \d\.\d s",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_rank_of_another_node_that_fails_is_named(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STAND_IN_FAULT", f"1:{kind}:5")
    before = leftovers()
    executor, starter = start_on_nodes(PP2, step_timeout_seconds=1.0, logs=tmp_path)
    ranks = [*executor.pids, *children_of(starter.hosts["node1"].pid)]
    with pytest.raises(RankFailure, match=FAULTS[kind]) as caught:
        serve(executor, 300)
    assert (caught.value.rank, caught.value.node, caught.value.phase) == (1, "node1", "serve")
    executor.stop()
    starter.end()
    assert not any(map(is_running, ranks))
    assert leftovers() == before
    if kind == "hang":
        log = (tmp_path / "node1.log").read_text()
        assert "stacks of rank 1" in log
        assert "in execute" in log


def test_a_rank_that_cannot_load_on_another_node_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_FAULT", "1:no load:0")
    with pytest.raises(RankFailure, match=r"rank 1 \(node node1, cpu:0\) failed: ValueError: the weights are of"):
        start_on_nodes(PP2)


@pytest.mark.parametrize(
    ("number", "said", "limit"),
    [
        (signal.SIGKILL, "closed the connection", 2.0),
        (signal.SIGSTOP, r"has said nothing for \d\.\d s", 5.0),
    ],
)
def test_a_node_host_that_is_lost_is_named_while_nothing_runs(number: signal.Signals, said: str, limit: float) -> None:
    before = leftovers()
    executor, starter = start_on_nodes(PP2, silence_seconds=2.0)
    heard = threading.Event()
    causes: list[ExecutorError] = []
    executor.on_failure(lambda cause: (causes.append(cause), heard.set()))
    host = starter.hosts["node1"]
    ranks = children_of(host.pid)
    began = time.monotonic()
    host.send_signal(number)
    assert heard.wait(limit)
    assert time.monotonic() - began < limit
    (cause,) = causes
    assert isinstance(cause, NodeFailure)
    expected = rf"node node1 \(rank 1, cpu:0\) is lost: 127.0.0.1 {said}; phase serve, \d+\.\d s in it"
    with pytest.raises(NodeFailure, match=expected):
        serve(executor)
    executor.stop()
    if number == signal.SIGSTOP:
        assert is_running(ranks[0])  # nothing can end it: but when the node goes on, it goes
        host.send_signal(signal.SIGCONT)
        assert starter.end()["node1"] == 1
    assert wait_until(lambda: not any(map(is_running, ranks)), 5)
    starter.end()
    assert leftovers() == before


def test_ranks_end_when_the_head_is_gone() -> None:
    executor, starter = start_on_nodes(PP2)
    ranks = children_of(starter.hosts["node1"].pid)
    for node in executor._remote.values():
        node._link.close()
    began = time.monotonic()
    assert starter.end()["node1"] == 1
    assert time.monotonic() - began < 3
    assert not any(map(is_running, ranks))
    executor.stop()


def test_who_starts_hosts_may_know_better() -> None:
    executor, starter = start_on_nodes(PP2)
    starter.lost("node1", "its machine was switched off")
    with pytest.raises(NodeFailure, match=r"node node1 .* is lost: its machine was switched off"):
        serve_for_ever(executor)
    executor.stop()
    starter.end()


def test_a_node_that_does_not_come_is_named_with_what_to_do() -> None:
    class Lazy(HostStarter):
        def start(self, orders: object, on_lost: object) -> None:
            pass

    before = leftovers()
    placement = nodes_placement(CONFIG, PP2)
    config = nodes_config(CONFIG, placement, join_timeout_seconds=0.6)
    starter = Lazy()
    began = time.monotonic()
    with pytest.raises(
        RankFailure, match=r"rank 1 \(node node1, cpu:0\) has no node to run on: node node1 did"
    ) as caught:
        MultiNodeExecutor(config, placement, command=STAND_IN, starter=starter, node="node0")
    assert time.monotonic() - began < 5
    assert (caught.value.phase, caught.value.hint) == ("nodes", "start node1")
    assert leftovers() == before


@pytest.mark.parametrize(
    ("hello", "expected"),
    [
        (Hello("node1", "of an earlier run", own_facts()), "no host of node1 is wanted for this run"),
        (Hello("node7", "", own_facts()), "no host of node7 is wanted for this run"),
    ],
)
def test_hosts_that_are_not_wanted_are_sent_away(hello: Hello, expected: str) -> None:
    answers: list[str] = []

    class Intruded(HostStarter):
        """Somebody else with the secret comes first."""

        def start(self, orders: object, on_lost: object) -> None:
            link = connect("127.0.0.1", self.listener.port, SECRET)
            link.send(NodeKind.HELLO, encode(hello))
            super().start(orders, on_lost)  # type: ignore[arg-type]

            def listen() -> None:
                frame = link.receive(10)
                assert frame is not None
                answers.append(decode(frame[1], Refusal).message)
                link.dispose()

            self.thread = threading.Thread(target=listen)
            self.thread.start()

    placement = nodes_placement(CONFIG, PP2)
    starter = Intruded()
    executor = MultiNodeExecutor(
        nodes_config(CONFIG, placement), placement, command=STAND_IN, starter=starter, node="node0"
    )
    starter.thread.join()
    executor.wait_loaded()
    executor.stop()
    starter.end()
    assert len(answers) == 1
    assert expected in answers[0]


def kill_storm(num_kills: int, seed: int) -> None:
    """Kill a random rank or the host of the other node at a random moment under load: named, and gone with all."""
    source = random.Random(seed)
    before = leftovers()
    for _ in range(num_kills):
        executor, starter = start_on_nodes(ParallelSizes(1, 2, 2))
        host = starter.hosts["node1"]
        remote = children_of(host.pid)
        pids = [*executor.pids, *remote, host.pid]
        victim = source.randrange(len(pids))
        threading.Timer(source.random() * 0.3, os.kill, (pids[victim], signal.SIGKILL)).start()
        began = time.monotonic()
        expected = f"^rank {victim} " if victim < 4 else "^node node1 "
        with pytest.raises(RankFailure, match=expected):
            serve_for_ever(executor)
        assert time.monotonic() - began < 5
        executor.stop()
        starter.end()
        assert not any(map(is_running, pids))
    assert leftovers() == before


def test_kills_under_load_leave_nothing_on_any_node() -> None:
    kill_storm(2, seed=4)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_kills_under_load_leave_nothing_on_any_node() -> None:
    kill_storm(100, seed=5)


def test_who_waits_for_a_node_is_told_the_command() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    config = nodes_config(CONFIG, nodes_placement(CONFIG, PP2))
    nodes = replace(config.nodes, head_host="10.0.0.1", head_port=29540)
    server = replace(config.server, served_model_names=("tiny-oss",))
    starter = JoinStarter(theirs, replace(config, nodes=nodes, server=server))
    command = "hlaunch up tiny-oss --nnodes 2 --node-rank 1 --head-addr 10.0.0.1:29540"
    assert starter.advice("node1") == f"run on it: {command}"
    starter.stop()
    ours.close()


@pytest.mark.parametrize(
    "sizes",
    [ParallelSizes(1, 2, 2), pytest.param(ParallelSizes(1, 1, 2), marks=pytest.mark.slow)],
    ids=["tp2 pp2", "tp2"],
)
def test_ranks_on_two_nodes_say_what_one_rank_says(sizes: ParallelSizes) -> None:
    """A pipeline over nodes with shared memory inside each, and tensor ranks over nodes."""
    base = replace(BASE, cache=replace(BASE.cache, num_blocks=128))
    items = requests(3)
    expected = run(EngineCore.start(base), items)
    placement = nodes_placement(base, sizes)
    starter = HostStarter(RANK_COMMAND)
    core = EngineCore.start(nodes_config(base, placement), starter=starter)
    try:
        assert run(core, items) == expected
    finally:
        core.stop()
        starter.end()


@pytest.mark.slow
def test_a_rank_that_stands_still_is_told_from_one_on_another_node_that_waits_for_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Tensor ranks over nodes: the head's rank hangs in a sum over TCP, whose other part does not come."""
    base = replace(BASE, step_timeout_seconds=3.0, cache=replace(BASE.cache, num_blocks=128))
    placement = nodes_placement(base, ParallelSizes(1, 1, 2))
    starter = HostStarter(RANK_COMMAND)
    core = EngineCore.start(nodes_config(base, placement), starter=starter)
    (still,) = children_of(starter.hosts["node1"].pid)
    assert core.add(replace(requests(3)[0], max_tokens=200)) is None
    for _ in range(10):
        core.step()
    os.kill(still, signal.SIGSTOP)

    def step_on() -> None:
        while core.has_work:
            core.step()

    expected = r"rank 1 \(node node1, cpu:0\) did not finish step \d+ within 3 s: .*, stopped by a signal; ranks 0 wait"
    began = time.monotonic()
    with pytest.raises(RankFailure, match=expected):
        step_on()
    assert time.monotonic() - began < 8
    core.stop()
    starter.end()
    assert not is_running(still)
    assert "stacks of rank 0" in capfd.readouterr().err
