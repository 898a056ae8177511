"""A reader in a process of its own: checks every message, pauses at random, and says at the end how many it read."""

from __future__ import annotations

import json
import random
import sys
import time
import zlib

from engine.comm.ring import RingClosed, RingEnd, RingReader


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


def main() -> int:
    reader = RingReader(end_from_json(sys.argv[1]))
    pause_share = float(sys.argv[2])
    source = random.Random(reader.__hash__())
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
        print(count)
        return 0


if __name__ == "__main__":
    sys.exit(main())
