"""Time the whole engine on one GPU, in process: decode rates, prefill, and the phases of the start.

    python bench/gpu_engine.py [MODEL] [--dummy CONFIG_FOLDER] [--requests 1 8 32 128 256] [--prefill 16x8192]
        [--runs 3] [--deadline 500] [--json FILE]

MODEL is a checkpoint folder; with --dummy, weights are made up on the GPU from CONFIG_FOLDER's config.json. Prompts are
random token ids, 1,024 each; greedy, no end of sequence, no prefix reuse. Decode rate of n requests:
n · 256 / (time for 257 tokens − time for 1 token), same prompts, median of --runs. Prefill: tokens / time for 1 token.
"floor" counts the fewest bytes of a step over the specified bandwidth (H100 3.35, H200 4.8 TB/s).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.core.request import EngineRequest
from engine.core.sampling_params import SamplingParams
from engine.engine_core import EngineCore

PROMPT, OUTPUT = 1024, 256
STARTED = psutil.Process().create_time()


class Bench:
    """One engine, and requests of random ids run through it."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._random = random.Random(0)
        self._count = 0

    def prompts(self, count: int, length: int) -> list[list[int]]:
        vocab = self.core.model.vocab_size
        return [[self._random.randrange(vocab) for _ in range(length)] for _ in range(count)]

    def add(self, prompts: list[list[int]], num_tokens: int) -> None:
        """Queue prompts for exactly `num_tokens` tokens each."""
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        for prompt in prompts:
            self._count += 1
            refusal = self.core.add(
                EngineRequest(f"bench-{self._count}", prompt, params, max_tokens=num_tokens, stop_token_ids=(), seed=0)
            )
            if refusal is not None:
                raise SystemExit(f"refused: {refusal.error}")

    def seconds(self, prompts: list[list[int]], num_tokens: int) -> float:
        """Run all prompts at once for exactly `num_tokens` tokens each."""
        begin = time.perf_counter()
        self.add(prompts, num_tokens)
        made = 0
        while self.core.has_work:
            for output in self.core.step():
                made += len(output.new_token_ids)
                if output.error:
                    raise SystemExit(output.error)
        if made != num_tokens * len(prompts):
            raise SystemExit(f"{made} tokens instead of {num_tokens * len(prompts)}")
        return time.perf_counter() - begin

    def distinct_experts(self, count: int) -> float:
        """Count the experts that a decode step of `count` requests touches, mean over the layers."""
        self.add(self.prompts(count, PROMPT), 60 + 2 * count)
        started: set[str] = set()
        while len(started) < count:
            started |= {output.request_id for output in self.core.step()}
        for _ in range(20):
            self.core.step()
        executor: Any = self.core.executor
        mean = statistics.mean(executor.count_experts(count))
        while self.core.has_work:
            self.core.step()
        return mean

    def profile(self, count: int, num_steps: int = 10) -> list[dict[str, object]]:
        """Time every kernel of a decode step of `count` requests: name, launches and microseconds per step."""
        from torch.profiler import ProfilerActivity, profile

        self.add(self.prompts(count, PROMPT), 60 + 2 * count)
        started: set[str] = set()
        while len(started) < count:
            started |= {output.request_id for output in self.core.step()}
        for _ in range(5):
            self.core.step()
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            for _ in range(num_steps):
                self.core.step()
        while self.core.has_work:
            self.core.step()
        kernels = [
            {
                "kernel": event.key,
                "launches": event.count / num_steps,
                "microseconds": round(event.self_device_time_total / num_steps, 2),
            }
            for event in record.key_averages()
        ]
        return sorted(kernels, key=lambda kernel: -float(str(kernel["microseconds"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument(
        "--dummy", default="", help="folder of a config.json whose shape is filled with made-up weights"
    )
    parser.add_argument("--requests", type=int, nargs="*", default=[1, 8, 32, 128, 256])
    parser.add_argument("--prefill", nargs="*", default=["16x8192"], help="requests x prompt tokens")
    parser.add_argument("--profile", type=int, nargs="*", default=[], help="requests of steps to time by kernel")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--max-tokens-per-step", type=int, default=16384)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--deadline", type=float, default=540.0, help="seconds after which no further point begins")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"synthetic_weights": bool(options.dummy), "phases": {}, "points": []}
    begun: dict[str, float] = {}

    def phase(name: str, state: str, fraction: float | None, detail: str) -> None:
        now = time.time() - STARTED
        if state == "begin":
            begun[name] = now
        elif state == "end":
            report["phases"][name] = round(now - begun.get(name, now), 3)
            print(f"{name:8} {now - begun.get(name, now):7.2f} s  {detail}", flush=True)

    config = EngineConfig(
        model=options.model or options.dummy,
        device="cuda:0",
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
    import torch

    free, total = torch.cuda.mem_get_info()
    report["memory"] = {
        "total": total,
        "taken": total - free,
        "allocated": torch.cuda.memory_allocated(),
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.memory_reserved(),
    }
    report["versions"] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(),
    }
    print(f"ready {report['ready_seconds']:.2f} s after the process began; {core.facts.device_name}", flush=True)
    print({name: f"{size / 2**30:.2f} GiB" for name, size in report["memory"].items()}, flush=True)
    bench = Bench(core)

    def save() -> None:
        if options.json:
            options.json.write_text(json.dumps(report, indent=1))

    def is_late() -> bool:
        return time.time() - STARTED > options.deadline

    for count in options.requests:
        if is_late():
            break
        prompts = bench.prompts(count, PROMPT)
        bench.seconds(prompts, 2)  # captures what is not captured
        once, rates = [], []
        for _ in range(options.runs):
            once.append(bench.seconds(prompts, 1))
            rates.append(count * OUTPUT / (bench.seconds(prompts, OUTPUT + 1) - once[-1]))
        rate = statistics.median(rates)
        point = {
            "requests": count,
            "decode_tokens_per_second": round(rate, 1),
            "step_milliseconds": round(1e3 * count / rate, 4),
            "first_token_seconds": round(statistics.median(once), 4),
            "all": [round(rate, 1) for rate in rates],
            "distinct_experts_per_layer": round(bench.distinct_experts(count), 2),
        }
        report["points"].append(point)
        print(point, flush=True)
        save()
    for text in options.prefill:
        if is_late():
            break
        count, length = (int(part) for part in text.split("x"))
        prompts = bench.prompts(count, length)
        bench.seconds(prompts[:1], 1)
        times = [bench.seconds(prompts, 1) for _ in range(options.runs)]
        rate = count * length / statistics.median(times)
        point = {"prefill": text, "tokens_per_second": round(rate, 1), "seconds": [round(t, 4) for t in times]}
        report["points"].append(point)
        print(point, flush=True)
    for count in options.profile:
        kernels = bench.profile(count)
        report.setdefault("profiles", {})[count] = kernels
        total = sum(float(str(kernel["microseconds"])) for kernel in kernels)
        print(f"{count} rows, {total:.0f} us of kernels a step:", flush=True)
        for kernel in kernels[:18]:
            print(f"  {kernel['microseconds']:9} us {kernel['launches']:6.1f} x  {str(kernel['kernel'])[:90]}")
    report["peak_after"] = torch.cuda.max_memory_allocated()
    save()
    core.stop()


if __name__ == "__main__":
    main()
