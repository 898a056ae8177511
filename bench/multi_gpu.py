"""Show a model split over the GPUs of one host: correctness, sums, rates beside one GPU's, in one run.

    python bench/multi_gpu.py OUT_FOLDER [--gpus 4] [--steps checks tokens sums tp1 tp2 …] [--runs 3]

Each step is a process with a deadline, and its result is on disk before the next begins. Weights are made up on the
GPUs, of gpt-oss-20b's true shape. Rates: 1,024 in / 256 out, greedy, prompts without a common prefix, as everywhere in
`engine.benchmark`; data-parallel ones are whole runs of 64 requests an engine through the load balancer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

HERE = Path(__file__).resolve().parent
SHAPE = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "head_dim": 64,
    "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
    "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201_088,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "sliding_window": 128, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072, "initial_context_length": 4096, "rope_theta": 150_000, "swiglu_limit": 7.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                     "original_max_position_embeddings": 4096},
    "quantization_config": {"quant_method": "mxfp4"}, "tie_word_embeddings": False, "eos_token_id": 200_002,
}  # fmt: skip
ENGINES: dict[str, tuple[int, dict[str, Any], list[int]]] = {
    "tp1": (1, {}, [1, 8, 64]),
    "tp2": (2, {"tensor_parallel_size": 2}, [1, 2, 8, 64]),
    "tp4": (4, {"tensor_parallel_size": 4}, [1, 2, 8, 64]),
    "pp2": (2, {"pipeline_parallel_size": 2}, [64]),
    "pp2, 14 + 10 layers": (2, {"pipeline_parallel_size": 2, "layers": (14, 10)}, [64]),
    # Longer contexts than the memory holds: how many blocks there is room for.
    "room": (1, {"max_model_len": 131_072}, []),
    "room, pp2": (2, {"max_model_len": 131_072, "pipeline_parallel_size": 2}, []),
    "ep2": (2, {"tensor_parallel_size": 2, "enable_expert_parallel": True}, [64]),
}
REPLICAS = {"dp1": 1, "dp2": 2, "dp4": 4}
INPUT, OUTPUT, REQUESTS = 1024, 256, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--steps", nargs="*", default=[])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--deadline", type=float, default=570.0, help="seconds after which no further step begins")
    parser.add_argument("--step-seconds", type=float, default=150.0, help="deadline of one step")
    parser.add_argument("--one", default="", help="be one step, and print its result as the last line")
    options = parser.parse_args()
    if options.one:
        print("\n" + json.dumps(run_one(options.one, options.runs)), flush=True)
        return
    begun = time.monotonic()
    options.folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    for name in options.steps or steps_for(options.gpus):
        left = options.deadline - (time.monotonic() - begun)
        if left < 10:
            report[name] = {"skipped": "no time left"}
            continue
        started = time.monotonic()
        report[name] = run_step(name, options, min(left, options.step_seconds))
        report[name]["step_seconds"] = round(time.monotonic() - started, 1)
        print(f"--- {name}: {json.dumps(report[name])[:1500]}", flush=True)
        (options.folder / "multi_gpu.json").write_text(json.dumps(report, indent=1))


def steps_for(num_gpus: int) -> list[str]:
    """List the steps that so many GPUs can show, the most telling first."""
    engines = [name for name, (needed, _, _) in ENGINES.items() if needed <= num_gpus]
    replicas = [name for name, needed in REPLICAS.items() if needed <= num_gpus]
    return ["host", "checks", "sums", "tokens", *engines, *replicas]


def run_step(name: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run one step in a process of its own; its log goes to the folder."""
    tests = str(HERE.parent / "tests" / "gpu" / "test_multi_gpu.py")
    sums = options.folder / "sums.json"
    commands = {
        "host": ["nvidia-smi", "topo", "-m"],
        "checks": [sys.executable, tests],
        "checks of sums": [sys.executable, tests, "sums", "races"],
        "tokens": [sys.executable, tests, "--only-engines"],
        "sums": [sys.executable, str(HERE / "multi_gpu_all_reduce.py"), "--json", str(sums), "--gpus",
                 *[str(size) for size in (2, 4, 8) if size <= options.gpus]],
    }  # fmt: skip
    command = commands.get(
        name,
        [sys.executable, __file__, str(options.folder), "--one", name, "--runs", str(options.runs)],
    )
    log = options.folder / f"{name.replace(' ', '-').replace(',', '')}.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            status = -9
    lines = log.read_text(errors="replace").splitlines()
    result: dict[str, Any] = {"status": status}
    if name == "sums" and sums.exists():
        result["microseconds"] = json.loads(sums.read_text())
    elif name not in commands and status == 0:
        result |= json.loads(next(line for line in lines[::-1] if line.startswith("{")))
    else:
        result["tail"] = lines[-25:]
    return result


