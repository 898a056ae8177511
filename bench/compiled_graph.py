"""Step times of the queue path and of the Ray Compiled Graph, side by side: `python bench/compiled_graph.py [--json]`.

Two Ray nodes are started on two loopback addresses of this machine, tiny-oss is split into two stages, one on each, and
both executors run the same requests in turns, in one run of this program; their tokens must be the same. A step is one
plan through all stages; in a full pipeline two are in flight. Needs the packages of `make test`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "ray")]

from ray_engine import MODEL, on_ray  # noqa: E402
from ray_nodes import RayPair, ray_pair  # noqa: E402

from engine.core.request import EngineRequest  # noqa: E402
from engine.core.sampling_params import SamplingParams  # noqa: E402
from engine.engine_core import EngineCore  # noqa: E402
from engine.placement import ParallelSizes  # noqa: E402

EXECUTORS = {"ray": "queue path", "ray-cgraph": "compiled graph"}
PROMPT_TOKENS = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64, help="per request")
    parser.add_argument("--rounds", type=int, default=3, help="of both executors")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with ray_pair() as pair:
        os.environ.update(pair.variables)
        os.environ.pop("RAY_ADDRESS", None)
        rows = [measure(pair, batch, arguments.tokens, arguments.rounds) for batch in (1, 4)]
    if arguments.json:
        print(json.dumps({"cores": os.cpu_count(), "stages": 2, "rows": rows}, indent=2))
        return 0
    print(f"tiny-oss, two stages on two Ray nodes of one machine, {os.cpu_count()} cores; milliseconds per decode step")
    print(f"{'requests':>8}  {'executor':15} {'median':>7} {'p90':>7} {'start s':>8}  tokens")
    for row in rows:
        for name, found in row["executors"].items():
            print(
                f"{row['requests']:>8}  {EXECUTORS[name]:15} {found['median_ms']:7.2f} {found['p90_ms']:7.2f} "
                f"{found['start_seconds']:8.1f}  {'the same' if row['has_same_tokens'] else 'DIFFERENT'}"
            )
    return 0 if all(row["has_same_tokens"] for row in rows) else 1


def measure(pair: RayPair, batch: int, num_tokens: int, rounds: int) -> dict[str, object]:
    """Run both executors in turns; one driver can hold one Ray connection, so they never run at once."""
    steps: dict[str, list[float]] = {name: [] for name in EXECUTORS}
    starts: dict[str, list[float]] = {name: [] for name in EXECUTORS}
    tokens: dict[str, list[dict[str, list[int]]]] = {name: [] for name in EXECUTORS}
    for _ in range(rounds):
        for name in EXECUTORS:
            config = on_ray(pair, ParallelSizes(pipeline=2), executor=name)
            began = time.perf_counter()
            core = EngineCore.start(replace(config, step_timeout_seconds=60.0))
            starts[name].append(time.perf_counter() - began)
            try:
                run(core, batch, 8)
                said, seconds = run(core, batch, num_tokens)
            finally:
                core.stop()
            tokens[name].append(said)
            steps[name] += seconds
    everything = [said for name in EXECUTORS for said in tokens[name]]
    return {
        "requests": batch,
        "has_same_tokens": all(said == everything[0] for said in everything),
        "executors": {
            name: {
                "median_ms": 1e3 * statistics.median(steps[name]),
                "p90_ms": 1e3 * statistics.quantiles(steps[name], n=10)[8],
                "start_seconds": statistics.median(starts[name]),
                "steps": len(steps[name]),
            }
            for name in EXECUTORS
        },
    }


def run(core: EngineCore, batch: int, num_tokens: int) -> tuple[dict[str, list[int]], list[float]]:
    """Decode `batch` requests together; returns their tokens and the seconds of each step after their prompts."""
    greedy = SamplingParams(temperature=0.0, ignore_eos=True)
    tokens: dict[str, list[int]] = {}
    for index in range(batch):
        prompt = [(17 * index + 31 * place) % MODEL.vocab_size for place in range(PROMPT_TOKENS)]
        tokens[f"r{index}"] = []
        core.add(EngineRequest(f"r{index}", prompt, greedy, max_tokens=num_tokens, seed=index))
    seconds = []
    while core.has_work:
        began = time.perf_counter()
        outputs = core.step()
        took = time.perf_counter() - began
        for output in outputs:
            tokens[output.request_id] += output.new_token_ids
        if outputs and all(len(said) > 1 for said in tokens.values()):
            seconds.append(took)
    return tokens, seconds


if __name__ == "__main__":
    sys.exit(main())
