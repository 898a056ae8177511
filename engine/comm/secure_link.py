"""One TCP connection between two nodes of an engine, authenticated both ways by a secret that both know.

Knows: the handshake, sequenced and tagged frames, heartbeats, when the other side counts as lost. Refuses to know: what
a frame means, who listens. It authenticates and does not encrypt: for a network of one's own.

    handshake   node → head    "HLN" | version u8 | nonce 32
                head → node    "HLN" | version u8 | nonce 32
                node → head    HMAC-SHA256(secret, "node" | both nonces)
                head → node    0 | HMAC-SHA256(secret, "head" | both nonces), or one byte that says why not
    frame       u32 payload length | u64 sequence | BLAKE2b-128(direction key, header + payload) | payload
    payload     kind u8 | body

Every field of the handshake has a fixed size and all of it one deadline: before the proof nothing that a stranger sends
is ever interpreted. The node proves itself first, so the head is no oracle; both nonces are in each proof and each key,
so nothing can be replayed, and each direction has a key of its own, so nothing can be sent back.

Errors: NodeLinkError > LinkRefused (who is there is not who should be), LinkLost (closed, cut, silent, or noise). A
handshake that only breaks off proves nothing: the other side may be about to end, or have its hands full.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

WIRE_VERSION = 1
MAX_FRAME_BYTES = 64 << 20
HANDSHAKE_SECONDS = 5.0
BEAT_SECONDS = 0.5
SILENCE_SECONDS = 4.0
"""A peer that sends nothing for this long hangs or was stopped; it beats eight times as often, on busy cores too."""
CUT_SECONDS = 2.0
"""The kernel answers for a process that is slow: bytes that nobody acknowledges for this long are a cut cable."""
PING = 0
_MAGIC = b"HLN"
_HELLO = struct.Struct("<3sB32s")
_HEADER = struct.Struct("<IQ")
_TAG_BYTES = 16
_PROOF_BYTES = 32
_OK, _WRONG_SECRET = 0, 1
_READ_BYTES = 1 << 18


class NodeLinkError(Exception):
    """The connection to another node cannot be made or kept. The text is one line for people."""


class LinkRefused(NodeLinkError):
    """The other side does not prove the secret, or speaks something else: trying again would not help."""


class LinkLost(NodeLinkError):
    """The connection ended, perhaps before it began: closed, cut, silent, or no longer what it was."""


@dataclass(frozen=True, slots=True)
class LinkState:
    """What an open link is besides its socket: keys of both directions, the next sequence numbers, bytes half read."""

    send_key: bytes
    receive_key: bytes
    sent: int = 0
    received: int = 0
    unread: bytes = b""


class SecureLink:
    """Frames over a connected, authenticated socket. Any thread may send; one thread receives.

    Raises: LinkLost when the other side is gone already; the socket is closed then.
    """

    def __init__(self, sock: socket.socket, state: LinkState, *, silence_seconds: float = SILENCE_SECONDS) -> None:
        try:
            _tune(sock, silence_seconds)
            self.address: str = sock.getsockname()[0]
            """This side's address on the network that the link goes over."""
            self.peer: str = sock.getpeername()[0]
        except OSError as error:
            sock.close()
            raise LinkLost(f"the connection broke right after the handshake: {_reason(error)}") from error
        self._socket = sock
        self._keys = state
        self._sent, self._received = state.sent, state.received
        self._silence = silence_seconds
        self._buffer = bytearray(state.unread)
        self._send_lock = threading.Lock()
        self._heard = time.monotonic()
        self._is_closed = threading.Event()
        self._beat: threading.Thread | None = None

    def allow_silence(self, seconds: float) -> None:
        """Set how long the peer may say nothing, or read nothing."""
        self._silence = seconds
        with contextlib.suppress(OSError):  # a link that is closed: whoever uses it learns of that
            _limit_sending(self._socket, seconds)

    def start_heartbeat(self) -> None:
        """Send a sign of life every half a second, from a thread, until the link is closed."""
        if self._beat is None:
            self._beat = threading.Thread(target=self._run_heartbeat, name="heartbeat", daemon=True)
            self._beat.start()

    def send(self, kind: int, body: bytes | bytearray | memoryview = b"") -> None:
        """Send a frame. Blocks while the peer reads nothing, at most for the silence allowed. Raises: LinkLost."""
        length = len(body) + 1
        if length > MAX_FRAME_BYTES:
            raise LinkLost(f"a frame of {length} bytes is above the limit of {MAX_FRAME_BYTES}")
        with self._send_lock:
            header = _HEADER.pack(length, self._sent)
            payload = bytes((kind,)) + body
            tag = hashlib.blake2b(header + payload, digest_size=_TAG_BYTES, key=self._keys.send_key).digest()
            self._sent += 1
            try:
                self._socket.sendall(header + tag + payload)
            except OSError as error:
                # A frame that was cut in two cannot be mended.
                self.close()
                raise LinkLost(f"cannot send to {self.peer}: {_reason(error)}") from error

    def receive(self, timeout_seconds: float | None = None) -> tuple[int, bytes] | None:
        """Take the next frame that is no heartbeat: its kind and body; None at the timeout.

        Raises: LinkLost with the cause, also when nothing at all was heard for longer than a peer may be silent.
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            frame = self._take()
            if frame is not None:
                if frame[0] == PING:
                    continue
                return frame
            now = time.monotonic()
            wait = max(0.0, min(BEAT_SECONDS, self._heard + self._silence - now))
            # First what has come already, however long nobody looked.
            if self._fill(wait if deadline is None else max(0.0, min(wait, deadline - now))):
                continue
            now = time.monotonic()
            if now - self._heard >= self._silence:
                raise LinkLost(f"{self.peer} has said nothing for {now - self._heard:.1f} s")
            if deadline is not None and now >= deadline:
                return None

    def close(self) -> None:
        """End the connection, whatever other threads do with it. Idempotent."""
        if self._is_closed.is_set():
            return
        self._is_closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def dispose(self) -> None:
        """Close, and give the descriptor back once no thread uses it."""
        self.close()
        if self._beat is not None and self._beat is not threading.current_thread():
            self._beat.join(2 * BEAT_SECONDS)
        self._socket.close()

    def detach(self) -> tuple[int, LinkState]:
        """Give up the socket so that another process can go on with it: its descriptor and the state.

        Only before a heartbeat was started.
        """
        assert self._beat is None, "two processes would write one sequence"
        state = LinkState(self._keys.send_key, self._keys.receive_key, self._sent, self._received, bytes(self._buffer))
        return self._socket.detach(), state

    def _take(self) -> tuple[int, bytes] | None:
        """Cut a whole frame off the buffer."""
        buffer = self._buffer
        start = _HEADER.size + _TAG_BYTES
        if len(buffer) < start:
            return None
        length, sequence = _HEADER.unpack_from(buffer)
        if not 1 <= length <= MAX_FRAME_BYTES:
            raise LinkLost(f"{self.peer} announced a frame of {length} bytes, outside 1 to {MAX_FRAME_BYTES}")
        if len(buffer) < start + length:
            return None
        payload = bytes(buffer[start : start + length])
        signed = bytes(buffer[: _HEADER.size]) + payload
        tag = hashlib.blake2b(signed, digest_size=_TAG_BYTES, key=self._keys.receive_key).digest()
        if not hmac.compare_digest(tag, bytes(buffer[_HEADER.size : start])):
            raise LinkLost(f"a frame that came from {self.peer} does not carry its tag: somebody else wrote it")
        if sequence != self._received:
            raise LinkLost(f"{self.peer} sent frame {sequence} where {self._received} was due")
        self._received += 1
        del buffer[: start + length]
        return payload[0], payload[1:]

    def _fill(self, seconds: float) -> bool:
        """Take in what comes within `seconds`; whether anything did."""
        began = time.monotonic()
        poll = select.poll()
        try:
            poll.register(self._socket, select.POLLIN)
            if not poll.poll(max(0.0, seconds) * 1e3):
                late = time.monotonic() - began - seconds
                if late > BEAT_SECONDS:
                    # This process itself stood still: the peer's silence is not known to be as long.
                    self._heard += late
                return False
            piece = self._socket.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except (OSError, ValueError) as error:
            raise LinkLost(f"the connection to {self.peer} broke: {_reason(error)}") from error
        if not piece or self._is_closed.is_set():
            raise LinkLost(f"{self.peer} closed the connection")
        self._heard = time.monotonic()
        self._buffer += piece
        return True

    def _run_heartbeat(self) -> None:
        while not self._is_closed.wait(BEAT_SECONDS):
            # Whatever else was sent: one left out because of a frame a moment ago would make the gap twice as long.
            with contextlib.suppress(LinkLost):  # whoever receives will learn of it
                self.send(PING)


def connect(
    host: str, port: int, secret: bytes, *, timeout_seconds: float = HANDSHAKE_SECONDS, bind: str = ""
) -> SecureLink:
    """Reach the head and prove the secret to each other; `bind` is the own address to go out from.

    Raises: LinkLost when nobody is there, or no longer; LinkRefused when it is somebody else.
    """
    try:
        sock = socket.create_connection((host, port), timeout_seconds, (bind, 0) if bind else None)
    except OSError as error:
        raise LinkLost(f"nobody answers at {host}:{port}: {_reason(error)}") from error
    try:
        return SecureLink(sock, _prove_as_node(sock, secret, time.monotonic() + timeout_seconds))
    except BaseException:
        sock.close()
        raise


def answer(sock: socket.socket, secret: bytes, *, timeout_seconds: float = HANDSHAKE_SECONDS) -> SecureLink:
    """Take in a node on an accepted socket, which is closed unless it proves the secret. Raises: NodeLinkError."""
    try:
        return SecureLink(sock, _prove_as_head(sock, secret, time.monotonic() + timeout_seconds))
    except BaseException:
        sock.close()
        raise


def _prove_as_node(sock: socket.socket, secret: bytes, deadline: float) -> LinkState:
    ours = secrets.token_bytes(32)
    _put(sock, _HELLO.pack(_MAGIC, WIRE_VERSION, ours), deadline)
    theirs = _read_hello(sock, deadline)
    both = ours + theirs
    _put(sock, _mac(secret, b"node", both), deadline)
    (status,) = _get(sock, 1, deadline)
    if status == _WRONG_SECRET:
        raise LinkRefused(f"{_peer(sock)} refuses this node's secret")
    if status != _OK or not hmac.compare_digest(_get(sock, _PROOF_BYTES, deadline), _mac(secret, b"head", both)):
        raise LinkRefused(f"{_peer(sock)} does not know the secret: it is not the head")
    return LinkState(_mac(secret, b"key to head", both), _mac(secret, b"key to node", both))


def _prove_as_head(sock: socket.socket, secret: bytes, deadline: float) -> LinkState:
    ours = secrets.token_bytes(32)
    theirs = _read_hello(sock, deadline, before_refusal=_HELLO.pack(_MAGIC, WIRE_VERSION, ours))
    _put(sock, _HELLO.pack(_MAGIC, WIRE_VERSION, ours), deadline)
    both = theirs + ours
    if not hmac.compare_digest(_get(sock, _PROOF_BYTES, deadline), _mac(secret, b"node", both)):
        with contextlib.suppress(OSError, NodeLinkError):
            _put(sock, bytes((_WRONG_SECRET,)), deadline)
        raise LinkRefused(f"{_peer(sock)} has another secret")
    _put(sock, bytes((_OK,)) + _mac(secret, b"head", both), deadline)
    return LinkState(_mac(secret, b"key to node", both), _mac(secret, b"key to head", both))


def _read_hello(sock: socket.socket, deadline: float, before_refusal: bytes = b"") -> bytes:
    magic, version, nonce = _HELLO.unpack(_get(sock, _HELLO.size, deadline))
    if magic != _MAGIC:
        raise LinkRefused(f"{_peer(sock)} does not speak hlaunch's wire")
    if version != WIRE_VERSION:
        if before_refusal:
            # The other side is to learn the version too, and then says the same.
            _put(sock, before_refusal, deadline)
        raise LinkRefused(f"{_peer(sock)} speaks version {version} of the wire, this side {WIRE_VERSION}")
    return bytes(nonce)


def _mac(secret: bytes, label: bytes, nonces: bytes) -> bytes:
    return hmac.new(secret, b"hlaunch " + label + b"\0" + nonces, hashlib.sha256).digest()


def _get(sock: socket.socket, size: int, deadline: float) -> bytes:
    data = bytearray()

    def receive() -> bytes:
        return sock.recv(size - len(data))

    while len(data) < size:
        data += _within(sock, deadline, receive)
    return bytes(data)


def _put(sock: socket.socket, data: bytes, deadline: float) -> None:
    def send() -> bytes:
        sock.sendall(data)
        return data

    _within(sock, deadline, send)


def _within(sock: socket.socket, deadline: float, act: Callable[[], bytes]) -> bytes:
    left = deadline - time.monotonic()
    try:
        if left <= 0:
            raise TimeoutError
        sock.settimeout(left)
        done = act()
    except TimeoutError:
        raise LinkLost(f"{_peer(sock)} did not finish the handshake in time") from None
    except OSError as error:
        raise LinkLost(f"the handshake with {_peer(sock)} broke: {_reason(error)}") from error
    if not done:
        raise LinkLost(f"{_peer(sock)} closed the connection during the handshake")
    return done


def _tune(sock: socket.socket, silence_seconds: float) -> None:
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(CUT_SECONDS * 1e3))
    _limit_sending(sock, silence_seconds)


def _limit_sending(sock: socket.socket, limit_seconds: float) -> None:
    seconds, fraction = divmod(limit_seconds, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(seconds), int(fraction * 1e6)))


def _peer(sock: socket.socket) -> str:
    with contextlib.suppress(OSError):
        return str(sock.getpeername()[0])
    return "the other side"


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer (cut off?)"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