def run_one(name: str, runs: int) -> dict[str, Any]:
    """Measure one engine, or one number of replicas."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE))
        if name in REPLICAS:
            return asyncio.run(measure_replicas(folder, REPLICAS[name], runs))
        _, sizes, counts = ENGINES[name]
        return measure_engine(folder, sizes, counts, runs)


def config_for(folder: str, most_requests: int, sizes: dict[str, Any]) -> Any:
    """Configure an engine with made-up weights."""
    from engine.config import CacheConfig, EngineConfig, SchedulerConfig, load_model_config
    from engine.placement import Device, HostSpec, ParallelSizes, PlacementOptions, Shares, place

    sizes = dict(sizes)
    if layers := sizes.pop("layers", ()):
        # Stages of so many layers each.
        model = load_model_config(Path(folder))
        host = HostSpec("localhost", tuple(Device(f"cuda:{index}") for index in range(len(layers))))
        options = PlacementOptions(shares=Shares(layers=layers))
        sizes["placement"] = place(model, ParallelSizes(1, len(layers), 1), [host], options).to_json()
    scheduler = SchedulerConfig(
        max_num_seqs=max(16, most_requests), max_num_batched_tokens=8192, enable_prefix_caching=False, max_queue=1 << 16
    )
    return EngineConfig(
        model=folder, device="cuda:0", load_format="dummy", scheduler=scheduler, cache=CacheConfig(block_size=64),
        **{"max_model_len": 16384, **sizes},
    )  # fmt: skip


def measure_engine(folder: str, sizes: dict[str, Any], counts: Sequence[int], runs: int) -> dict[str, Any]:
    """Measure decode rates of an engine in this process, its ranks in theirs."""
    from engine.benchmark.protocol import Bench, Point
    from engine.engine_core import EngineCore

    begun = time.monotonic()
    core = EngineCore.start(config_for(folder, max(counts, default=REQUESTS), sizes))
    result: dict[str, Any] = {"ready_seconds": round(time.monotonic() - begun, 1), "facts": asdict(core.facts)}
    try:
        bench = Bench(core, seed=0)
        for count in counts:
            point = Point(count, INPUT, OUTPUT + 1)
            bench.run(point, -1)
            found = [bench.run(point, run) for run in range(runs)]
            rates = [figures["decode_tokens_per_second"] or 0.0 for figures in found]
            result[f"n={count}"] = {
                "decode_tokens_per_second": round(statistics.median(rates), 1),
                "all": [round(rate, 1) for rate in rates],
                "output_tokens_per_second": round(
                    statistics.median(figures["output_tokens_per_second"] for figures in found), 1
                ),
                "first_seconds": round(statistics.median(figures["first_seconds"] for figures in found), 4),
            }
            print(count, result[f"n={count}"], flush=True)
    finally:
        core.stop()
    return result


async def measure_replicas(folder: str, count: int, runs: int) -> dict[str, Any]:
    """Measure whole runs of `REQUESTS` requests an engine through the load balancer."""
    from engine.benchmark.protocol import random_prompts
    from engine.core.request import EngineRequest
    from engine.core.sampling_params import SamplingParams
    from engine.data_parallel import DataParallelEngine

    begun = time.monotonic()
    sizes = {"data_parallel_size": count} if count > 1 else {}
    engine = DataParallelEngine(config_for(folder, REQUESTS, sizes), lambda *_: None, lambda *_: None)
    engine.start()
    await asyncio.wait_for(engine.ready.wait(), 120)
    result: dict[str, Any] = {"ready_seconds": round(time.monotonic() - begun, 1)}
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)

    async def answer(run: int, number: int, prompt: list[int]) -> int:
        stream = engine.submit(
            EngineRequest(f"{run}-{number}", prompt, params, max_tokens=OUTPUT, stop_token_ids=(), seed=0)
        )
        return sum([len(output.new_token_ids) async for output in stream])

    rates = []
    for run in range(-1, runs):
        prompts = random_prompts(f"replicas {run}", count * REQUESTS, INPUT, SHAPE["vocab_size"])  # type: ignore[arg-type]
        started = time.perf_counter()
        made = sum(await asyncio.gather(*[answer(run, i, prompt) for i, prompt in enumerate(prompts)]))
        seconds = time.perf_counter() - started
        assert made == count * REQUESTS * OUTPUT, made
        if run >= 0:
            rates.append(made / seconds)
    await engine.stop()
    return result | {
        "requests": count * REQUESTS,
        "output_tokens_per_second": round(statistics.median(rates), 1),
        "all": [round(rate, 1) for rate in rates],
    }


if __name__ == "__main__":
    main()
