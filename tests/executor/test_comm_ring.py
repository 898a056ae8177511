"""The broadcast ring: nothing lost, nothing torn, nobody waits for the dead."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ring_peer import end_to_json, message

from engine.comm.ring import RingClosed, RingEnd, RingError, RingReader, RingTimeout, RingWriter, create_ring
from engine.comm.segment import Segment

PEER = Path(__file__).parent / "ring_peer.py"
ROOT = PEER.parents[2]


def spawn(end: RingEnd, pause_share: float = 0.0) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, str(PEER), end_to_json(end), str(pause_share)],
        pass_fds=end.fds,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    end.close()
    return process


@pytest.fixture
def pair() -> Iterator[tuple[RingWriter, RingReader]]:
    ours, (theirs,) = create_ring(1, slots=4, slot_bytes=1024)
    writer, reader = RingWriter(ours), RingReader(theirs)
    yield writer, reader
    writer.close()
    reader.close()


def storm(num_messages: int, num_readers: int, num_kills: int, seed: int) -> None:
    """Write to readers that pause, are stopped for a while, or are killed; survivors must have read all."""
    ours, ends = create_ring(num_readers, slots=8, slot_bytes=4096)
    writer = RingWriter(ours)
    peers = [spawn(end, pause_share=20 / num_messages * random.Random(i).random()) for i, end in enumerate(ends)]
    source = random.Random(seed)
    bodies = random.Random(seed + 1)
    killed: set[int] = set()
    events = {source.randrange(num_messages): "kill" for _ in range(num_kills)}
    events |= {source.randrange(num_messages): "stop" for _ in range(10)}
    try:
        for sequence in range(num_messages):
            event = events.get(sequence)
            if event == "kill":
                victim = source.choice([i for i in range(1, num_readers) if i not in killed] or [-1])
                if victim > 0:
                    peers[victim].send_signal(signal.SIGKILL)
                    killed.add(victim)
            elif event == "stop":
                victim = source.choice([i for i in range(num_readers) if i not in killed])
                peers[victim].send_signal(signal.SIGSTOP)
                threading.Timer(source.random() * 0.05, peers[victim].send_signal, (signal.SIGCONT,)).start()
            writer.write(message(sequence, bodies), timeout_seconds=30.0)
        writer.close()
        for index, peer in enumerate(peers):
            out, _ = peer.communicate(timeout=60)
            if index in killed:
                assert peer.returncode == -signal.SIGKILL
            else:
                assert (peer.returncode, out.strip()) == (0, str(num_messages))
        assert 0 not in killed
    finally:
        writer.close()
        for peer in peers:
            peer.kill()
            peer.communicate()


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_is_lost_or_torn_while_readers_pause_and_die(seed: int) -> None:
    storm(50_000, num_readers=3, num_kills=2, seed=seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_messages() -> None:
    storm(1_000_000, num_readers=3, num_kills=2, seed=3)


def test_messages_come_in_order_with_their_kind(pair: tuple[RingWriter, RingReader]) -> None:
    writer, reader = pair
    for round_ in range(20):
        sent = [(index, os.urandom(index * 100)) for index in range(4)]
        for kind, body in sent:
            writer.write(body, kind)
        assert [reader.read(1.0) for _ in sent] == sent, round_
    assert reader.read(0.0) is None


def test_a_message_beyond_a_slot_travels_beside_it(pair: tuple[RingWriter, RingReader]) -> None:
    writer, reader = pair
    large = os.urandom(3 << 20)
    writer.write(b"before")
    writer.write(large, 5)
    writer.write(b"after")
    assert reader.read(1.0) == (0, b"before")
    assert reader.read(1.0) == (5, large)
    assert reader.read(1.0) == (0, b"after")
    with pytest.raises(RingError, match="above the limit"):
        writer.write(memoryview(bytearray((64 << 20) + 1)))


def test_read_into_wants_the_exact_length(pair: tuple[RingWriter, RingReader]) -> None:
    writer, reader = pair
    writer.write(b"12345678")
    target = bytearray(8)
    assert reader.read_into(memoryview(target), 1.0)
    assert target == b"12345678"
    writer.write(b"123")
    with pytest.raises(RingError, match="3 bytes came where 8"):
        reader.read_into(memoryview(target), 1.0)


def test_a_full_ring_names_the_slow_reader() -> None:
    ours, (first, second) = create_ring(2, slots=2, slot_bytes=128)
    writer, reader, lazy = RingWriter(ours), RingReader(first), RingReader(second)
    for _ in range(2):
        writer.write(b"x")
        assert reader.read(1.0) is not None
    with pytest.raises(RingTimeout) as caught:
        writer.write(b"x", timeout_seconds=0.05)
    assert caught.value.readers == (1,)
    lazy.close()
    writer.write(b"y", timeout_seconds=1.0)
    assert writer.live_readers == (0,)
    assert reader.read(1.0) == (0, b"y")
    reader.close()
    assert writer.look() == ()
    with pytest.raises(RingClosed):
        writer.write(b"z")
    writer.close()


def test_a_reader_of_a_dead_writer_reads_what_was_written(pair: tuple[RingWriter, RingReader]) -> None:
    writer, reader = pair
    writer.write(b"last words")
    writer.close()
    assert reader.read(1.0) == (0, b"last words")
    with pytest.raises(RingClosed):
        reader.read(1.0)


def test_another_descriptor_ends_the_wait(pair: tuple[RingWriter, RingReader]) -> None:
    import select

    _, reader = pair
    ours, theirs = os.pipe()
    reader.watch(ours, select.POLLIN)
    os.write(theirs, b"!")
    assert reader.read(5.0) is None
    assert list(reader.alarms) == [ours]
    reader.forget(ours)
    os.close(ours)
    os.close(theirs)


def test_waiting_costs_no_processor_time(pair: tuple[RingWriter, RingReader]) -> None:
    _, reader = pair
    before, began = time.thread_time(), time.monotonic()
    assert reader.read(1.0) is None
    assert time.thread_time() - before < 0.01 * (time.monotonic() - began)


def test_only_rings_are_taken_for_rings() -> None:
    ours, (theirs,) = create_ring(1, slots=2, slot_bytes=128)
    segment = Segment(os.dup(ours.segment))
    segment.view[0] = 0
    with pytest.raises(RingError, match="not a ring"):
        RingReader(theirs)
    segment.close()
    ours.close()
    for sizes in ((0, 8, 128), (63, 8, 128), (1, 1, 128), (1, 8, 100)):
        with pytest.raises(RingError):
            create_ring(sizes[0], slots=sizes[1], slot_bytes=sizes[2])


def test_nothing_is_left_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        ours, ends = create_ring(3, slots=2, slot_bytes=128)
        writer, readers = RingWriter(ours), [RingReader(end) for end in ends]
        writer.write(b"x" * 1000)
        assert all(reader.read(1.0) == (0, b"x" * 1000) for reader in readers)
        for end in (writer, *readers):
            end.close()
    assert len(os.listdir("/proc/self/fd")) == before
