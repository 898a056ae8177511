"""The wire between nodes: nobody without the secret comes in, no frame is taken that was not sent, silence ends it."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine.comm.node_listener import MAX_STRANGERS, MAX_STRANGERS_PER_ADDRESS, NodeListener, _Places, refuse
from engine.comm.node_messages import (
    Hello,
    NodeFacts,
    NodeKind,
    Refusal,
    check_facts,
    decode,
    encode,
    own_facts,
    read_hello,
)
from engine.comm.secure_link import (
    BEAT_SECONDS,
    MAX_FRAME_BYTES,
    PING,
    WIRE_VERSION,
    LinkLost,
    LinkRefused,
    SecureLink,
    answer,
    connect,
)

SECRET = b"a secret of the test"
HELLO = struct.Struct("<3sB32s")


@pytest.fixture
def refusals() -> list[str]:
    return []


@pytest.fixture
def door(refusals: list[str]) -> Iterator[NodeListener]:
    listener = NodeListener("127.0.0.1", 0, SECRET, refused=refusals.append, handshake_seconds=0.6)
    yield listener
    listener.close()


def pair(silence_seconds: float = 5.0) -> tuple[SecureLink, SecureLink]:
    """A node's and the head's end of one link."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ends: list[SecureLink] = []
        thread = threading.Thread(target=lambda: ends.append(answer(server.accept()[0], SECRET)))
        thread.start()
        node = connect("127.0.0.1", server.getsockname()[1], SECRET)
        thread.join()
    for link in (node, ends[0]):
        link.allow_silence(silence_seconds)
    return node, ends[0]


def raw(door: NodeListener, host: int = 1) -> socket.socket:
    """Come to the door from one of this machine's own addresses, 127.0.0.{host}."""
    sock = socket.create_connection(("127.0.0.1", door.port), 5, (f"127.0.0.{host}", 0))
    sock.settimeout(5)
    return sock


def ended_within(sock: socket.socket, seconds: float) -> float:
    began = time.monotonic()
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(4096):
            pass
    assert (took := time.monotonic() - began) < seconds
    return took


def wait_for(things: list[str], count: int = 1) -> None:
    deadline = time.monotonic() + 5
    while len(things) < count:
        assert time.monotonic() < deadline, things
        time.sleep(0.01)


def test_frames_of_all_sizes_go_both_ways_in_order() -> None:
    node, head = pair()
    bodies = [b"", b"x", os.urandom(4096), os.urandom(3 << 20)]
    sender = threading.Thread(target=lambda: [node.send(number + 1, body) for number, body in enumerate(bodies)])
    sender.start()
    assert [head.receive(5) for _ in bodies] == [(number + 1, body) for number, body in enumerate(bodies)]
    sender.join()
    head.send(9, memoryview(b"back"))
    assert node.receive(5) == (9, b"back")
    assert node.receive(0.05) is None
    assert (node.peer, head.address) == ("127.0.0.1", "127.0.0.1")
    with pytest.raises(LinkLost, match="above the limit"):
        node.send(1, bytes(MAX_FRAME_BYTES))
    node.dispose()
    with pytest.raises(LinkLost, match="closed the connection"):
        head.receive(5)
    head.dispose()


def test_a_link_goes_on_in_another_process() -> None:
    node, head = pair()
    node.send(1, b"before")
    node.send(2, b"after")
    assert head.receive(5) == (1, b"before")
    fd, state = head.detach()
    again = SecureLink(socket.socket(fileno=fd), state)
    assert again.receive(5) == (2, b"after")
    again.send(3)
    assert node.receive(5) == (3, b"")
    node.dispose()
    again.dispose()


def test_heartbeats_keep_an_idle_link_and_silence_ends_one() -> None:
    node, head = pair(silence_seconds=0.8)
    node.start_heartbeat()
    assert head.receive(1.6) is None  # nothing but signs of life, for twice as long as silence may last
    began = time.monotonic()
    with pytest.raises(LinkLost, match=r"has said nothing for \d\.\d s"):
        node.receive()  # the head's end never started its own
    assert time.monotonic() - began < 3
    node.dispose()
    head.dispose()


