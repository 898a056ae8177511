"""The door at which hosts of ranks on other nodes come in: one listening socket, and nobody past it without the secret.

Knows: how many strangers may stand at the door, for how long; who a node says it is. Refuses to know: which nodes are
wanted, and for what.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from engine.comm.node_messages import Hello, NodeKind, Refusal, encode, read_hello
from engine.comm.secure_link import HANDSHAKE_SECONDS, NodeLinkError, SecureLink, answer
from engine.process import say

MAX_STRANGERS = 16
"""Connections that may be in their handshake at once; each ends within its deadline, and any further one at once."""
MAX_STRANGERS_PER_ADDRESS = 4
"""Of these, from one address: whoever holds more would keep the others out. Hosts of one node that come at the same
moment take milliseconds each, and come again."""
_IPV6_SUBNET_BITS = 64
"""One customer of IPv6 has at least so much, all of it is one address here."""
_SAY_AGAIN_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class NodeArrival:
    """A node at the door: it has proved the secret and said who it is."""

    link: SecureLink
    hello: Hello


class NodeListener:
    """Listens on one address until `close`, and queues who came in.

    `refused` is called from its threads with one line about each connection that was turned away. Raises: OSError when
    the address cannot be bound.
    """

    def __init__(
        self,
        host: str,
        port: int,
        secret: bytes,
        *,
        refused: Callable[[str], None] | None = None,
        handshake_seconds: float = HANDSHAKE_SECONDS,
    ) -> None:
        self._secret = secret
        self._seconds = handshake_seconds
        self._refused = refused or _Complaints().say
        self._arrivals: SimpleQueue[NodeArrival | None] = SimpleQueue()
        self._places = _Places()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=64)
        self.host: str = host
        self.port: int = self._socket.getsockname()[1]
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="node listener", daemon=True)
        self._thread.start()

    def accept(self, timeout_seconds: float | None = None) -> NodeArrival | None:
        """Take the next node that came in; None at the timeout, or once the door is closed."""
        with contextlib.suppress(Empty):
            return self._arrivals.get(timeout=timeout_seconds)
        return None

    def close(self) -> None:
        """Let nobody in any more; who is still in the queue is sent away. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join(5.0)
        self._socket.close()
        with contextlib.suppress(Empty):
            while (left := self._arrivals.get_nowait()) is not None:
                left.link.dispose()
        self._arrivals.put(None)

    def _run(self) -> None:
        while not self._is_closed:
            try:
                sock, (peer, *_) = self._socket.accept()
            except OSError:
                time.sleep(0.05)  # closed; or no descriptors are left, and others will close theirs
                continue
            if said := self._places.take(peer):
                sock.close()
                self._refused(f"{peer} was turned away: {said}")
                continue
            threading.Thread(target=self._let_in, args=(sock, peer), name="node handshake", daemon=True).start()

    def _let_in(self, sock: socket.socket, peer: str) -> None:
        link: SecureLink | None = None
        try:
            link = answer(sock, self._secret, timeout_seconds=self._seconds)
            arrival = NodeArrival(link, read_hello(link.receive(self._seconds)))
        except NodeLinkError as error:
            if link is not None:
                link.dispose()
            self._refused(str(error))
        else:
            self._arrivals.put(arrival)
        finally:
            self._places.give_back(peer)


def refuse(link: SecureLink, refusal: Refusal) -> None:
    """Tell a node why it is not taken in, and let it go."""
    with contextlib.suppress(NodeLinkError):
        link.send(NodeKind.REFUSED, encode(refusal))
    link.dispose()


class _Places:
    """Who is in a handshake: so many at once, and of these so many from one address."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_address: Counter[str] = Counter()

    def take(self, peer: str) -> str:
        """Take a place; returns why there is none, or nothing."""
        address = _address_of(peer)
        with self._lock:
            if self._by_address[address] >= MAX_STRANGERS_PER_ADDRESS:
                return f"{MAX_STRANGERS_PER_ADDRESS} others from there are in their handshake"
            if self._by_address.total() >= MAX_STRANGERS:
                return f"{MAX_STRANGERS} others are in their handshake"
            self._by_address[address] += 1
        return ""

    def give_back(self, peer: str) -> None:
        address = _address_of(peer)
        with self._lock:
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]


def _address_of(peer: str) -> str:
    """Name what counts as one address: a host of IPv4, a subnet of IPv6."""
    address = ipaddress.ip_address(peer.partition("%")[0])
    if address.version == 4:
        return peer
    return str(ipaddress.ip_network((address, _IPV6_SUBNET_BITS), strict=False))


class _Complaints:
    """Says each line once in a while: a scanner must not fill the log."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}

    def say(self, line: str) -> None:
        now = time.monotonic()
        if len(self._said) > 256:
            self._said.clear()
        if now - self._said.get(line, -_SAY_AGAIN_SECONDS) >= _SAY_AGAIN_SECONDS:
            self._said[line] = now
            say(f"nodes: {line}")
