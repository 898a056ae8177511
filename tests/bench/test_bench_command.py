"""`hlaunch bench`: figures from runs, the offline way, the profile; end-to-end tests hold the server's way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config import EngineConfig, parse_model_config
from launcher.benchmark import floor
from launcher.benchmark.child import run_child
from launcher.benchmark.load import LevelResult, RequestTimes
from launcher.benchmark.offline import bench_config, device_limits, with_floor
from launcher.benchmark.plot import write_plot
from launcher.benchmark.report import figures, median, offline_figures
from launcher.benchmark.synthetic import is_synthetic
from launcher.cli import arrange
from launcher.errors import EngineFailed
from launcher.plan.known_models import KNOWN_CONFIGS

ROOT = Path(__file__).resolve().parents[2]


def level(wall: float, *, errors: int = 0) -> LevelResult:
    requests = [RequestTimes(ttft=0.010, total=0.110, gaps=[0.01] * 10, output_tokens=11) for _ in range(4)]
    return LevelResult(4, wall, requests, ["x"] * errors)


def test_decode_rate_is_extra_tokens_over_extra_time() -> None:
    found = figures(level(0.5), first_seconds=0.1)
    assert found.decode_tokens_per_second == pytest.approx(4 * 10 / 0.4)
    assert found.tpot_ms_p50 == pytest.approx(10.0)
    assert found.e2el_ms_p99 == pytest.approx(110.0)
    assert figures(level(0.5)).decode_tokens_per_second is None
    assert figures(level(0.5), first_seconds=0.6).decode_tokens_per_second is None


def test_tpot_leaves_out_answers_of_one_token() -> None:
    requests = [RequestTimes(0.01, 0.01, [], 1), RequestTimes(0.01, 0.03, [0.02], 2)]
    assert figures(LevelResult(2, 1.0, requests, [])).tpot_ms_p50 == pytest.approx(20.0)


def test_a_levels_figures_are_medians_of_its_runs() -> None:
    runs = [figures(level(wall, errors=e), 0.1) for wall, e in ((0.5, 0), (9.0, 1), (0.6, 1))]
    found = median(runs)
    assert found.wall_seconds == 0.6
    assert found.decode_tokens_per_second == pytest.approx(40 / 0.5)
    assert (found.concurrency, found.requests, found.errors, found.runs) == (4, 4, 2, 3)
    one_without = [*runs[:2], figures(level(0.5))]
    assert median(one_without).decode_tokens_per_second == runs[0].decode_tokens_per_second


def test_an_offline_run_claims_no_percentile_that_it_did_not_see() -> None:
    event = {
        "num_requests": 2,
        "output_tokens": 11,
        "first_seconds": 0.1,
        "full_seconds": 1.1,
        "decode_tokens_per_second": 20.0,
        "prefill_tokens_per_second": 640.0,
    }
    found = offline_figures(event)
    assert (found.ttft_ms_p50, found.tpot_ms_p50) == (pytest.approx(100), pytest.approx(100))
    assert found.ttft_ms_p99 is found.itl_ms_p50 is None


def test_a_measurement_reuses_no_prefix_and_has_room_for_all() -> None:
    config = bench_config(EngineConfig("m"), [(64, 8, 8)], is_watched=True)
    assert not config.scheduler.enable_prefix_caching
    assert config.scheduler.max_num_seqs == 64
    assert not config.scheduler.async_scheduling
    assert bench_config(EngineConfig("m"), [(64, 8, 8)], is_watched=False).scheduler.async_scheduling


def test_limits_are_the_tables_with_the_copy_that_was_measured() -> None:
    limits = device_limits({"name": "NVIDIA H100 80GB HBM3", "copy_bytes_per_second": 2.9e12})
    assert (limits.spec, limits.copy) == (3.35e12, 2.9e12)
    assert device_limits({"name": "AMD EPYC"}).spec is None


def test_a_level_is_held_against_the_floor_at_its_mean_context() -> None:
    model = parse_model_config(KNOWN_CONFIGS["openai/gpt-oss-20b"])
    measured = figures(level(0.5), first_seconds=0.1)
    found = with_floor(model, measured, (4, 1024, 257), floor.DEVICES["H100 80GB HBM3"]).floor
    assert found is not None
    assert found["context"] == 1152
    expected = 100 * floor.decode_floor_seconds(model, 4, 1152, 3.35e12) / 4
    assert found["fraction_spec"] == pytest.approx(expected, rel=1e-2)
    assert with_floor(None, measured, (4, 1024, 257), floor.DEVICES["H200"]).floor is None
    assert with_floor(model, figures(level(0.5)), (4, 1024, 257), floor.DEVICES["H200"]).floor is None


def test_ops_add_up_to_the_bytes_of_the_step() -> None:
    """But for norms and sinks, which no op with a name of its own reads."""
    model = parse_model_config(KNOWN_CONFIGS["openai/gpt-oss-20b"])
    for names in (
        ("qkv_project", "linear_add", "paged_attention", "moe_add", "logits"),
        (
            *("norm_qkv_rope", "out_proj_add", "paged_decode_attention", "norm_router_topk", "moe_gate_up"),
            *("moe_down_add", "norm_logits"),
        ),
        ("decode_layers", "norm_logits"),
        ("cuBLAS", "paged_decode_attention", "router_topk", "moe_decode"),
    ):
        parts = [floor.op_bytes(model, name, 8, 1152) for name in names]
        assert None not in parts
        total = sum(part for part in parts if part is not None)
        assert total == pytest.approx(floor.step_bytes(model, 8, 1152).total, rel=1e-4)
    assert floor.op_bytes(model, "rms_norm", 8, 1152) is None


def hlaunch(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "NO_COLOR": "1", "PYTHONPATH": str(ROOT), "HLAUNCH_STATE_DIR": str(cwd / "state")}
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", *args], cwd=cwd, env=environ, capture_output=True, text=True
    )


def test_bench_offline_measures_profiles_and_draws(tmp_path: Path) -> None:
    picture, file = tmp_path / "b.png", tmp_path / "b.json"
    done = hlaunch(
        *("bench", "tiny-oss", "-c", "1,3", "--input", "16", "--output", "9", "--runs", "2", "--profile", "--json"),
        *("--out", str(file), "--plot", str(picture), "--set", "cpu-threads=1"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data == json.loads(file.read_text())
    assert (data["mode"], data["synthetic_weights"]) == ("offline", False)
    assert [row["concurrency"] for row in data["levels"]] == [1, 3]
    for row in data["levels"]:
        assert row["runs"] == 2
        assert row["distinct_experts"] > 0
        assert row["floor"]["experts_counted"] is True
        assert row["floor"]["fraction_spec"] is None
        assert row["floor"]["fraction_copy"] > 0
    assert [item["num_requests"] for item in data["profile"]] == [1, 3]
    assert {op["name"] for op in data["profile"][0]["ops"]} >= {"moe_add", "logits", "paged_attention"}
    assert data["profile"][0]["bytes"] > 0
    assert data["device"]["copy_bytes_per_second"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "state").exists(), "no server was started"


def test_random_weights_are_said_beside_the_figures(tmp_path: Path) -> None:
    assert hlaunch("synth", "tiny-oss", "w", "--layers", "2", cwd=tmp_path).returncode == 0
    assert is_synthetic(tmp_path / "w")
    (tmp_path / "model_registry.yml").write_text("models: {mine: {model: ./w, cpu-threads: 1}}\n")
    done = hlaunch(
        "bench", "mine", "--offline", "-c", "1", "--input", "8", "--output", "5", "--runs", "1", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "random weights: these figures are of speed alone" in done.stderr
    assert done.stdout.splitlines()[0].split()[:2] == ["REQUESTS", "DECODE"]


@pytest.mark.parametrize(
    ("args", "cause"),
    [
        (("--offline", "--url", "http://h"), "error: --offline measures the engine in this machine"),
        (("--offline", "-r", "2"), "error: --offline hands all requests over at once"),
        (("-c", "none"), "error: --concurrency none"),
    ],
)
def test_bench_refuses_what_does_not_go_together(tmp_path: Path, args: tuple[str, ...], cause: str) -> None:
    done = hlaunch("bench", "tiny-oss", *args, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(cause)


def test_benchs_own_profile_is_told_from_a_profile_of_settings() -> None:
    assert arrange(["bench", "m", "--profile"], {}) == ["bench", "m", "--profile-step"]
    assert arrange(["bench", "m", "--profile", "-c", "1"], {}) == ["bench", "m", "--profile-step", "-c", "1"]
    assert arrange(["bench", "m", "--profile", "fast"], {}) == ["--profile", "fast", "bench", "m"]
    assert arrange(["up", "m", "--profile", "fast"], {}) == ["--profile", "fast", "up", "m"]


def test_a_plot_draws_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    offline = offline_figures(
        {"num_requests": 2, "output_tokens": 1, "first_seconds": 0.1, "prefill_tokens_per_second": 1.0}
    )
    write_plot(tmp_path / "p.png", "t", [figures(level(0.5), 0.1), offline])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_child_that_dies_leaves_its_last_words() -> None:
    with pytest.raises(EngineFailed, match="engine.no_such_module failed with exit status 1") as caught:
        list(run_child("engine.no_such_module", {}, dict(os.environ)))
    assert any("No module named" in line for line in caught.value.details)