def test_a_beat_is_not_left_out_for_a_frame_that_was_sent_before_it() -> None:
    """The last frame before a silence may be half a second old when the next beat is due: then that one must come."""
    node, head = pair()
    raw_bytes = bytearray()
    node.start_heartbeat()
    deadline = time.monotonic() + 2 * BEAT_SECONDS + 0.3
    while time.monotonic() < deadline:
        node.send(1)
        time.sleep(0.05)
    node.dispose()
    while piece := head._socket.recv(1 << 16):
        raw_bytes += piece
    size = 12 + 16 + 1  # header, tag, and the kind
    kinds = [raw_bytes[at + size - 1] for at in range(0, len(raw_bytes), size)]
    assert kinds.count(PING) >= 2
    head.dispose()


def test_a_peer_that_reads_nothing_does_not_block_a_sender_for_ever() -> None:
    node, head = pair(silence_seconds=0.3)
    began = time.monotonic()

    def flood() -> None:
        for _ in range(64):
            node.send(1, bytes(1 << 20))

    with pytest.raises(LinkLost, match="cannot send to"):
        flood()
    assert time.monotonic() - began < 8
    node.dispose()
    head.dispose()


def test_who_knows_the_secret_comes_in(door: NodeListener, refusals: list[str]) -> None:
    link = connect("127.0.0.1", door.port, SECRET)
    link.send(NodeKind.HELLO, encode(Hello("two", "7", own_facts())))
    arrival = door.accept(5)
    assert arrival is not None
    assert (arrival.hello.node, arrival.hello.order_id) == ("two", "7")
    refuse(arrival.link, Refusal("not you", "another"))
    frame = link.receive(5)
    assert frame is not None
    assert (frame[0], decode(frame[1], Refusal)) == (NodeKind.REFUSED, Refusal("not you", "another"))
    assert refusals == []
    link.dispose()


def test_a_wrong_secret_is_refused_and_said_on_both_sides(door: NodeListener, refusals: list[str]) -> None:
    with pytest.raises(LinkRefused, match=r"127\.0\.0\.1 refuses this node's secret"):
        connect("127.0.0.1", door.port, b"another")
    wait_for(refusals)
    assert refusals == ["127.0.0.1 has another secret"]
    assert door.accept(0.1) is None


def test_a_head_that_does_not_know_the_secret_is_not_trusted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def pretend() -> None:
            sock, _ = server.accept()
            with sock:
                hello = sock.recv(HELLO.size, socket.MSG_WAITALL)
                sock.sendall(hello)  # even the node's own nonce, sent back
                proof = sock.recv(32, socket.MSG_WAITALL)
                sock.sendall(b"\0" + proof)  # and its own proof
                sock.recv(1)

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(LinkRefused, match="does not know the secret"):
            connect("127.0.0.1", server.getsockname()[1], SECRET)
        thread.join()


def test_a_recorded_handshake_is_worth_nothing(door: NodeListener, refusals: list[str]) -> None:
    """Everything that a node once sent, its first frame included, is sent again to the same door."""
    recorded = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as relay:

        def forward() -> None:
            near, _ = relay.accept()
            with near, raw(door) as far, contextlib.suppress(OSError):
                while ready := select.select([near, far], [], [], 5)[0]:
                    piece = ready[0].recv(4096)
                    if not piece:
                        break
                    (far if ready[0] is near else near).sendall(piece)
                    if ready[0] is near:
                        recorded.extend(piece)

        thread = threading.Thread(target=forward)
        thread.start()
        link = connect("127.0.0.1", relay.getsockname()[1], SECRET)
        link.send(NodeKind.HELLO, encode(Hello("two")))
        arrival = door.accept(5)
        assert arrival is not None
        arrival.link.dispose()
        link.dispose()
        thread.join()
    with raw(door) as replayed:
        replayed.sendall(recorded)
        ended_within(replayed, 3)
    wait_for(refusals)
    assert refusals == ["127.0.0.1 has another secret"]
    assert door.accept(0.1) is None


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"GET / HTTP/1.1\r\nHost: example\r\nAccept: everything\r\n\r\n", "does not speak hlaunch's wire"),
        (bytes(5000), "does not speak hlaunch's wire"),
        (HELLO.pack(b"HLN", WIRE_VERSION + 1, bytes(32)), f"speaks version {WIRE_VERSION + 1} of the wire"),
        (HELLO.pack(b"HLN", WIRE_VERSION, bytes(32)) + bytes(32), "has another secret"),
        (b"HLN", "did not finish the handshake in time"),
        (b"", "did not finish the handshake in time"),
    ],
    ids=["http", "zeros", "version", "no proof", "half a hello", "silence"],
)
def test_noise_is_turned_away_in_time(door: NodeListener, refusals: list[str], sent: bytes, expected: str) -> None:
    with raw(door) as sock:
        sock.sendall(sent)
        ended_within(sock, 3)
    wait_for(refusals)
    assert len(refusals) == 1
    assert expected in refusals[0]
    assert door.accept(0.05) is None


