"""The comparison with vLLM: both sides' processes, resuming, rows. A module of vLLM's shape stands in for it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine.benchmark.protocol import random_prompts
from engine.config import BUNDLED_MODELS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "bench/compare_vllm"

FAKE_VLLM = """
import time
__version__ = "0.0-stand-in"
class SamplingParams:
    def __init__(self, **options):
        self.max_tokens = options["max_tokens"]
        assert options["ignore_eos"] and options["temperature"] == 0.0
class Answer:
    def __init__(self, count): self.outputs = [type("O", (), {"token_ids": [0] * count})]
class LLM:
    def __init__(self, **options):
        print("noise on stdout")
        assert options["enable_prefix_caching"] is False
        if options["model"].endswith("slow"): time.sleep(60)
        if options["model"].endswith("broken"): raise RuntimeError("out of luck")
    def generate(self, prompts, params, use_tqdm):
        assert all(0 <= i < 100000 for p in prompts for i in p["prompt_token_ids"])
        time.sleep(0.001 * params.max_tokens)
        return [Answer(params.max_tokens) for _ in prompts]
"""
FAKE_TORCH = """
__version__ = "0.0"
class cuda:
    @staticmethod
    def get_device_name(_): return "NVIDIA H100 80GB HBM3"
"""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"compare_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rows = load("rows")


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    folder = tmp_path / "peer"
    folder.mkdir()
    (folder / "vllm.py").write_text(FAKE_VLLM)
    (folder / "torch.py").write_text(FAKE_TORCH)
    return folder


def compare(out: Path, *args: str, model: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "compare.py"), str(model or BUNDLED_MODELS["tiny-oss"]), "--out", str(out)]
    return subprocess.run([*command, *args], capture_output=True, text=True, timeout=120)


def test_both_sides_draw_the_same_prompts() -> None:
    assert load("vllm_side").random_prompts("0/8/16/1/full", 8, 16, 999) == random_prompts("0/8/16/1/full", 8, 16, 999)


def test_a_comparison_in_two_calls(tmp_path: Path, peer: Path) -> None:
    """hlaunch alone on the CPU, then vLLM's side into the same document."""
    out = tmp_path / "r.json"
    common = ("--points", "2x32", "--runs", "2", "--max-model-len", "1024")
    first = compare(out, *common, "--sides", "hlaunch", "--device", "cpu")
    assert first.returncode == 0, first.stderr
    ours = json.loads(out.read_text())
    assert [row["name"] for row in ours["rows"]] == ["prefill 2 x 32", "ready, first start"]
    assert ours["rows"][0]["ratio"] is None
    assert ours["synthetic_weights"] is False
    second = compare(
        out, *common, "--sides", "hlaunch,vllm-triton", "--resume", "--vllm-path", str(peer), "--device", "cpu"
    )
    assert second.returncode == 0, second.stderr
    both = json.loads(out.read_text())
    row = both["rows"][0]
    assert row["hlaunch"] == ours["rows"][0]["hlaunch"], "what was measured is kept"
    assert row["ratio"] == pytest.approx(row["hlaunch"] / row["vllm"])
    assert (row["backend"], row["runs"]) == ("triton", 2)
    assert both["versions"]["vllm-triton"]["vllm"] == "0.0-stand-in"
    lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert lines == both["events"]
    assert sum(event["event"] == "ready" for event in lines) == 2
    assert "| prefill 2 x 32 |" in second.stdout


