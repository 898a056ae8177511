"""hlaunch and vLLM on the same checkpoint, on the same GPU, one after the other, with the same prompts.

    hlaunch synth gpt-oss-20b /dev/shm/gpt-oss-20b
    python bench/compare_vllm/compare.py /dev/shm/gpt-oss-20b --vllm-python python3 --vllm-path /tmp/peer --out r.json

Rows: decode rate at n = 1, 8, 32, 128, 256 (1,024 in, 256 out: extra time of 257-token over 1-token runs), prefill of
16 x 8,192, time to ready. Each side runs in a process of its own, so that the GPU's memory is free for the next. Every
result is written to `<out>.jsonl` the moment it is there: what a deadline or a crash cuts off keeps what was measured,
and `--resume` adds what is missing, so that one comparison may take several calls. vLLM's cold start takes minutes.

    --sides hlaunch                    only our side
    --sides vllm-triton,vllm-marlin    only vLLM's; `--resume` then joins the files
    --starts 2                         start every side twice: the second start finds its caches warm
    --points 1,8,16x8192               only these rows
    --tensor-parallel-size 2           both sides over two GPUs
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from rows import make_rows, point_name, table  # noqa: E402

from engine.config import CacheConfig, EngineConfig, SchedulerConfig, load_model_config  # noqa: E402
from launcher.benchmark import floor  # noqa: E402

INPUT, OUTPUT = 1024, 257
SIDES = ("hlaunch", "vllm-triton", "vllm-marlin")
# vLLM compiles Triton kernels when it meets a shape for the first time; after one pass it was still at it.
WARM_UPS = 3
# What vLLM captures when it is short of time; exact sizes for the rows that are measured.
MARLIN_GRAPHS = [1, 2, 4, 8, 16, 32, 64, 128, 256]


def main() -> int:
    options = arguments()
    log_file = options.out.with_suffix(".jsonl")
    known = read_log(log_file) if options.resume else []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with log_file.open("a" if options.resume else "w") as log:
        for start in range(options.starts):
            for side in options.sides:
                missing = missing_points(known, side, options.points, options.runs) if start == 0 else []
                if start == 0 and not missing and side in {event["side"] for event in known}:
                    continue
                left = options.deadline_seconds and options.deadline_seconds - (time.time() - began)
                if left is not None and left < options.grace_seconds:
                    print(f"{side}: no time left", file=sys.stderr)
                    continue
                for event in run_side(side, missing, options, left):
                    event |= {"side": side, "start": start}
                    known.append(event)
                    log.write(json.dumps(event) + "\n")
                    log.flush()
                    print(line_of(event), file=sys.stderr, flush=True)
                write_result(options, known)
    result = write_result(options, known)
    print(table(result["rows"]))
    failures = [event for event in known if event["event"] == "error"]
    for event in failures:
        print(f"error: {event['side']}: {event['kind']}: {event['message']}", file=sys.stderr)
    return 1 if failures else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a folder that hlaunch synth wrote, or a real checkpoint")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/compare_vllm.json")
    parser.add_argument("--sides", type=_sides, default=["hlaunch", "vllm-triton"], help=f"of {', '.join(SIDES)}")
    parser.add_argument("--points", type=_points, default=_points("1,8,32,128,256,16x8192"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--starts", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs that each side splits the model over")
    parser.add_argument("--max-num-batched-tokens", type=int, default=16384, help="of hlaunch")
    parser.add_argument("--block-size", type=int, default=64, help="of hlaunch")
    parser.add_argument("--max-model-len", type=int, default=16384)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.88)
    parser.add_argument("--vllm-python", default=sys.executable, help="the Python that has vLLM")
    parser.add_argument("--vllm-path", default="", help="PYTHONPATH of that Python, where vLLM was unpacked")
    parser.add_argument("--vllm-quick", action="store_true", help="fewer CUDA graphs for vLLM: starts a minute sooner")
    parser.add_argument("--vllm-options", type=json.loads, default={}, help="more arguments of vllm.LLM, as JSON")
    parser.add_argument("--deadline-seconds", type=float, help="nothing begins that would not end by then")
    parser.add_argument(
        "--grace-seconds", type=float, default=30.0, help="a side gets no less than this, and half of it to end"
    )
    parser.add_argument("--resume", action="store_true", help="keep what the .jsonl has, measure the rest")
    return parser.parse_args()


def run_side(
    side: str, points: Sequence[Sequence[int]], options: argparse.Namespace, left: float | None
) -> Iterator[dict[str, Any]]:
    """Run one side in a process of its own and give its events as they come."""
    request = {
        "points": points,
        "runs": options.runs,
        "warm_up": WARM_UPS,
        "seed": options.seed,
        "started": time.time(),
        # The process is given a little time to end before it is ended.
        "deadline_seconds": None if left is None else left - options.grace_seconds / 2,
    }
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if side == "hlaunch":
        argv = [sys.executable, "-m", "engine.benchmark"]
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environ.get("PYTHONPATH"))))
        request["engine"] = json.loads(engine_config(options).to_json())
    else:
        argv = [options.vllm_python, str(Path(__file__).with_name("vllm_side.py"))]
        environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "NCCL_NVLS_ENABLE": "0"}
        if options.vllm_path:
            environ["PYTHONPATH"] = options.vllm_path
        request |= vllm_request(side, options)
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ, cwd="/")
    assert process.stdin is not None
    assert process.stdout is not None
    has_ended_well = False
    # An engine that is still starting looks at no deadline; it is ended from here.
    watchdog = threading.Timer(left or 0.0, process.terminate)
    watchdog.daemon = True
    if left is not None:
        watchdog.start()
    try:
        process.stdin.write(json.dumps(request))
        process.stdin.close()
        for line in process.stdout:
            if line.startswith("{"):
                event = json.loads(line)
                has_ended_well = has_ended_well or event["event"] in ("done", "error")
                yield event
        code = process.wait()
        if not has_ended_well and code == -signal.SIGTERM and left is not None and not watchdog.is_alive():
            yield {"event": "skipped", "reason": "the deadline came first"}
        elif not has_ended_well:
            yield {"event": "error", "kind": "Died", "message": f"exit status {code}, see above", "hint": ""}
    finally:
        watchdog.cancel()
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(options.grace_seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """hlaunch's options: those of vLLM's side, as far as both have them."""
    return EngineConfig(
        model=str(options.checkpoint.resolve()),
        device=options.device,
        tensor_parallel_size=options.tensor_parallel_size,
        max_model_len=options.max_model_len,
        scheduler=SchedulerConfig(
            max_num_seqs=max(16, *(n for n, _, _ in options.points)),
            max_num_batched_tokens=options.max_num_batched_tokens,
            enable_prefix_caching=False,
            max_queue=1 << 20,
        ),
        cache=CacheConfig(block_size=options.block_size, gpu_memory_utilization=options.gpu_memory_utilization),
    )


def vllm_request(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """What vLLM's side wants besides the points."""
    backend = side.removeprefix("vllm-")
    return {
        "model": str(options.checkpoint.resolve()),
        "backend": backend,
        "vocab_size": load_model_config(options.checkpoint).vocab_size,
        "max_model_len": options.max_model_len,
        "max_num_seqs": max(16, *(n for n, _, _ in options.points)),
        "tensor_parallel_size": options.tensor_parallel_size,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "graph_sizes": MARLIN_GRAPHS if options.vllm_quick or backend == "marlin" else None,
        "options": options.vllm_options,
    }