def test_slow_strangers_have_one_deadline_and_take_few_places(door: NodeListener, refusals: list[str]) -> None:
    """A byte now and then does not prolong the handshake, and the door opens again for who knows the secret."""
    slow = [raw(door, 1 + number // MAX_STRANGERS_PER_ADDRESS) for number in range(MAX_STRANGERS)]
    hello = HELLO.pack(b"HLN", WIRE_VERSION, bytes(32))
    began = time.monotonic()
    time.sleep(0.05)
    with raw(door, 200) as turned_away:
        ended_within(turned_away, 3)
    for byte in hello:
        for sock in slow:
            with contextlib.suppress(OSError):
                sock.sendall(bytes((byte,)))
        time.sleep(0.05)
        if len(refusals) > MAX_STRANGERS:
            break
    wait_for(refusals, MAX_STRANGERS + 1)
    assert time.monotonic() - began < 4
    assert sum("did not finish the handshake in time" in line for line in refusals) == MAX_STRANGERS
    assert refusals[0] == f"127.0.0.200 was turned away: {MAX_STRANGERS} others are in their handshake"
    for sock in slow:
        sock.close()
    link = connect("127.0.0.1", door.port, SECRET)
    link.send(NodeKind.HELLO, encode(Hello("two")))
    arrival = door.accept(5)
    assert arrival is not None
    arrival.link.dispose()
    link.dispose()


def test_one_address_cannot_take_all_places(refusals: list[str]) -> None:
    door = NodeListener("127.0.0.1", 0, SECRET, refused=refusals.append, handshake_seconds=30)
    silent = [raw(door, 2) for _ in range(MAX_STRANGERS)]
    try:
        wait_for(refusals, MAX_STRANGERS - MAX_STRANGERS_PER_ADDRESS)
        assert set(refusals) == {"127.0.0.2 was turned away: 4 others from there are in their handshake"}
        # Long before the deadline of those who stand there.
        link = connect("127.0.0.1", door.port, SECRET, timeout_seconds=5)
        link.send(NodeKind.HELLO, encode(Hello("two")))
        arrival = door.accept(5)
        assert arrival is not None
        arrival.link.dispose()
        link.dispose()
        # Who leaves gives the place back.
        for sock in silent:
            sock.close()
        wait_for(refusals, MAX_STRANGERS)
        connect("127.0.0.1", door.port, SECRET, bind="127.0.0.2").dispose()
    finally:
        door.close()


def test_a_subnet_of_ipv6_is_one_address() -> None:
    places = _Places()
    for number in range(MAX_STRANGERS_PER_ADDRESS):
        assert places.take(f"2001:db8:0:7::{number}%eth0") == ""
    assert "from there" in places.take("2001:db8:0:7:ffff::9")
    assert places.take("2001:db8:0:8::9") == ""
    places.give_back("2001:db8:0:7::1")
    assert places.take("2001:db8:0:7:ffff::9") == ""


def abort(sock: socket.socket) -> None:
    """Close with a reset, as the kernel does for a process that was killed with bytes unread."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("end", [socket.socket.close, abort], ids=["closed", "reset"])
def test_a_handshake_that_breaks_off_is_no_refusal(end: Callable[[socket.socket], None]) -> None:
    """A head that ends, or whose door is full, may be there again in a second: who joins must not give up."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def leave() -> None:
            sock, _ = server.accept()
            sock.recv(1)
            end(sock)

        thread = threading.Thread(target=leave)
        thread.start()
        with pytest.raises(LinkLost, match="handshake"):
            connect("127.0.0.1", server.getsockname()[1], SECRET)
        thread.join()
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(LinkLost, match="in time"):
        connect("127.0.0.1", silent.getsockname()[1], SECRET, timeout_seconds=0.2)


def test_a_peer_that_is_gone_before_its_link_is_taken_up_is_lost() -> None:
    node, head = pair()
    fd, state = head.detach()
    abort(node._socket)
    with socket.socket(fileno=fd) as sock:
        assert select.select([sock], [], [], 5)[0]
        with pytest.raises(LinkLost, match="right after the handshake"):
            SecureLink(sock, state)


def test_who_proves_the_secret_and_says_nothing_is_sent_away(door: NodeListener, refusals: list[str]) -> None:
    link = connect("127.0.0.1", door.port, SECRET)
    wait_for(refusals)
    assert refusals == ["a node proved the secret and then said nothing"]
    link.dispose()
    for hello in (Hello(""), Hello("x" * 300), Hello("a\x1b[2J")):
        link = connect("127.0.0.1", door.port, SECRET)
        link.send(NodeKind.HELLO, encode(hello))
        link.dispose()
    link = connect("127.0.0.1", door.port, SECRET)
    link.send(NodeKind.PREPARE, b"x")
    wait_for(refusals, 5)
    assert all("calls itself" in line for line in refusals[1:4])
    assert "not its hello" in refusals[4]
    link.dispose()


@pytest.mark.parametrize(
    "hello",
    [
        Hello("two", "x" * 256),
        Hello("two", "1", NodeFacts(hostname="a\x1b[2J")),
        Hello("two", "1", NodeFacts(torch="2.0\nerror: another line")),
        Hello("two", "1", NodeFacts(fabric={"NCCL_ALGO": "\x1b[2J"})),
    ],
    ids=["long", "escape", "line", "variable"],
)
def test_what_a_node_says_of_itself_is_fit_for_a_log(hello: Hello) -> None:
    with pytest.raises(LinkRefused, match="^two says '[^\x1b\n]{1,45}' of itself$"):
        read_hello((NodeKind.HELLO, encode(hello)))
    fit = Hello("two", "1", own_facts("ab" * 32))
    assert read_hello((NodeKind.HELLO, encode(fit))) == fit


def forged(key: bytes, length: int, sequence: int, payload: bytes) -> bytes:
    header = struct.pack("<IQ", length, sequence)
    return header + hashlib.blake2b(header + payload, digest_size=16, key=key).digest() + payload


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda key: forged(os.urandom(32), 3, 0, b"\1ab"), "does not carry its tag"),
        (lambda key: forged(key, 3, 1, b"\1ab"), "sent frame 1 where 0 was due"),
        (lambda key: forged(key, MAX_FRAME_BYTES + 1, 0, b""), "outside 1 to"),
        (lambda key: forged(key, 0, 0, b""), "outside 1 to"),
        (lambda key: forged(key, 3, 0, b"\1ab") * 2, "sent frame 0 where 1 was due"),
    ],
    ids=["another key", "a gap", "oversize", "empty", "twice"],
)
def test_a_frame_that_was_not_sent_ends_the_link(make: object, expected: str) -> None:
    node, head = pair()
    node._socket.sendall(make(node._keys.send_key))  # type: ignore[operator]

    def read() -> None:
        for _ in range(3):
            head.receive(2)

    with pytest.raises(LinkLost, match=expected):
        read()
    node.dispose()
    head.dispose()


