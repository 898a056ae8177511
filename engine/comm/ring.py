"""A broadcast ring in shared memory: one writer, up to 62 readers, every reader gets every message, in order.

Knows: slots, flags, who has read what, who is gone. Refuses to know: what a message means; bodies are bytes.

    header   64 B              magic "HLR1" | version u16 | readers u16 | slots u32 | slot_bytes u32 | creator pid u32
    control  slots x 64 B      byte 0 = written, bytes 1..n = read_i             one cache line per slot
    parked   (n + 1) x 64 B    byte 0 of line i = reader i sleeps; line n: the writer sleeps
    data     slots x slot_bytes    [u32 length | u8 kind | 3 B | u64 sequence | body]

A slot is free when written is 0 or all read_i are 1. Memory order:

    writer    wait until free → written := 0 → body → all read := 0 → FENCE → written := 1 → FENCE → ring who sleeps
    reader i  see written 1 and read_i 0 → FENCE → copy out → FENCE → read_i := 1 → FENCE → ring the writer if it sleeps

Clearing the reads after setting written would show a half-reset slot. Flags are single bytes, which cannot tear.

A body larger than a slot travels in a memfd of its own, whose descriptor follows over each reader's socket: no copy per
reader, and nobody blocks. The same sockets tell either side that the other is gone: a dead reader counts as having read
everything, and a reader of a dead writer first reads what was written.

Errors: RingError > RingClosed (the other side is gone), RingTimeout (a reader is too slow; names it).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

from engine.comm.segment import LINE, Segment, Sleeper, fence, new_bell, wake

MAX_READERS = 62
MAX_MESSAGE_BYTES = 64 << 20
_MAGIC = b"HLR1"
_VERSION = 1
_HEADER = struct.Struct("<4sHHIII")
_SLOT = struct.Struct("<IB3xQ")
_ELSEWHERE = 0x80
"""Bit of a slot's kind: the body lies in a memfd of its own."""


class RingError(Exception):
    """The ring is not what it should be: a foreign segment, a lost message, a message above the limit."""


class RingClosed(RingError):
    """The other side is gone."""


class RingTimeout(RingError):
    """Some readers leave the ring full. `readers` are their numbers."""

    def __init__(self, readers: Sequence[int], seconds: float) -> None:
        super().__init__(f"readers {list(readers)} have read nothing for {seconds:.1f} s, the ring is full")
        self.readers = tuple(readers)


@dataclass(frozen=True, slots=True)
class RingEnd:
    """The descriptors of one end, to be inherited by the process that will use it. `index` -1 is the writer's.

    `bells` are the eventfds of all readers and then the writer's (a reader holds only its own and the writer's, the
    others are -1); `sockets` is one per reader, or a reader's only one.
    """

    index: int
    segment: int
    bells: tuple[int, ...]
    sockets: tuple[int, ...]

    @property
    def fds(self) -> tuple[int, ...]:
        return (self.segment, *(fd for fd in self.bells if fd >= 0), *self.sockets)

    def close(self) -> None:
        """Close an end that another process has inherited."""
        for fd in self.fds:
            with contextlib.suppress(OSError):
                os.close(fd)


def create_ring(num_readers: int, *, slots: int = 8, slot_bytes: int = 1 << 20) -> tuple[RingEnd, list[RingEnd]]:
    """Make a ring; returns the writer's end and each reader's. Raises: RingError on sizes that make no ring."""
    if not 1 <= num_readers <= MAX_READERS:
        raise RingError(f"{num_readers} readers: a ring serves 1 to {MAX_READERS}")
    if slots < 2 or slot_bytes <= _SLOT.size or slot_bytes % LINE:
        raise RingError(f"{slots} slots of {slot_bytes} bytes: at least 2, of a multiple of {LINE} bytes")
    size = LINE * (1 + slots + num_readers + 1) + slots * slot_bytes
    segment = Segment.create("hlaunch-ring", size)
    _HEADER.pack_into(segment.view, 0, _MAGIC, _VERSION, num_readers, slots, slot_bytes, os.getpid())
    bells = [new_bell() for _ in range(num_readers + 1)]
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(num_readers)]
    readers = [
        RingEnd(
            index,
            os.dup(segment.fd),
            tuple(os.dup(fd) if i in (index, num_readers) else -1 for i, fd in enumerate(bells)),
            (theirs.detach(),),
        )
        for index, (_, theirs) in enumerate(pairs)
    ]
    writer = RingEnd(-1, os.dup(segment.fd), tuple(bells), tuple(ours.detach() for ours, _ in pairs))
    segment.close()
    return writer, readers


