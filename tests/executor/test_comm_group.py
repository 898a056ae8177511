"""Collectives and links of CPU ranks: exact sums in rank order, with ranks that come late."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from engine.comm.board import Activity, BoardLine, create_board, read_board, suspects
from engine.comm.ends import GroupError, create_group, create_link
from engine.comm.group import SharedGroup
from engine.comm.link import LinkError, RingReceiver, RingSender

PEER = Path(__file__).parent / "group_peer.py"


def test_sums_and_joins_are_exact() -> None:
    # Small slots, so that large tensors take several pieces; both ways of summing occur.
    size = 3
    ends = create_group(size, slot_bytes=128 << 10)
    peers = []
    for end in ends:
        peers.append(
            subprocess.Popen(
                [sys.executable, str(PEER), json.dumps([end.rank, end.segment, end.bells, 150])],
                pass_fds=end.fds,
                env={**os.environ, "PYTHONPATH": str(PEER.parents[2]), "OMP_NUM_THREADS": "1"},
            )
        )
        end.close()
    try:
        assert [peer.wait(100) for peer in peers] == [0] * size
    finally:
        for peer in peers:
            peer.kill()
            peer.wait()


def test_a_rank_that_does_not_come_is_named() -> None:
    first, second = create_group(2)
    group = SharedGroup(first, timeout_seconds=0.1)
    with pytest.raises(GroupError, match=r"ranks \[1\]"):
        group.all_reduce(torch.ones(3))
    group.close()
    second.close()


@pytest.mark.parametrize("sizes", [(1, 0), (2, 100)])
def test_no_group_of_one(sizes: tuple[int, int]) -> None:
    with pytest.raises(GroupError):
        create_group(sizes[0], slot_bytes=sizes[1])


def test_a_link_carries_tensors_larger_than_its_ring() -> None:
    ours, theirs = create_link()
    sender, receiver = RingSender(ours), RingReceiver(theirs, timeout_seconds=10.0)
    sent = [torch.randn(rows, 224) for rows in (1, 9000, 3)]
    thread = threading.Thread(target=lambda: [sender.send(x) for x in sent])
    thread.start()
    for x in sent:
        found = torch.empty_like(x)
        receiver.receive(found)
        assert torch.equal(found, x)
    thread.join()
    sender.close()
    with pytest.raises(LinkError, match="gone"):
        receiver.receive(torch.empty(1))
    receiver.close()


def test_the_board_tells_who_holds_a_step_up() -> None:
    board = create_board(3)
    lines = [BoardLine(board.view, rank) for rank in range(3)]
    for line in lines:
        line.phase("serve")
        line.begins(7)
    for line in (lines[0], lines[2]):
        line.meets()
        line.waits()
    states = read_board(board.view, range(3))
    assert [state.activity for state in states] == [Activity.WAITS, Activity.COMPUTES, Activity.WAITS]
    assert [state.rank for state in suspects(states, 7)] == [1]
    assert "computing in step 7" in str(states[1])
    # All wait: the one that met the others least often is behind, though it had to wait as often as they.
    lines[1].meets()
    lines[1].waits()
    for line in (lines[0], lines[2]):
        line.meets()
        line.waits()
    assert [state.rank for state in suspects(read_board(board.view, range(3)), 7)] == [1]
    lines[1].rests()
    lines[0].begins(8)
    lines[0].meets()
    lines[0].waits()
    assert [state.rank for state in suspects(read_board(board.view, range(3)), 8)] == [1, 2]
    board.close()