def missing_points(
    known: Sequence[dict[str, Any]], side: str, points: Sequence[tuple[int, int, int]], runs: int
) -> list[tuple[int, int, int]]:
    """List the points of which a side has fewer than `runs` runs."""
    counts: dict[tuple[int, ...], int] = {}
    for event in known:
        if event["side"] == side and event["event"] == "run":
            point = (event["num_requests"], event["input_tokens"], event["output_tokens"])
            counts[point] = counts.get(point, 0) + 1
    return [point for point in points if counts.get(point, 0) < runs]


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the events of an earlier call, less a line that was cut off and less its errors: they are retried."""
    events = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event["event"] != "error":
            events.append(event)
    return events


def write_result(options: argparse.Namespace, known: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write the document: rows with ratios, and every event they were made from."""
    sides = {side: [e for e in known if e["side"] == side] for side in SIDES if any(e["side"] == side for e in known)}
    device = next((e["device"] for e in reversed(known) if "device" in e), {"name": "unknown"})
    rows = make_rows(sides, floors(options, sides, device))
    result = {
        "schema": 1,
        "what": "compare_vllm",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": device,
        "host": platform.platform(),
        "versions": {
            side: next((e["versions"] for e in events if "versions" in e), {}) for side, events in sides.items()
        },
        "checkpoint": options.checkpoint.name,
        "synthetic_weights": (options.checkpoint / "synthetic.json").is_file(),
        "settings": {
            "runs": options.runs,
            "seed": options.seed,
            "max_model_len": options.max_model_len,
            "tensor_parallel_size": options.tensor_parallel_size,
            "gpu_memory_utilization": options.gpu_memory_utilization,
            "hlaunch": {"max_num_batched_tokens": options.max_num_batched_tokens, "block_size": options.block_size},
            "vllm_options": options.vllm_options,
            "vllm_environment": {name: value for name, value in os.environ.items() if name.startswith("VLLM_")},
            "vllm_graph_sizes": MARLIN_GRAPHS if options.vllm_quick else "vLLM's own (marlin: seven sizes)",
        },
        "rows": rows,
        "events": list(known),
    }
    part = options.out.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(options.out)
    return result


