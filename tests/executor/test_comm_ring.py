"""The broadcast ring: nothing lost, nothing torn, nobody waits for the dead."""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from executor_support import wait_until
from ring_peer import end_to_json, message

from engine.comm.ring import RingClosed, RingEnd, RingError, RingReader, RingTimeout, RingWriter, create_ring
from engine.comm.segment import Segment

PEER = Path(__file__).parent / "ring_peer.py"
ROOT = PEER.parents[2]


PAUSE_SHARE = 1 / 500
"""Of its messages, behind which a reader sleeps for up to two milliseconds."""


def spawn(what: str, end: RingEnd, seed: int, *rest: float, fds: tuple[int, ...] = ()) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, str(PEER), what, end_to_json(end), str(seed), *map(str, rest)],
        pass_fds=(*end.fds, *fds),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    end.close()
    return process


def spawn_readers(ends: Sequence[RingEnd], seed: int) -> list[subprocess.Popen[str]]:
    return [spawn("read", end, seed + 100 + i, PAUSE_SHARE) for i, end in enumerate(ends)]


def stop_for_a_moment(victim: subprocess.Popen[str], source: random.Random) -> None:
    victim.send_signal(signal.SIGSTOP)
    threading.Timer(source.random() * 0.05, victim.send_signal, (signal.SIGCONT,)).start()


@pytest.fixture
def pair() -> Iterator[tuple[RingWriter, RingReader]]:
    ours, (theirs,) = create_ring(1, slots=4, slot_bytes=1024)
    writer, reader = RingWriter(ours), RingReader(theirs)
    yield writer, reader
    writer.close()
    reader.close()


def reader_storm(num_messages: int, num_stops: int, seed: int, num_readers: int = 4) -> None:
    """Write to readers that pause, are stopped for a while, or are killed; survivors must have read all.

    Every reader but the first is killed, each at a message of its own.
    """
    print("seed", seed)
    source, bodies = random.Random(seed), random.Random(seed + 1)
    ours, ends = create_ring(num_readers, slots=8, slot_bytes=4096)
    writer = RingWriter(ours)
    peers = spawn_readers(ends, seed)
    kills = {source.randrange(num_messages): peer for peer in peers[1:]}
    stops = {source.randrange(num_messages) for _ in range(num_stops)}
    living = list(peers)
    try:
        for sequence in range(num_messages):
            if sequence in kills:
                kills[sequence].send_signal(signal.SIGKILL)
                living.remove(kills[sequence])
            if sequence in stops:
                stop_for_a_moment(source.choice(living), source)
            writer.write(message(sequence, bodies), timeout_seconds=30.0)
        writer.close()
        for peer in peers:
            out, _ = peer.communicate(timeout=60)
            expected = (0, str(num_messages)) if peer in living else (-signal.SIGKILL, "")
            assert (peer.returncode, out.strip()) == expected
    finally:
        writer.close()
        for peer in peers:
            peer.kill()
            peer.communicate()


def writer_storm(seconds: float, num_stops: int, seed: int, num_readers: int = 3) -> int:
    """Kill a writer wherever it is: all readers have read the same, all that it had written; returns how much."""
    print("seed", seed)
    source = random.Random(seed)
    ours, ends = create_ring(num_readers, slots=8, slot_bytes=4096)
    shared = os.memfd_create("progress")
    os.ftruncate(shared, mmap.PAGESIZE)
    with mmap.mmap(shared, mmap.PAGESIZE) as page, memoryview(page).cast("Q") as progress:
        peers = spawn_readers(ends, seed)
        writer = spawn("write", ours, seed + 1, shared, fds=(shared,))
        os.close(shared)
        try:
            assert wait_until(lambda: progress[0] > 0, 30.0)
            for _ in range(num_stops):
                time.sleep(source.random() * 0.02)
                stop_for_a_moment(source.choice([writer, *peers]), source)
            time.sleep(source.random() * seconds)
            writer.kill()
            writer.wait()
            found = []
            for peer in peers:
                out, _ = peer.communicate(timeout=60)
                assert peer.returncode == 0
                found.append(int(out))
            # It may have died behind a message, before it could count it.
            assert set(found) <= {progress[0], progress[0] + 1}
            assert len(set(found)) == 1
            return found[0]
        finally:
            for process in (writer, *peers):
                process.kill()
                process.wait()
                assert process.stdout is not None
                process.stdout.close()


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_is_lost_or_torn_while_readers_pause_and_die(seed: int) -> None:
    reader_storm(20_000, num_stops=10, seed=seed)


@pytest.mark.parametrize("seed", [3, 4])
def test_all_read_the_same_of_a_writer_that_is_killed(seed: int) -> None:
    assert writer_storm(0.1, num_stops=4, seed=seed) > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_messages() -> None:
    """With 120 readers killed, about 2,000 pauses of each reader, 1,600 stops, and 60 writers killed."""
    for seed in range(40):
        reader_storm(25_000, num_stops=40, seed=1000 * seed)
    assert sum(writer_storm(0.5, num_stops=20, seed=1000 * seed) for seed in range(60)) > 100_000


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
