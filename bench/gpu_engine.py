"""Time the whole engine in process on one GPU, from a folder that needs no weights: phases, memory, rates, kernels.

    python bench/gpu_engine.py [MODEL] [--dummy CONFIG_FOLDER] [--requests 1 8 32 128 256] [--prefill 16x8192]
        [--runs 3] [--profile 1 8 32] [--deadline 500] [--json FILE]

MODEL is a checkpoint folder; with --dummy, weights are made up on the device from CONFIG_FOLDER's config.json. Points
are those of `engine.benchmark`: 1,024 in / 256 out, one warm-up, median of --runs. `hlaunch bench --offline` measures
them through the launcher, with the floor beside; this shows what the device holds and where its time goes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.benchmark.protocol import Bench, Point
from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.engine_core import EngineCore
from engine.profiling import profile_steps

PROMPT, OUTPUT = 1024, 256
PROFILED_STEPS = 10
STARTED = psutil.Process().create_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument(
        "--dummy", default="", help="folder of a config.json whose shape is filled with made-up weights"
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--requests", type=int, nargs="*", default=[1, 8, 32, 128, 256])
    parser.add_argument("--prefill", nargs="*", default=["16x8192"], help="requests x prompt tokens")
    parser.add_argument("--profile", type=int, nargs="*", default=[], help="requests of steps to time by kernel")
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--output", type=int, default=OUTPUT)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--max-tokens-per-step", type=int, default=16384)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--deadline", type=float, default=540.0, help="seconds after which no further point begins")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"synthetic_weights": bool(options.dummy), "phases": {}, "points": [], "profiles": {}}
    core = start(options, report)
    bench = Bench(core, seed=0)
    points = [Point(count, options.prompt, options.output + 1) for count in options.requests]
    points += [Point(*map(int, text.split("x"))) for text in options.prefill]
    for point in points:
        if time.time() - STARTED > options.deadline:
            break
        report["points"].append(measure(bench, point, options.runs))
        save(report, options.json)
    for count in options.profile:
        bench.begin_decode(Point(count, options.prompt, 60 + 2 * count), "profile")
        profile = profile_steps(core, PROFILED_STEPS)
        bench.finish()
        report["profiles"][count] = profile.as_dict()
        print(f"{count} rows, {1e3 * profile.step_seconds:.3f} ms a step:", flush=True)
        for op in profile.ops[:18]:
            print(f"  {1e6 * op.seconds:9.1f} us {op.calls:6.1f} x  {op.name[:90]}")
    save(report, options.json)
    core.stop()


def start(options: argparse.Namespace, report: dict[str, Any]) -> EngineCore:
    """Start the engine, noting the seconds of each phase and, on a GPU, what the device holds afterwards."""
    begun: dict[str, float] = {}

    def phase(name: str, state: str, fraction: float | None, detail: str) -> None:
        now = time.time() - STARTED
        if state == "begin":
            begun[name] = now
        elif state == "end":
            report["phases"][name] = round(now - begun.get(name, now), 3)
            print(f"{name:8} {report['phases'][name]:7.2f} s  {detail}", flush=True)

    config = EngineConfig(
        model=options.model or options.dummy,
        device=options.device,
        load_format="dummy" if options.dummy else "auto",
        max_model_len=options.max_model_len,
        scheduler=SchedulerConfig(
            max_num_seqs=max([16, *options.requests]),
            max_num_batched_tokens=options.max_tokens_per_step,
            enable_prefix_caching=False,
            max_queue=1 << 20,
        ),
        cache=CacheConfig(block_size=options.block_size),
    )
    core = EngineCore.start(config, phase)
    report["ready_seconds"] = round(time.time() - STARTED, 3)
    report["facts"] = asdict(core.facts)
    print(f"ready {report['ready_seconds']:.2f} s after the process began; {core.facts.device_name}", flush=True)
    if options.device.startswith("cuda"):
        import torch

        free, total = torch.cuda.mem_get_info()
        report["memory"] = {
            "total": total,
            "taken": total - free,
            "allocated": torch.cuda.memory_allocated(),
            "peak": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
        }
        print({name: f"{size / 2**30:.2f} GiB" for name, size in report["memory"].items()}, flush=True)
    return core


def measure(bench: Bench, point: Point, runs: int) -> dict[str, Any]:
    """Measure a point: medians of its runs, every run, and the experts that a step of it touches."""
    bench.run(point, -1)  # what a first time compiles or captures is not counted
    found = [bench.run(point, run) for run in range(runs)]
    is_prefill = point.output_tokens == 1
    key = "prefill_tokens_per_second" if is_prefill else "decode_tokens_per_second"
    rates = [figures[key] for figures in found if figures[key] is not None]
    summary: dict[str, Any] = {
        "requests": point.num_requests,
        "input_tokens": point.input_tokens,
        key: round(statistics.median(rates), 1) if rates else None,
        "first_token_seconds": round(statistics.median(figures["first_seconds"] for figures in found), 4),
        "all": [round(rate, 1) for rate in rates],
    }
    if not is_prefill:
        summary["distinct_experts_per_layer"] = bench.distinct_experts(point.num_requests, point.input_tokens)
    print(summary, flush=True)
    return summary


def save(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