def floors(
    options: argparse.Namespace, sides: dict[str, list[dict[str, Any]]], device: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Hold hlaunch's medians against the floor, by a row's name."""
    model = load_model_config(options.checkpoint)
    limits = floor.find_device(device["name"]) or floor.Device(device["name"], None, None, None)
    if device.get("copy_bytes_per_second"):
        limits = replace(limits, copy=device["copy_bytes_per_second"])
    limits = limits.times(options.tensor_parallel_size)
    found: dict[str, dict[str, Any]] = {}
    for row, (n, length, out) in zip(make_rows({"hlaunch": sides.get("hlaunch", [])}, {}), _order(sides), strict=False):
        if row["hlaunch"] is None or row["unit"] != "tok/s":
            continue
        if out == 1:
            found[row["name"]] = floor.prefill_report(model, n, length, row["hlaunch"], limits)
        else:
            context = length + (out - 1) // 2
            found[row["name"]] = floor.decode_report(model, n, context, row["hlaunch"], limits, row["distinct_experts"])
    return found


def _order(sides: dict[str, list[dict[str, Any]]]) -> list[tuple[int, int, int]]:
    runs = (e for e in sides.get("hlaunch", []) if e["event"] == "run")
    return list(dict.fromkeys((e["num_requests"], e["input_tokens"], e["output_tokens"]) for e in runs))


def line_of(event: dict[str, Any]) -> str:
    """One line about an event, for whoever watches."""
    side, kind = event["side"], event["event"]
    if kind == "ready":
        return f"{side}: ready after {event['ready_seconds']:.1f} s"
    if kind == "run":
        name = point_name((event["num_requests"], event["input_tokens"], event["output_tokens"]))
        rate = event.get("decode_tokens_per_second") or event["prefill_tokens_per_second"]
        return f"{side}: {name}, run {event['run']}: {rate:,.0f} tok/s"
    return f"{side}: {kind} " + ", ".join(
        f"{k}={v}" for k, v in event.items() if k in ("message", "reason", "num_requests")
    )


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def _sides(text: str) -> list[str]:
    sides = [side.strip() for side in text.split(",")]
    unknown = [side for side in sides if side not in SIDES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no such side: {unknown[0]} (of {', '.join(SIDES)})")
    return sides


def _points(text: str) -> list[tuple[int, int, int]]:
    """Read `8` (decode of 8 requests) and `16x8192` (prefill)."""
    points = []
    for item in text.split(","):
        n, is_prefill, length = item.strip().partition("x")
        try:
            points.append((int(n), int(length), 1) if is_prefill else (int(n), INPUT, OUTPUT))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{item!r} is neither a number of requests nor like 16x8192") from None
    return points


if __name__ == "__main__":
    sys.exit(main())