def test_a_frame_cannot_be_sent_back() -> None:
    """Each direction has its own key: what the node wrote is nothing that the head could have written."""
    node, head = pair()
    assert not hmac.compare_digest(node._keys.send_key, node._keys.receive_key)
    head._socket.sendall(forged(node._keys.send_key, 3, 0, b"\1ab"))
    with pytest.raises(LinkLost, match="does not carry its tag"):
        node.receive(2)
    node.dispose()
    head.dispose()


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        ({"hlaunch": "0.0.9"}, r"two \(beta\) has hlaunch 0.0.9, the head 1"),
        ({"torch": ""}, r"two \(beta\) has torch none, the head 3"),
        ({"python": "3.12.1"}, r"two \(beta\) has Python 3.12, the head 3.11"),
        (
            {"fabric": {"NCCL_ALGO": "Tree", "NCCL_PROTO": "LL"}},
            r"two \(beta\) has NCCL_ALGO = Tree, the head \(alpha\) = Ring; ranks on several nodes must read it alike",
        ),
        ({"model_digest": "cd" * 32}, r"two \(beta\) has other weights: its model's digest is cdcdcdcdcdcd"),
    ],
)
def test_nodes_that_differ_are_told_apart(theirs: dict[str, Any], expected: str) -> None:
    ours: dict[str, Any] = {"hlaunch": "1", "python": "3.11.2", "torch": "3", "model_digest": "ab" * 32}
    ours["fabric"] = {"NCCL_ALGO": "Ring", "NCCL_PROTO": "LL"}
    same = NodeFacts(hostname="beta", **{**ours, "python": "3.11.9"})
    check_facts(NodeFacts(hostname="alpha", **ours), "two", same)
    with pytest.raises(LinkRefused, match=expected):
        check_facts(NodeFacts(hostname="alpha", **ours), "two", NodeFacts(hostname="beta", **{**ours, **theirs}))
