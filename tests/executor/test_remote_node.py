"""A node that says what there is not is lost, by name: nothing of it reaches the engine as an error of its own."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace

import msgspec
import pytest
from executor_support import CONFIG, wait_until
from nodes_support import SECRET, nodes_placement

from engine import usage
from engine.comm.board import Activity, RankState
from engine.comm.node_listener import NodeArrival
from engine.comm.node_messages import Hello, NodeKind, RankStates, encode
from engine.comm.rdma_traffic import RdmaTraffic
from engine.comm.secure_link import SecureLink, answer, connect
from engine.executor.messages import PhaseReport, encode_report
from engine.executor.rank_line import RankLine
from engine.executor.remote_node import RemoteNode
from engine.executor.roster import NodeFailure, Roster
from engine.placement import ParallelSizes

PLACEMENT = nodes_placement(CONFIG, ParallelSizes(1, 2, 1))
PHASE = encode_report(PhaseReport(1, "nonsense"))
ALIEN = encode_report(PhaseReport(0, "load"))
STATE = RankState(1, "serve", Activity.WAITS, 7, 2, 0.5)
STATES = (
    int(NodeKind.STATES),
    msgspec.msgpack.encode({"ranks": [(msgspec.to_builtins(STATE) | {"activity": 99}, "", 0.0)]}),
)
TRAFFIC = RdmaTraffic(5.0, 10, 20)
UNPHASED = (int(NodeKind.USAGE), encode(RankStates([(replace(STATE, phase="lunch"), "", 0.0)])))
KEPT = (int(NodeKind.USAGE), encode(RankStates([(STATE, ", on strike", 1.0)])))


def frame(*states: RankState, traffic: RdmaTraffic | None = None) -> tuple[int, bytes]:
    return int(NodeKind.USAGE), encode(RankStates([(state, "", 0.0) for state in states], traffic))


def linked() -> tuple[SecureLink, RemoteNode, Roster]:
    """A host's end of a link, and the node as the head sees it over the other."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ends: list[SecureLink] = []
        thread = threading.Thread(target=lambda: ends.append(answer(server.accept()[0], SECRET)))
        thread.start()
        host = connect("127.0.0.1", server.getsockname()[1], SECRET)
        thread.join()
    roster = Roster(PLACEMENT.engine(0), lambda _: None)
    return host, RemoteNode(NodeArrival(ends[0], Hello("node1", "1")), PLACEMENT.on_node("node1"), roster, 10.0), roster


def test_what_ranks_do_arrives_as_it_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    host, node, roster = linked()
    try:
        node.spawn(None)
        said = RankStates([(STATE, ", stopped by a signal", 4.0)], TRAFFIC)
        told = [RankLine(PLACEMENT.ranks[1], STATE, ", stopped by a signal", 4.0)]
        assert node.usage() == ([], None)
        host.send(NodeKind.USAGE, encode(said))
        host.send(NodeKind.STATES, encode(said))
        assert node.lines(5) == told
        assert node.usage() == ([told[0].usage()], TRAFFIC)
        # Who says nothing more may do anything by now.
        monkeypatch.setattr(usage, "SILENT_SECONDS", 0.2)
        assert wait_until(lambda: node.usage()[0][0].state == "silent", 5)
        assert node.usage()[0][0].seconds > 0.2
    finally:
        node.stop()
        roster.close()
        host.dispose()


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (PHASE, "a report of phase 'nonsense', which there is not"),
        (ALIEN, "a report about rank 0, which is not its own"),
        (STATES, "Invalid enum value 99"),
        (UNPHASED, "a report of phase 'lunch', which there is not"),
        (frame(STATE, STATE), "the state of rank 1, which is not its own or was told already"),
        (frame(replace(STATE, rank=0)), "the state of rank 0, which is not its own or was told already"),
        (frame(replace(STATE, seconds=float("nan"))), "figures that cannot be: (nan, "),
        (frame(replace(STATE, waiting_seconds=-1.0)), "figures that cannot be"),
        (frame(replace(STATE, memory_bytes=1 << 63)), "figures that cannot be"),
        (frame(STATE, traffic=RdmaTraffic(5.0, -1, 0)), "figures that cannot be: (5.0, -1, 0)"),
        (KEPT, "a rank kept from running by ', on strike', which there is not"),
        ((int(NodeKind.STATES), b"\xc1"), "malformed"),
        ((63, b""), "not a report of kind 63"),
    ],
    ids=[
        "phase",
        "alien",
        "activity",
        "usage phase",
        "twice",
        "elsewhere",
        "nan",
        "negative",
        "huge",
        "traffic",
        "usage kernel",
        "msgpack",
        "kind",
    ],  # fmt: skip
)
def test_nonsense_is_the_loss_of_the_node(frame: tuple[int, bytes], said: str) -> None:
    host, node, roster = linked()
    try:
        node.spawn(None)
        host.send(*frame)
        cause = roster.wait_for_cause(5)
        assert isinstance(cause, NodeFailure)
        assert cause.message.startswith("node node1 (rank 1, cpu:0) is lost: ")
        assert said in cause.message
    finally:
        node.stop()
        roster.close()
        host.dispose()
