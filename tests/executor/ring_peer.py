"""One end of a ring in a process of its own: `ring_peer.py read|write END SEED …`.

A reader checks every message, pauses at random, and says at the end how many it read. A writer writes until it is
killed, and keeps in a page that it shares with its parent how many messages it has written.
"""

from __future__ import annotations

import json
import mmap
import random
import sys
import time
import zlib

from engine.comm.ring import RingClosed, RingEnd, RingReader, RingWriter


def message(sequence: int, source: random.Random) -> bytes:
    """A body that says which message it is and whether it is whole."""
    size = 40_000 if sequence % 997 == 0 else source.randrange(200)
    body = sequence.to_bytes(8, "little") + bytes([sequence & 255]) * size
    return zlib.crc32(body).to_bytes(4, "little") + body


def check(body: bytes, sequence: int) -> None:
    if int.from_bytes(body[4:12], "little") != sequence:
        raise AssertionError(f"message {int.from_bytes(body[4:12], 'little')} in place of {sequence}")
    if zlib.crc32(memoryview(body)[4:]) != int.from_bytes(body[:4], "little"):
        raise AssertionError(f"message {sequence} is torn")


def end_to_json(end: RingEnd) -> str:
    return json.dumps([end.index, end.segment, end.bells, end.sockets])


def end_from_json(text: str) -> RingEnd:
    index, segment, bells, sockets = json.loads(text)
    return RingEnd(index, segment, tuple(bells), tuple(sockets))


def read(end: RingEnd, source: random.Random, pause_share: float) -> int:
    """Read until the writer is gone; how many messages came."""
    reader = RingReader(end)
    count = 0
    try:
        while True:
            got = reader.read(60.0)
            if got is None:
                raise AssertionError("no message for 60 s")
            check(got[1], count)
            count += 1
            if source.random() < pause_share:
                time.sleep(source.random() * 2e-3)
    except RingClosed:
        return count


def write(end: RingEnd, source: random.Random, progress_fd: int) -> None:
    """Write for ever; the parent kills this process."""
    writer = RingWriter(end)
    # One store of eight bytes: no kill leaves half of it.
    progress = memoryview(mmap.mmap(progress_fd, mmap.PAGESIZE)).cast("Q")
    while True:
        writer.write(message(progress[0], source), timeout_seconds=60.0)
        progress[0] += 1


def main() -> int:
    what, end, seed, *rest = sys.argv[1:]
    source = random.Random(int(seed))
    if what == "write":
        write(end_from_json(end), source, int(rest[0]))
    print(read(end_from_json(end), source, float(rest[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
