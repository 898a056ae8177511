"""The topologies of `bench/topologies.py` through Ray: two Ray nodes in two network namespaces, held against one rank.

    python bench/ray_topologies.py [--ranks 8] [--only NAME ...] [--json FILE] [--loopback]

Each node's Ray is started as the node supervisor starts it, with a token and as many CPUs as it has ranks; each
topology's engines are Ray drivers on the head's node, their ranks on the other node run in Ray's actors. Greedy tokens
in float32 must equal those of one rank alone. Needs root for the namespaces, or `--loopback`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests" / "ray")]

import topologies  # noqa: E402
from ray_nodes import ADDRESSES, RayPair, ray_pair  # noqa: E402

NUM_TOKENS = 24


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8, help="ranks of each node")
    parser.add_argument("--only", nargs="*", help="parts of the names of those to run")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--loopback", action="store_true", help="both nodes on this host, without namespaces")
    parser.add_argument("--seconds", type=float, default=600.0, help="deadline of one topology")
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        addresses, prefixes = dict(ADDRESSES), {}
        if not options.loopback:
            nodes = stack.enter_context(topologies.namespaces())
            addresses = {"one": topologies.HEAD_IP, "two": topologies.WORKER_IP}
            prefixes = {"one": nodes.head, "two": nodes.worker}
        pair = stack.enter_context(ray_pair(cpus=options.ranks, addresses=addresses, prefixes=prefixes))
        work = Path(scratch)
        folder = work / "model"
        topologies.make_model(folder)
        chosen = [
            case
            for case in topologies.cases(options.ranks)
            if not options.only or any(part in case.name for part in options.only)
        ]
        num_requests = 2 * max(case.sizes.data for case in chosen)
        alone = asyncio.run(topologies.serve(topologies.base_config(folder), num_requests, NUM_TOKENS))
        print(topologies.head_line("topology, through Ray"))
        for case in chosen:
            outcome = run_case(case, folder, pair, work / "head.json", num_requests, options.seconds)
            rows.append(topologies.tell(case, outcome, alone))
    return topologies.conclude(rows, options.json)


def run_case(
    case: topologies.Case, folder: Path, pair: RayPair, file: Path, num_requests: int, seconds: float
) -> topologies.Outcome:
    """Run one topology on the Ray nodes. Raises: RuntimeError with what went wrong."""
    head, _ = topologies.configs(folder, case.sizes, pair.addresses["one"])
    nodes = replace(
        head.nodes,
        head_port=0,
        addresses=(pair.addresses["one"], pair.addresses["two"]),
        ray_address=pair.address,
        placement_timeout_seconds=120.0,
    )
    file.write_text(replace(head, executor="ray", nodes=nodes).to_json())
    environ = {**os.environ, **pair.variables, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environ.pop("RAY_ADDRESS", None)
    drive = [sys.executable, str(ROOT / "bench/topologies.py"), "--drive", str(file), str(num_requests)]
    done = subprocess.run(
        [*pair.prefixes.get("one", ()), *drive, str(NUM_TOKENS)],
        cwd=ROOT, env=environ, capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{case.name}: {done.stderr[-3000:]}")
    return topologies.Outcome(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    sys.exit(main())
