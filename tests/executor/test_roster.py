"""A roster's bell: rung once for a failure, and never through a descriptor that is somebody else's by then."""

from __future__ import annotations

import os
import socket

from executor_support import CONFIG
from nodes_support import nodes_placement

from engine.executor.roster import RankFailure, Roster
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
