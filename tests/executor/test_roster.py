"""A roster's bell: rung once for a failure, and never through a descriptor that is somebody else's by then."""

from __future__ import annotations

import os
import socket

from executor_support import CONFIG
from nodes_support import nodes_placement

from engine.executor.messages import EndedReport, FaultReport
from engine.executor.roster import NodeFailure, RankFailure, Roster
from engine.placement import ParallelSizes

RANKS = nodes_placement(CONFIG, ParallelSizes(1, 2, 1)).engine(0)


def test_a_failure_rings_the_bell_and_the_first_one_stands() -> None:
    roster = Roster(RANKS, lambda _: None)
    first = RankFailure(RANKS[0], "serve", "broke", seconds=1.0)
    assert roster.fail(first) is first
    assert roster.fail(RankFailure(RANKS[1], "serve", "broke", seconds=1.0)) is first
    assert os.eventfd_read(roster.bell) == 1
    roster.close()


def test_a_failure_that_is_decided_after_the_end_writes_into_nothing() -> None:
    ours, theirs = socket.socketpair()
    roster = Roster(RANKS, lambda _: None)
    number = roster.bell
    roster.close()
    roster.close()
    os.dup2(theirs.fileno(), number)  # somebody else's from now on
    theirs.close()
    try:
        roster.fail(RankFailure(RANKS[0], "serve", "broke", seconds=1.0))
    finally:
        os.close(number)
    assert ours.recv(64) == b""
    ours.close()


def test_a_rank_that_broke_by_the_loss_of_a_node_is_not_blamed_for_its_end() -> None:
    """A killed container's network is gone with it: who waited for it ends long before its link counts as cut."""
    roster = Roster(RANKS, lambda _: None)
    roster.hear(FaultReport(0, "serve", "GroupError", "a rank of the group is gone", is_echo=True))
    roster.hear(EndedReport(0, "ended by itself with code 1"))
    assert roster.wait_for_cause(1.0) is None
    roster.lose_node(RANKS[1:], "nothing was acknowledged for 2 s")
    cause = roster.wait_for_cause(3.0)
    assert isinstance(cause, NodeFailure)
    assert cause.node == RANKS[1].node
    roster.close()