class _End:
    """What both ends hold: the mapped segment and where things lie in it."""

    def __init__(self, end: RingEnd) -> None:
        self._segment = Segment(end.segment)
        self._view = view = self._segment.view
        if self._segment.size < _HEADER.size:
            raise RingError("not a ring: the segment is too small")
        magic, version, readers, slots, slot_bytes, _ = _HEADER.unpack_from(view)
        parked_at = LINE * (1 + slots)
        data_at = parked_at + LINE * (readers + 1)
        if magic != _MAGIC or version != _VERSION or self._segment.size != data_at + slots * slot_bytes:
            raise RingError(f"not a ring of version {_VERSION}: {magic!r}, version {version}")
        self._num_readers: int = readers
        self._control = [LINE * (1 + slot) for slot in range(slots)]
        self._data = [data_at + slot * slot_bytes for slot in range(slots)]
        self._room: int = slot_bytes - _SLOT.size
        self._parked = [parked_at + LINE * i for i in range(readers + 1)]
        self._bells = end.bells
        self._sockets = [socket.socket(fileno=fd) for fd in end.sockets]
        self._sequence = 0
        self._is_closed = False
        own = end.index if end.index >= 0 else readers
        self._sleeper = Sleeper(view, self._parked[own], end.bells[own])
        for link in self._sockets:
            self._sleeper.watch(link.fileno())

    @property
    def num_parks(self) -> int:
        """How often this end went to sleep."""
        return self._sleeper.num_parks

    def close(self) -> None:
        """Leave the ring; the other side notices. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        for link in self._sockets:
            link.close()
        self._segment.close()
        for fd in self._bells:
            if fd >= 0:
                os.close(fd)


class RingWriter(_End):
    """The writing end. Not for two threads at once."""

    def __init__(self, end: RingEnd) -> None:
        super().__init__(end)
        self._all_read = b"\1" * self._num_readers
        self._cleared = bytearray(self._num_readers)
        self._reader_of = {link.fileno(): index for index, link in enumerate(self._sockets)}

    @property
    def live_readers(self) -> tuple[int, ...]:
        """Readers that are not known to be gone; a death is noticed when the ring is full, or by `look`."""
        return tuple(index for index, is_gone in enumerate(self._cleared) if not is_gone)

    def look(self) -> tuple[int, ...]:
        """Find out now who is gone; returns the readers that are left."""
        for index in self.live_readers:
            with contextlib.suppress(BlockingIOError):
                self._hear(index)
        return self.live_readers

    def write(self, body: bytes | bytearray | memoryview, kind: int = 0, *, timeout_seconds: float = 60.0) -> None:
        """Give a message to all readers; blocks while the ring is full. `kind` is a number below 128.

        Raises: RingClosed when no reader is left, RingTimeout naming slow readers, RingError above the limit.
        """
        view, slot = self._view, self._sequence % len(self._control)
        control = self._control[slot]
        reads = slice(control + 1, control + 1 + self._num_readers)
        if view[control] and view[reads] != self._all_read:
            self._wait_until_free(reads, timeout_seconds)
        if len(self.live_readers) == 0:
            raise RingClosed("no reader is left")
        view[control] = 0
        overflow = self._fill(slot, body, kind)
        view[reads] = self._cleared
        fence()
        view[control] = 1
        fence()
        self._sequence += 1
        for index, parked_at in enumerate(self._parked[:-1]):
            wake(view, parked_at, self._bells[index])
        if overflow is not None:
            self._send_overflow(overflow)

    def _fill(self, slot: int, body: bytes | bytearray | memoryview, kind: int) -> int | None:
        """Put a message into its slot; returns the memfd that holds its body when the slot cannot."""
        length, at = len(body), self._data[slot]
        if length <= self._room:
            _SLOT.pack_into(self._view, at, length, kind, self._sequence)
            self._view[at + _SLOT.size : at + _SLOT.size + length] = body
            return None
        if length > MAX_MESSAGE_BYTES:
            raise RingError(f"a message of {length} bytes is above the limit of {MAX_MESSAGE_BYTES}")
        fd = os.memfd_create("hlaunch-message", os.MFD_CLOEXEC)
        with open(fd, "wb", closefd=False, buffering=0) as file:
            rest = memoryview(body)
            while rest:
                rest = rest[file.write(rest) or 0 :]
        _SLOT.pack_into(self._view, at, length, kind | _ELSEWHERE, self._sequence)
        return fd

    def _send_overflow(self, fd: int) -> None:
        try:
            for index in self.live_readers:
                try:
                    # One byte per message and at most one message per slot: this cannot block.
                    socket.send_fds(self._sockets[index], [b"+"], [fd])
                except (BrokenPipeError, ConnectionResetError):
                    self._drop(index)
        finally:
            os.close(fd)

    def _wait_until_free(self, reads: slice, timeout_seconds: float) -> None:
        view, all_read = self._view, self._all_read
        deadline = time.monotonic() + timeout_seconds
        while True:
            spoke = self._sleeper.wait(lambda: view[reads] == all_read, deadline)
            if spoke is None:
                fence()
                return
            if not spoke:
                raise RingTimeout([i for i, is_read in enumerate(view[reads]) if not is_read], timeout_seconds)
            for fd in spoke:
                self._drop(self._reader_of[fd])

    def _hear(self, index: int) -> None:
        """Readers never send: whatever can be read is the end."""
        try:
            if self._sockets[index].recv(1, socket.MSG_DONTWAIT) == b"":
                self._drop(index)
        except ConnectionResetError:
            self._drop(index)

    def _drop(self, index: int) -> None:
        """From now on a reader that is gone counts as having read everything."""
        self._sleeper.forget(self._sockets[index].fileno())
        self._cleared[index] = 1
        for control in self._control:
            self._view[control + 1 + index] = 1


class RingReader(_End):
    """A reading end. Not for two threads at once."""

    def __init__(self, end: RingEnd) -> None:
        super().__init__(end)
        self._index = end.index
        self._link = self._sockets[0].fileno()
        self.alarms: Sequence[int] = ()
        """Watched descriptors that made the last read end without a message."""

    def watch(self, fd: int, events: int) -> None:
        """Let `read` return None when `events` come on another descriptor: a process that ended, a signal."""
        self._sleeper.watch(fd, events)

    def forget(self, fd: int) -> None:
        self._sleeper.forget(fd)

    def read(self, timeout_seconds: float | None = None) -> tuple[int, bytes] | None:
        """Take the next message: its kind and body. None at the timeout, or when a watched descriptor spoke.

        Raises: RingClosed when the writer is gone and everything it wrote was read.
        """
        if not self._await(timeout_seconds):
            return None
        length, kind, at = self._open()
        if kind & _ELSEWHERE:
            body = self._receive_overflow(length)
        else:
            body = bytes(self._view[at : at + length])
        self._finish()
        return kind & ~_ELSEWHERE, body

    def read_into(self, target: memoryview, timeout_seconds: float | None = None) -> bool:
        """Take the next message into memory of its exact length. False at the timeout. Raises: as `read`, RingError."""
        if not self._await(timeout_seconds):
            return False
        length, kind, at = self._open()
        if length != len(target) or kind & _ELSEWHERE:
            raise RingError(f"a message of {length} bytes came where {len(target)} were expected")
        target[:] = self._view[at : at + length]
        self._finish()
        return True

    def _await(self, timeout_seconds: float | None) -> bool:
        view = self._view
        control = self._control[self._sequence % len(self._control)]
        read_at = control + 1 + self._index
        self.alarms = ()
        if view[control] and not view[read_at]:
            fence()
            return True
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        spoke = self._sleeper.wait(lambda: view[control] == 1 and view[read_at] == 0, deadline)
        if spoke is None:
            fence()
            return True
        if self._link in spoke:
            # The writer's last message may have become visible between the look and the hang-up.
            fence()
            if view[control] and not view[read_at]:
                return True
            raise RingClosed("the writer is gone")
        self.alarms = spoke
        return False

    def _open(self) -> tuple[int, int, int]:
        at = self._data[self._sequence % len(self._data)]
        length, kind, sequence = _SLOT.unpack_from(self._view, at)
        if sequence != self._sequence:
            raise RingError(f"message {sequence} came where {self._sequence} was expected")
        return length, kind, at + _SLOT.size

    def _finish(self) -> None:
        view = self._view
        fence()
        view[self._control[self._sequence % len(self._control)] + 1 + self._index] = 1
        fence()
        self._sequence += 1
        wake(view, self._parked[-1], self._bells[-1])

    def _receive_overflow(self, length: int) -> bytes:
        data, fds, _, _ = socket.recv_fds(self._sockets[0], 1, 1)
        if not data or not fds:
            raise RingClosed("the writer is gone in the middle of a message")
        try:
            with mmap.mmap(fds[0], length, access=mmap.ACCESS_READ) as body:
                return bytes(body)
        except ValueError as error:
            raise RingError(f"a message of {length} bytes is shorter than it says") from error
        finally:
            os.close(fds[0])
