"""Time of a float32 sum among CPU ranks by size: shared memory against Gloo over loopback, in one run.

    python bench/cpu_all_reduce.py [--ranks 2] [--json]

Each rank is a process with one thread; the time is rank 0's, per sum, all ranks calling at once. Both ways give the
same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch

from engine.comm.ends import GroupEnd, Rendezvous, create_group, create_rendezvous
from engine.comm.gloo import GlooGroup, open_gloo, open_store
from engine.comm.group import Group, SharedGroup

SIZES = (2 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)


def be_a_rank(text: str) -> None:
    setup = json.loads(text)
    torch.set_num_threads(1)
    rank, size = setup["rank"], setup["size"]
    group: Group
    if setup["way"] == "gloo":
        place = Rendezvous(*setup["place"])
        group = GlooGroup(open_gloo(open_store(place), "bench", rank, size, place.host), rank, size)
    else:
        group = SharedGroup(GroupEnd(rank, setup["segment"], tuple(setup["bells"])))
    results = {}
    with torch.inference_mode():
        for num_bytes in SIZES:
            x = torch.full((num_bytes // 4,), float(rank))
            count = 2000 if num_bytes <= 64 << 10 else 300
            times = []
            for step in range(count + 50):
                began = time.perf_counter()
                total = group.all_reduce(x.clone())
                if step >= 50:
                    times.append((time.perf_counter() - began) * 1e6)
            assert float(total[-1]) == size * (size - 1) / 2
            times.sort()
            results[num_bytes] = (statistics.median(times), times[len(times) * 9 // 10])
    if rank == 0:
        print(json.dumps(results))


def measure(way: str, size: int) -> dict[str, tuple[float, float]]:
    ends: list[GroupEnd | Rendezvous] = []
    ends += create_group(size) if way == "shared memory" else create_rendezvous("127.0.0.1", size)
    peers = []
    for rank, end in enumerate(ends):
        setup: dict[str, object] = {"way": way, "rank": rank, "size": size}
        if isinstance(end, GroupEnd):
            setup |= {"segment": end.segment, "bells": end.bells}
        else:
            setup["place"] = (end.host, end.port, end.listener)
        command = [sys.executable, __file__, "--rank", json.dumps(setup)]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        peers.append(subprocess.Popen(command, pass_fds=end.fds, stdout=subprocess.PIPE, text=True, env=environ))
        end.close()
    outputs = [peer.communicate(timeout=120)[0] for peer in peers]
    found: dict[str, tuple[float, float]] = json.loads(outputs[0])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        be_a_rank(arguments.rank)
        return 0
    shared, gloo = (measure(way, arguments.ranks) for way in ("shared memory", "gloo"))
    if arguments.json:
        print(json.dumps({"ranks": arguments.ranks, "cpus": os.cpu_count(), "shared_memory": shared, "gloo": gloo}))
        return 0
    print(f"{'bytes':>8} {'shared memory, median / p90 us':>32} {'Gloo, median / p90 us':>26} {'ratio':>7}")
    for num_bytes in map(str, SIZES):
        a, b = shared[num_bytes], gloo[num_bytes]
        print(f"{num_bytes:>8} {a[0]:>22.1f} / {a[1]:>7.1f} {b[0]:>16.1f} / {b[1]:>7.1f} {b[0] / a[0]:>6.0f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