def test_decode_points_of_the_other_side_and_a_second_start(tmp_path: Path, peer: Path) -> None:
    out = tmp_path / "r.json"
    done = compare(
        out, "--sides", "vllm-marlin", "--points", "1,4", "--runs", "3", "--starts", "2", "--vllm-path", str(peer)
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    by_name = {row["name"]: row for row in result["rows"]}
    # 257 tokens take 256 ms more than one: 1,000 tokens a second and request, less what sleeping takes too long.
    assert 300 < by_name["n = 1"]["vllm"] <= 1000
    assert by_name["n = 4"]["vllm"] == pytest.approx(4 * by_name["n = 1"]["vllm"], rel=0.5)
    assert by_name["ready, caches warm"]["vllm"] > 0


def test_a_side_that_dies_is_told_and_the_rest_is_kept(tmp_path: Path, peer: Path) -> None:
    model = tmp_path / "broken"
    model.mkdir()
    (model / "config.json").write_text((BUNDLED_MODELS["tiny-oss"] / "config.json").read_text())
    out = tmp_path / "r.json"
    done = compare(out, "--sides", "vllm-triton", "--points", "1", "--vllm-path", str(peer), model=model)
    assert done.returncode == 1
    assert "error: vllm-triton: RuntimeError: out of luck" in done.stderr
    assert json.loads(out.read_text())["events"][-1]["event"] == "error"


def test_past_the_deadline_nothing_begins(tmp_path: Path, peer: Path) -> None:
    out = tmp_path / "r.json"
    done = compare(out, "--sides", "vllm-triton", "--points", "1", "--vllm-path", str(peer), "--deadline-seconds", "5")
    assert done.returncode == 0, done.stderr
    assert "no time left" in done.stderr
    assert json.loads(out.read_text())["rows"] == []


def test_an_engine_that_is_still_starting_at_the_deadline_is_ended(tmp_path: Path, peer: Path) -> None:
    model = tmp_path / "slow"
    model.mkdir()
    (model / "config.json").write_text((BUNDLED_MODELS["tiny-oss"] / "config.json").read_text())
    out = tmp_path / "r.json"
    options = ("--vllm-path", str(peer), "--deadline-seconds", "3", "--grace-seconds", "1")
    begin = time.monotonic()
    done = compare(out, "--sides", "vllm-triton", "--points", "1", *options, model=model)
    assert time.monotonic() - begin < 30
    assert done.returncode == 0, done.stderr
    assert "vllm-triton: skipped reason=the deadline came first" in done.stderr


def run_event(n: int, rate: float, out: int = 257) -> dict[str, Any]:
    key = "decode_tokens_per_second" if out > 1 else "prefill_tokens_per_second"
    return {"event": "run", "num_requests": n, "input_tokens": 1024, "output_tokens": out, key: rate}


def test_ratios_are_of_medians_against_the_better_backend() -> None:
    sides = {
        "hlaunch": [
            run_event(8, 1800),
            run_event(8, 2000),
            run_event(8, 9000),
            {"event": "ready", "ready_seconds": 10},
        ],
        "vllm-triton": [run_event(8, 1000), {"event": "ready", "ready_seconds": 120}],
        "vllm-marlin": [run_event(8, 1600), {"event": "ready", "ready_seconds": 80}],
    }
    decode, ready = rows.make_rows(sides, {"n = 8": {"fraction_spec": 0.7}})
    assert (decode["ratio"], decode["backend"], decode["fraction"]) == (1.25, "marlin", 0.7)
    assert (ready["ratio"], ready["backend"], ready["unit"]) == (8.0, "marlin", "s")
    assert "| n = 8 | 2,000 | 1,600 | marlin | **1.25** | 70 | - | 1 |" in rows.table([decode, ready])


def test_a_side_that_stalls_is_held_to_its_fastest_times() -> None:
    def timed(first: float, full: float) -> dict[str, Any]:
        return run_event(8, 8 * 256 / (full - first)) | {"first_seconds": first, "full_seconds": full}

    sides = {
        "hlaunch": [timed(0.10, 1.12), timed(0.11, 1.13), timed(0.10, 1.14)],
        "vllm-triton": [timed(0.67, 1.52), timed(0.11, 1.53), timed(1.25, 2.07)],
    }
    (row,) = rows.make_rows(sides, {})
    assert row["stalled"] == ["vllm-triton"]
    assert row["hlaunch"] == pytest.approx(2048 / 1.02)
    assert row["vllm"] == pytest.approx(2048 / (1.52 - 0.11))
    assert "| n = 8 | 2,008 | 1,452* | triton |" in rows.table([row])


@pytest.mark.parametrize("args", [("--sides", "sglang"), ("--points", "many")])
def test_bad_options_are_refused(tmp_path: Path, args: tuple[str, ...]) -> None:
    done = compare(tmp_path / "r.json", *args)
    assert done.returncode == 2
    assert "error: argument" in done.stderr
