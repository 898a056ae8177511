"""Points and profiles of an engine in this process: tiny-oss on the CPU."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.benchmark.protocol import Bench, BenchmarkError, Point
from engine.config import EngineConfig, SchedulerConfig
from engine.engine_core import EngineCore
from engine.profiling import count_experts, kernel_times, profile_steps

ROOT = Path(__file__).resolve().parents[2]
CONFIG = EngineConfig(
    model="tiny-oss",
    max_model_len=512,
    cpu_threads=1,
    scheduler=SchedulerConfig(max_num_seqs=8, enable_prefix_caching=False, async_scheduling=False),
)


@pytest.fixture(scope="module")
def core() -> Iterator[EngineCore]:
    core = EngineCore.start(CONFIG)
    yield core
    core.stop()


def test_rates_are_what_the_protocol_says(core: EngineCore) -> None:
    """On a clock that ticks 2, 12, … seconds: the short run takes 2 s, the long one 10 s more."""
    clock = iter([0.0, 2.0, 100.0, 112.0]).__next__
    found = Bench(core, seed=0, clock=clock).run(Point(3, 16, 11), run=0)
    assert (found["first_seconds"], found["full_seconds"]) == (2.0, 12.0)
    assert found["decode_tokens_per_second"] == pytest.approx(3 * 10 / 10.0)
    assert found["prefill_tokens_per_second"] == pytest.approx(3 * 16 / 2.0)
    assert found["output_tokens_per_second"] == pytest.approx(3 * 11 / 12.0)
    assert not core.has_work


def test_a_point_too_short_to_measure_has_no_rate(core: EngineCore) -> None:
    clock = iter([0.0, 2.0, 100.0, 101.0]).__next__
    assert Bench(core, seed=0, clock=clock).run(Point(1, 16, 2), run=0)["decode_tokens_per_second"] is None


def test_a_refused_request_fails_the_point(core: EngineCore) -> None:
    with pytest.raises(BenchmarkError, match="refused: too_long"):
        Bench(core, seed=0).run(Point(1, 600, 2), run=0)


def test_experts_of_one_request_are_as_many_as_it_chooses(core: EngineCore) -> None:
    model = core.model
    assert Bench(core, seed=0).distinct_experts(1, 32) == model.num_experts_per_token
    several = Bench(core, seed=0).distinct_experts(6, 32)
    assert several is not None
    assert model.num_experts_per_token < several <= model.num_experts
    assert not core.has_work


def test_a_profile_names_every_op_with_its_share_of_the_step(core: EngineCore) -> None:
    bench = Bench(core, seed=0)
    bench.begin_decode(Point(2, 16, 80), "profile")
    profile = profile_steps(core, 10)
    bench.finish()
    layers = core.model.num_layers
    calls = {op.name: op.calls for op in profile.ops}
    assert calls == {
        "embedding": 1,
        "rms_norm": 2 * layers + 1,
        "qkv_project": layers,
        "kv_write": layers,
        "paged_attention": layers,
        "linear_add": layers,
        "moe_add": layers,
        "logits": 1,
    }
    total = sum(op.seconds for op in profile.ops)
    assert 0.2 * profile.step_seconds < total < profile.step_seconds
    assert all(op.spec for op in profile.ops)
    assert [op.seconds for op in profile.ops] == sorted((op.seconds for op in profile.ops), reverse=True)


def test_watching_ends(core: EngineCore) -> None:
    executor: Any = core.executor
    before = executor._worker._runner._bare
    bench = Bench(core, seed=0)
    bench.begin_decode(Point(1, 16, 60), "x")
    assert count_experts(core, 1) is not None
    bench.finish()
    assert executor._worker._runner._bare is before


def test_an_engine_with_ranks_elsewhere_counts_nothing() -> None:
    from typing import cast

    assert count_experts(cast(EngineCore, SimpleNamespace(executor=SimpleNamespace())), 1) is None


def test_kernels_of_a_device_are_per_step_and_in_order() -> None:
    events = [
        SimpleNamespace(key="router", count=240, self_device_time_total=500.0),
        SimpleNamespace(key="host only", count=10, self_device_time_total=0.0),
        SimpleNamespace(key="nvjet_tst_64x8_64x16_4x1", count=240, self_device_time_total=3000.0),
        SimpleNamespace(key="cublasLt::splitKreduce_kernel<32>", count=10, self_device_time_total=100.0),
        SimpleNamespace(key="_expert_kernel", count=480, self_device_time_total=9000.0),
    ]
    found = [(op.name, op.spec, op.calls, round(op.seconds * 1e6, 6)) for op in kernel_times(events, 10)]
    assert found == [
        ("moe_decode", "kernel", 48, 900),
        ("cuBLAS", "2 kernels", 25, 310),
        ("router", "kernel", 24, 50),
    ]


def benchmark(request: dict[str, Any]) -> tuple[int, list[dict[str, Any]], str]:
    done = subprocess.run(
        [sys.executable, "-m", "engine.benchmark"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], done.stderr


def test_the_process_says_results_as_they_come() -> None:
    request = {
        "engine": json.loads(CONFIG.to_json()),
        "points": [[2, 16, 9]],
        "runs": 2,
        "profile": [2],
        "profile_steps": 3,
    }
    code, events, stderr = benchmark(request)
    assert code == 0, stderr
    kinds = [event["event"] for event in events]
    assert kinds == ["ready", "warm-up", "run", "run", "experts", "profile", "done"]
    assert events[-1]["device"]["kind"] == "cpu"
    assert events[-1]["device"]["copy_bytes_per_second"] > 1e8
    assert events[-1]["versions"]["torch"]
    assert [event["run"] for event in events if event["event"] == "run"] == [0, 1]


def test_the_process_skips_what_the_deadline_does_not_allow_and_says_so() -> None:
    request = {"engine": json.loads(CONFIG.to_json()), "points": [[1, 16, 9], [2, 16, 9]], "deadline_seconds": 0.001}
    code, events, _ = benchmark(request)
    assert code == 0
    assert [event["event"] for event in events] == ["ready", "skipped", "skipped", "done"]


def test_the_process_fails_in_one_line() -> None:
    code, events, _ = benchmark({"engine": {"model": "no/such/model"}, "points": []})
    assert code == 1
    assert events[-1]["event"] == "error"
    assert "no/such/model" in events[-1]["message"]


def test_prompts_are_new_for_every_run_and_phase(core: EngineCore) -> None:
    bench, point = Bench(core, seed=0), Point(2, 32, 9)
    drawn = [
        tuple(prompt)
        for run, phase in itertools.product((-1, 0, 1), ("first", "full"))
        for prompt in bench._prompts(point, run, phase)
    ]
    assert len(set(drawn)) == len(drawn) == 12
