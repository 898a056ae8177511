"""Time of a step's message from the engine to a rank through the shared-memory ring, and what waiting costs.

    python bench/step_queue.py [--json]

One way: the writer notes the time, encodes the plan of a step of 256 requests and writes it; a reader in another
process decodes it and notes the time (both clocks are the host's monotonic one). `steady` repeats the last plan,
`decode` is what 256 requests at unrelated places make of it: 16 of them, others in each step, get their next block of
16 tokens. `crossing` hands all 256 a block each, `changed` sends rows, counts and samples anew. A step every 30 us
finds the reader awake, so that what is left is the queue's own; later ones add what the kernel takes to wake it. Idle:
processor time of a parked reader.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from engine.comm.ring import RingEnd, RingReader, RingWriter, create_ring
from engine.core.plan import ExecutionPlan
from engine.executor.messages import PlanDecoder, PlanEncoder

ROWS = 256
BLOCK = 16
COUNT = 3000


def plans(kind: str) -> list[ExecutionPlan]:
    made = []
    for step in range(COUNT):
        rows = list(range(step % 2, ROWS + step % 2)) if kind == "changed" else list(range(ROWS))
        takes = {"decode": range(step % BLOCK, ROWS, BLOCK), "crossing": range(ROWS)}.get(kind, range(0))
        blocks = [(row, 0, [step * ROWS + row]) for row in takes]
        made.append(ExecutionPlan(step, rows, [1] * ROWS, [True] * ROWS, new_blocks=blocks))
    return made


def end_json(end: RingEnd) -> str:
    return json.dumps([end.index, end.segment, end.bells, end.sockets])


def read(text: str) -> None:
    """Be the reader: decode each plan, send the time of its arrival back, in bulk at the end."""
    index, segment, bells, sockets = json.loads(text)
    reader = RingReader(RingEnd(index, segment, tuple(bells), tuple(sockets)))
    decoder, times = PlanDecoder(), []
    while True:
        got = reader.read()
        if got is None:
            continue
        if got[0] == 2:
            break
        decoder.decode(got[1])
        times.append(time.monotonic_ns())
    before = time.process_time()
    reader.read(2.0)
    idle = (time.process_time() - before) / 2.0
    print(json.dumps({"times": times, "idle": idle}))


def measure(kind: str, gap_seconds: float) -> dict[str, float]:
    ours, (theirs,) = create_ring(1)
    command = [sys.executable, __file__, "--reader", end_json(theirs)]
    reader = subprocess.Popen(command, pass_fds=theirs.fds, stdout=subprocess.PIPE, text=True)
    theirs.close()
    writer, encoder, sent = RingWriter(ours), PlanEncoder(), []
    time.sleep(1.0)
    size = 0
    for plan in plans(kind):
        until = time.monotonic() + gap_seconds
        if gap_seconds >= 1e-3:
            time.sleep(gap_seconds)
        while time.monotonic() < until:
            pass
        sent.append(time.monotonic_ns())
        body = encoder.encode(plan)
        writer.write(body, 1)
        size = len(body)
    writer.write(b"", 2)
    out = json.loads(reader.communicate(timeout=60)[0])
    writer.close()
    delays = sorted((b - a) / 1e3 for a, b in zip(sent[100:], out["times"][100:], strict=True))
    return {
        "bytes": size,
        "p50_us": round(statistics.median(delays), 1),
        "p99_us": round(delays[len(delays) * 99 // 100], 1),
        "idle_cpu_percent": round(100 * out["idle"], 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--reader", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reader:
        read(arguments.reader)
        return 0
    results = {
        f"{kind}, a step every {gap * 1e6:.0f} us": measure(kind, gap)
        for kind in ("steady", "decode", "crossing", "changed")
        for gap in (30e-6, 200e-6, 2e-3)
    }
    if arguments.json:
        print(json.dumps({"cpus": os.cpu_count(), "load": os.getloadavg()[0], "results": results}, indent=2))
        return 0
    print(f"{'plan of 256 requests':<36} {'bytes':>6} {'p50 us':>8} {'p99 us':>8} {'idle CPU':>9}")
    for name, row in results.items():
        print(f"{name:<36} {row['bytes']:>6} {row['p50_us']:>8} {row['p99_us']:>8} {row['idle_cpu_percent']:>8}%")
    return 0


if __name__ == "__main__":
    sys.exit(main())
