"""Who is in the cluster, from view to view: comings and goings are told once, ghosts and losses are told apart."""

from __future__ import annotations

import os
import selectors
import sys
import time

from launcher.supervise.cluster_view import ClusterView, Member
from launcher.supervise.engine_process import EngineProcess
from launcher.supervise.membership import Membership
from launcher.supervise.node_child import NodeChild
from launcher.supervise.node_spec import Peer

ONE, TWO = Peer("one", "10.0.0.1", "head"), Peer("two", "10.0.0.2", "worker", gpus=2)


def view(*members: tuple[str, str, bool, int]) -> ClusterView:
    """Members as (ip, id, is_alive, gpus)."""
    return ClusterView(tuple(Member(ip, alive, gpus, id=name, reason="" if alive else "heartbeats stopped")
                             for ip, name, alive, gpus in members))  # fmt: skip


def test_who_comes_and_goes_is_told_once() -> None:
    told: list[str] = []
    members = Membership((ONE, TWO), ONE.ip, told.append)
    assert not members.take(ClusterView(error="unreachable", message="no answer"))
    assert (members.num_here, members.awaited()) == (0, "one (10.0.0.1), two (10.0.0.2)")
    head = (ONE.ip, "a", True, 0)
    for seen in (view(head), view(head), view(head, (TWO.ip, "b", True, 1))):
        assert members.take(seen)
    assert told == ["head one (10.0.0.1) joined", "worker two (10.0.0.2) joined"]
    assert (members.num_here, members.is_complete, members.awaited()) == (2, False, "two (10.0.0.2) has 1 of 2 GPUs")
    members.take(view(head, (TWO.ip, "b", True, 2)))
    assert members.is_complete
    members.take(view(head, (TWO.ip, "b", False, 2)))
    members.take(view(head, (TWO.ip, "b", False, 2), (TWO.ip, "c", True, 2)))
    members.take(view(head, (TWO.ip, "d", True, 2)))
    assert told[2:] == [
        "worker two (10.0.0.2) left: heartbeats stopped",
        "worker two (10.0.0.2) was restarted and joined again",
        "worker two (10.0.0.2) was restarted and joined again",
    ]
    members.take(view(head, (TWO.ip, "d", False, 2)))
    assert members.reasons() == ["two: heartbeats stopped"]
    assert [node["is_alive"] for node in members.to_data()] == [True, False]


def test_a_ghost_is_not_taken_for_what_starts_now() -> None:
    members = Membership((ONE, TWO), TWO.ip, lambda _: None)
    members.take(view((TWO.ip, "killed", True, 2)))
    members.begin_to_join()
    assert not members.has_joined
    members.take(view((TWO.ip, "killed", True, 2), (TWO.ip, "new", True, 2)))
    assert members.has_joined


def test_a_node_is_lost_from_the_first_view_without_it() -> None:
    members = Membership((ONE, TWO), TWO.ip, lambda _: None)
    here, gone = view((TWO.ip, "x", True, 2)), view((TWO.ip, "x", False, 2))
    found = []
    for seen, now in ((here, 10.0), (gone, 20.0), (gone, 35.0), (here, 36.0), (gone, 40.0), (gone, 41.0)):
        members.take(seen)
        found.append(members.seconds_lost(now))
    assert found == [0.0, 0.0, 15.0, 0.0, 0.0, 1.0]


def test_a_childs_lines_arrive_whole_and_nothing_of_it_is_left() -> None:
    program = (
        "import os, sys; os.fork() or os.fork(); print('one'); print('two', flush=True); import time; time.sleep(60)"
    )
    heard: list[bytes] = []
    process = EngineProcess.start((sys.executable, "-c", program), os.environ, "/", what="Ray")
    with selectors.DefaultSelector() as selector:
        child = NodeChild(process, selector, {process.output_fd: heard.append})
        deadline = time.monotonic() + 20
        while len(heard) < 6 and time.monotonic() < deadline:
            for key, _ in selector.select(1.0):
                assert key.data is child
                key.data.on_event(key.fd)
        assert sorted(heard) == [b"one"] * 3 + [b"two"] * 3
        child.end()
        assert not selector.get_map()
    assert process.poll() == -9
