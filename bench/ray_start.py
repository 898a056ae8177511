"""What Ray takes of a start, and that one node does without it: `python bench/ray_start.py [--runs N] [--json]`.

Starts the engine core of tiny-oss in three ways and times it to its first plan: one rank in the process, two ranks on
one node, two ranks on two Ray nodes of this machine (two loopback addresses). For the last it prints Ray's own share by
step; for all of them whether Ray is in memory. The nodes' own `ray start`, once per cluster, is timed too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "ray")]

from ray_nodes import ray_pair  # noqa: E402

WAYS = {"one rank": "alone", "two ranks, one node": "multiproc", "two ranks, two Ray nodes": "ray"}
# In a process of its own, as the server has it: imports are a part of every start.
CORE = """\
import json, os, sys, time
began = time.perf_counter()
sys.path[:0] = sys.argv[3:]
from dataclasses import replace
from types import SimpleNamespace
from ray_engine import ALONE, on_ray
from engine.engine_core import EngineCore
from engine.placement import ParallelSizes
way, said = sys.argv[1], []
config = replace(ALONE, tensor_parallel_size=2) if way == "multiproc" else ALONE
if way == "ray":
    config = on_ray(SimpleNamespace(address=sys.argv[2]), ParallelSizes(tensor=2))
core = EngineCore.start(config, lambda phase, state, fraction, detail: said.append(detail))
seconds = time.perf_counter() - began
has_ray = "/ray/" in open("/proc/self/maps").read()
core.stop()
print(json.dumps({"seconds": seconds, "has_ray": has_ray, "ray": [line for line in said if line.startswith("Ray: ")]}))
os._exit(0)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    began = time.perf_counter()
    with ray_pair() as pair:
        joined = time.perf_counter() - began
        rows = {}
        for name, way in WAYS.items():
            runs = [
                start(way, pair.address, pair.variables if way == "ray" else {}) for _ in range(arguments.runs + 1)
            ][1:]
            rows[name] = {
                "seconds": statistics.median(run["seconds"] for run in runs),
                "has_ray": any(run["has_ray"] for run in runs),
                "ray": next(iter(runs[-1]["ray"]), ""),
            }
    figures = {"cores": os.cpu_count(), "runs": arguments.runs, "ray_start_of_both_nodes_seconds": joined, "ways": rows}
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return 0
    print(f"engine core of tiny-oss, process start to first plan, {os.cpu_count()} cores, median of {arguments.runs}")
    print(f"{'way':26} {'seconds':>7}  {'Ray in memory':13}  of which")
    for name, row in rows.items():
        print(f"{name:26} {row['seconds']:7.2f}  {'yes' if row['has_ray'] else 'no':13}  {row['ray']}")
    print(f"`ray start` on both nodes, one after the other: {joined:.1f} s")
    return 0


def start(way: str, address: str, environ: dict[str, str]) -> dict[str, object]:
    argv = [sys.executable, "-c", CORE, way, address, str(ROOT), str(ROOT / "tests" / "ray")]
    chosen = {**os.environ, **environ, "PYTHONPATH": str(ROOT), "RAY_BACKEND_LOG_LEVEL": "fatal"}
    chosen.pop("RAY_ADDRESS", None)
    done = subprocess.run(argv, env=chosen, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=180)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
