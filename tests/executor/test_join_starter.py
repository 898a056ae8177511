"""A core's way to the desk: what happens to one host on its way there is not the end of all news."""

from __future__ import annotations

import socket
import struct
from queue import SimpleQueue

from executor_support import CONFIG
from nodes_support import nodes_config, nodes_placement

from engine.comm.node_messages import Came, Hello, NodeNews, encode
from engine.comm.secure_link import LinkState
from engine.executor.join_starter import JoinStarter
from engine.placement import ParallelSizes


def test_a_host_that_died_on_its_way_is_left_out_and_the_next_news_is_heard() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        host = socket.create_connection(door.getsockname())
        taken, _ = door.accept()
    # A reset, as the kernel sends it for a process that was killed: such a connection has no peer any more.
    host.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
    host.close()
    desk, core = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lost: SimpleQueue[tuple[str, str]] = SimpleQueue()
    starter = JoinStarter(core, nodes_config(CONFIG, nodes_placement(CONFIG, ParallelSizes(1, 2, 1))))
    starter.start([], lambda node, why: lost.put((node, why)))
    try:
        came = Came(Hello("node1", "1"), LinkState(bytes(32), bytes(32)))
        with taken:
            socket.send_fds(desk, [encode(came)], [taken.fileno()])
        desk.send(encode(NodeNews("node1", lost="was killed", is_host=True)))
        assert lost.get(timeout=5) == ("node1", "was killed")
        assert starter.accept(0) is None
    finally:
        starter.stop()
        desk.close()
