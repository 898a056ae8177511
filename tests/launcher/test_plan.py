"""Plans as values: memory arithmetic, inventory from fixture trees, refusals, files, environment, drawing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from launcher_support import REGISTRY

from engine.config import BUNDLED_MODELS, MODEL_TYPES, EngineConfig
from engine.memory import CPU_RUNTIME_BYTES, loaded_weight_bytes, model_bytes
from launcher.errors import DoesNotFit, HlaunchError, PreflightError
from launcher.plan import Inventory, LaunchPlan, make_plan, read_inventory
from launcher.plan.drawing import BAR_WIDTH, curl_line, memory_bar, plan_data
from launcher.plan.fit import report_fit
from launcher.plan.known_models import known_model
from launcher.plan.weights import find_model_files
from launcher.registry import load_registry, resolve
from launcher.sizes import GIB

BIG = Inventory("host", "CPU", 8, 1, 256 * GIB, 200 * GIB)


def plan_of(folder: Path, name: str, *overrides: str, inventory: Inventory = BIG, **environ: str) -> LaunchPlan:
    path = folder / "model_registry.yml"
    path.write_text(REGISTRY)
    entry = resolve(load_registry(path), name, environ, overrides)
    return make_plan(entry, inventory, environ, folder / "state/instances" / entry.name)


# Memory.


@pytest.mark.parametrize(
    ("name", "gigabytes", "context_gib"), [("gpt-oss-20b", 13.76, 3.0), ("gpt-oss-120b", 65.25, 4.5)]
)
def test_worked_checks_of_the_handbook(name: str, gigabytes: float, context_gib: float) -> None:
    model = known_model(f"openai/{name}")
    assert model is not None
    assert model_bytes(model) / 1e9 == pytest.approx(gigabytes, abs=0.005)
    assert loaded_weight_bytes(model, "bfloat16", expand_experts=False) == model_bytes(model)
    config = EngineConfig(
        model="m",
        dtype="bfloat16",
        scheduler=replace(EngineConfig("m").scheduler, max_num_seqs=8, max_num_batched_tokens=16),
    )
    report = report_fit(config, model, None, 200 * GIB)
    assert report.full_request_bytes / GIB == pytest.approx(context_gib, rel=0.002)
    assert report.checkpoint_bytes == model_bytes(model)
    assert not report.is_from_files


def test_the_bundled_models_estimate_comes_from_its_headers(tmp_path: Path) -> None:
    report = plan_of(tmp_path, "tiny-oss").fit
    assert report is not None
    assert report.is_from_files
    assert report.fits
    assert report.is_expanded
    assert report.memory.max_full_requests == pytest.approx(16, abs=0.01)


def test_every_suggestion_fits_and_is_the_largest(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "gpt-oss-20b", "max-model-len=128k", "dtype=float32")
    assert plan.fit is not None
    assert not plan.fit.fits, "float32 KV of a full context is above the default pool"
    offered = [dict(suggestion.settings) for suggestion in plan.fit.suggestions]
    assert {key for settings in offered for key in settings} == {"kv-cache-memory-bytes", "max-model-len"}
    for settings in offered:
        overrides = [f"{key}={value}" for key, value in settings.items()]
        again = plan_of(tmp_path, "gpt-oss-20b", "max-model-len=128k", "dtype=float32", *overrides)
        assert again.fit is not None
        assert again.fit.fits, settings
    longest = int(next(settings["max-model-len"] for settings in offered if "max-model-len" in settings))
    beyond = plan_of(tmp_path, "gpt-oss-20b", "dtype=float32", f"max-model-len={longest + 16}")
    assert beyond.fit is not None
    assert not beyond.fit.fits


def longest_offered(plan: LaunchPlan) -> int:
    assert plan.fit is not None
    return next(int(value) for item in plan.fit.suggestions for key, value in item.settings if key == "max-model-len")


def test_the_longest_context_is_counted_with_its_own_rotary_table(tmp_path: Path) -> None:
    saved = replace(BIG, memory_available_bytes=22_836_436_992, source="saved in a file")
    longest = longest_offered(plan_of(tmp_path, "gpt-oss-20b", "max-model-len=128k", inventory=saved))
    for tokens, fits in ((longest, True), (longest + 16, False)):
        plan = plan_of(tmp_path, "gpt-oss-20b", f"max-model-len={tokens}", inventory=saved)
        assert plan.fit is not None
        assert plan.fit.fits is fits, tokens
    # As long as four billion tokens, the table alone fills any machine: that is no reason to call it too small.
    far = plan_of(tmp_path, "tiny-oss", "max-model-len=4294967296", inventory=saved)
    assert longest_offered(far) == 2048
    assert not any("no setting helps" in problem.hint for problem in far.problems)
    tight = plan_of(
        tmp_path, "tiny-oss", "max-model-len=4294967296", inventory=replace(saved, memory_available_bytes=1)
    )
    (hint,) = (problem.hint for problem in tight.problems if "no setting helps" in problem.hint)
    assert hint.endswith(" 0.3 GiB free"), "for what the model takes, not for what was asked"


def test_suggestions_leave_some_of_the_memory_that_is_free_just_now(tmp_path: Path) -> None:
    def offered(**fields: object) -> int:
        plan = plan_of(tmp_path, "gpt-oss-20b", "max-model-len=128k", inventory=replace(BIG, **fields))
        return longest_offered(plan)

    free = 22_836_436_992
    live = offered(memory_available_bytes=free)
    assert live < offered(memory_available_bytes=free, source="saved in a file")
    less = replace(BIG, memory_available_bytes=free - (200 << 20))
    again = plan_of(tmp_path, "gpt-oss-20b", f"max-model-len={live}", inventory=less)
    assert again.fit is not None
    assert again.fit.fits, "what was suggested still fits when a little of it has gone"


def test_a_machine_that_is_barely_large_enough_gets_all_settings_together(tmp_path: Path) -> None:
    model = known_model("openai/gpt-oss-20b")
    assert model is not None
    weights = loaded_weight_bytes(model, "float32", expand_experts=False)
    tight = replace(BIG, memory_available_bytes=weights + CPU_RUNTIME_BYTES + (2800 << 20))
    plan = plan_of(tmp_path, "gpt-oss-20b", inventory=tight)
    assert plan.fit is not None
    (suggestion,) = plan.fit.suggestions
    overrides = [f"{key}={value}" for key, value in suggestion.settings]
    assert len(overrides) == 3
    again = plan_of(tmp_path, "gpt-oss-20b", *overrides, inventory=tight)
    assert again.fit is not None
    assert again.fit.fits


def test_a_machine_that_is_too_small_is_told_what_it_takes(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "gpt-oss-120b", inventory=replace(BIG, memory_available_bytes=24 * GIB))
    (problem,) = plan.problems
    assert isinstance(problem, DoesNotFit)
    assert "24.0 GiB are available" in problem.message
    assert problem.hint.startswith("no setting helps: this needs a machine with ")


def test_a_pool_larger_than_the_machine_is_named(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "tiny-oss", "kv-cache-memory-bytes=300GiB")
    assert "the KV cache of 300.00 GiB is above the" in plan.problems[0].message


@pytest.mark.parametrize("available", [1, 64 << 20, GIB, 24 * GIB, 80 * GIB, 4096 * GIB])
@pytest.mark.parametrize("name", ["tiny-oss", "gpt-oss-20b", "gpt-oss-120b"])
def test_the_bar_always_has_its_width_and_every_term(tmp_path: Path, name: str, available: int) -> None:
    plan = plan_of(tmp_path, name, inventory=replace(BIG, memory_available_bytes=available))
    assert plan.fit is not None
    bar = memory_bar(plan.fit)
    assert len(bar) == BAR_WIDTH + 2
    memory = plan.fit.memory
    if memory.required_bytes <= memory.budget_bytes:
        assert "!" not in bar
        assert set("WARK") <= set(bar)
    else:
        assert bar.endswith("!]")


# Inventory.


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


PROC = {
    "proc/meminfo": "MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:   8388608 kB\n",
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: Test CPU\n\nprocessor\t: 1\nmodel name\t: Test CPU\n",
}


def test_a_plain_machine(tmp_path: Path) -> None:
    found = read_inventory(write_tree(tmp_path, PROC))
    assert (found.memory_total_bytes, found.memory_available_bytes) == (16 * GIB, 8 * GIB)
    assert (found.cpu_cores, found.cpu_name, found.numa_nodes, found.gpus) == (2, "Test CPU", 1, ())


def test_cgroup_v2_limits_of_an_ancestor_count_and_page_cache_does_not(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/a"
    root = write_tree(
        tmp_path,
        PROC
        | {
            "proc/self/cgroup": "0::/a/b\n",
            f"{group}/memory.max": f"{4 * GIB}\n",
            f"{group}/memory.current": f"{3 * GIB}\n",
            f"{group}/memory.stat": f"anon 1\ninactive_file {GIB}\n",
            f"{group}/b/memory.max": "max\n",
            f"{group}/cpu.max": "50000 100000\n",
        },
    )
    found = read_inventory(root)
    assert (found.memory_total_bytes, found.memory_available_bytes) == (4 * GIB, 2 * GIB)
    assert found.cpu_cores == 1


def test_cgroup_v1_limits_count_and_no_limit_is_none(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory"
    root = write_tree(
        tmp_path,
        PROC
        | {
            "proc/self/cgroup": "4:memory:/\n1:cpu:/\n0::/\n",
            f"{group}/memory.limit_in_bytes": f"{2 * GIB}\n",
            f"{group}/memory.usage_in_bytes": f"{GIB}\n",
        },
    )
    assert read_inventory(root).memory_available_bytes == GIB
    (root / group / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert read_inventory(root).memory_available_bytes == 8 * GIB


def test_gpus_are_listed_by_the_drivers_files(tmp_path: Path) -> None:
    files = {f"proc/driver/nvidia/gpus/0000:0{i}:00.0/information": "Model: \t NVIDIA H100\n" for i in range(2)}
    found = read_inventory(write_tree(tmp_path, PROC | files))
    assert [(gpu.index, gpu.name) for gpu in found.gpus] == [(0, "NVIDIA H100"), (1, "NVIDIA H100")]


# Refusals.


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("device=cuda", "device cuda: no NVIDIA GPU is seen on host"),
        ("dtype=float16", "dtype float16"),
        ("kv-cache-dtype=fp8", "kv-cache-dtype fp8"),
        ("distributed-executor-backend=mp", "distributed-executor-backend mp: the one rank of an engine"),
        ("distributed-executor-backend=ray", "distributed-executor-backend ray: Ray starts ranks on"),
        ("max-model-len=4096", "max-model-len 4096 is above the model's 2048 positions"),
    ],
)
def test_what_this_version_cannot_do_is_refused_with_6_and_a_way_out(tmp_path: Path, override: str, said: str) -> None:
    plan = plan_of(tmp_path, "tiny-oss", override)
    with pytest.raises(DoesNotFit) as caught:
        plan.check()
    assert caught.value.message.startswith(said)
    assert caught.value.hint.startswith("add --")
    assert "--set " in caught.value.hint
    assert caught.value.exit_code == 6


def test_a_public_address_needs_a_key_or_a_clear_word(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"host 0\.0\.0\.0 is reachable"):
        plan_of(tmp_path, "public").check()
    plan_of(tmp_path, "public", "insecure-no-auth=true").check()
    plan_of(tmp_path, "public", "host=localhost").check()
    keyed = plan_of(tmp_path, "public", "api-key=${KEY}", KEY="s3cret")
    keyed.check()
    assert keyed.config.server.api_key_sha256 == ("1ec1c26b50d5d3c58d9583181af8076655fe00756bf7285940ba3670f99fcba0",)


def test_a_key_that_is_not_set_stops_up_and_is_never_shown(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"api-key: \$\{TEST_API_KEY\} is not set"):
        plan_of(tmp_path, "keyed").check()
    plan = plan_of(tmp_path, "keyed", TEST_API_KEY="canary-7f3a")
    assert "canary" not in json.dumps(plan_data(plan)) + repr(plan)
    digest = plan.config.server.api_key_sha256[0]
    assert digest not in json.dumps(plan_data(plan)), "a digest without salt tells a weak key"
    assert '-H "Authorization: Bearer $TEST_API_KEY"' in curl_line(plan, "http://127.0.0.1:8000")


# Files.


def test_missing_files_say_where_was_looked_and_how_to_get_them(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "gpt-oss-20b", HLAUNCH_MODEL_DIR="/models", HF_HOME="/hf")
    assert plan.problems == ()
    (blocker,) = plan.blockers
    assert blocker.exit_code == 5
    assert "looked in /models" in blocker.details
    assert "looked in /hf/hub" in blocker.details
    assert blocker.hint.startswith("run: huggingface-cli download openai/gpt-oss-20b")


def test_who_would_download_a_model_is_told_first_which_are_served(tmp_path: Path) -> None:
    registry = tmp_path / "other.yml"
    registry.write_text("models: {other: {model: org/another-model}}")
    entry = resolve(load_registry(registry), "other", {}, ())
    (problem,) = make_plan(entry, BIG, {"HF_HOME": "/hf"}, tmp_path / "state").problems
    assert f"only models of type {MODEL_TYPES[0]} are served" in problem.message
    assert problem.hint.startswith("run: huggingface-cli download org/another-model")
    known = plan_of(tmp_path, "gpt-oss-20b", HF_HOME="/hf").blockers[0]
    assert "only models" not in known.message


def test_a_snapshot_of_the_cache_is_found_and_missing_shards_are_named(tmp_path: Path) -> None:
    snapshot = tmp_path / "cache/models--org--name/snapshots/abc"
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    write_tree(
        tmp_path,
        {
            "cache/models--org--name/refs/main": "abc",
            "cache/models--org--name/refs/v2": "abc",
            "cache/models--org--name/snapshots/abc/config.json": "{}",
            "cache/models--org--name/snapshots/abc/model-1.safetensors": "",
            "cache/models--org--name/snapshots/abc/model.safetensors.index.json": json.dumps(index),
        },
    )
    for revision in (None, "main", "v2", "abc"):
        files = find_model_files("org/name", revision, {"HF_HUB_CACHE": str(tmp_path / "cache")}, tmp_path)
        assert files.folder == snapshot
        missing = files.missing(needs_weights=True)
        assert missing is not None
        assert missing.message.endswith("is incomplete: no model-2.safetensors")
        assert files.missing(needs_weights=False) is None
    assert find_model_files("org/name", "nope", {"HF_HUB_CACHE": str(tmp_path / "cache")}, tmp_path).folder is None


def test_weights_that_are_cut_short_are_told_before_anything_starts(tmp_path: Path) -> None:
    bundled = BUNDLED_MODELS["tiny-oss"]
    (folder := tmp_path / "mine").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (folder / name).write_bytes((bundled / name).read_bytes())
    weights = folder / "model.safetensors"
    whole = weights.stat().st_size
    (tmp_path / "model_registry.yml").write_text("models: {mine: {model: ./mine, device: cpu}}\n")

    def blockers() -> tuple[HlaunchError, ...]:
        entry = resolve(load_registry(tmp_path / "model_registry.yml"), "mine", {})
        return make_plan(entry, BIG, {}, tmp_path / "state/instances/mine").blockers

    assert blockers() == ()
    for size, message in (
        (whole - 1, f"is cut short: {whole - 1} of {whole} bytes"),
        (100, "is cut short: 100 bytes, and its header alone has more"),
        (0, "is cut short: 0 bytes, and its header alone has more"),
    ):
        with weights.open("r+b") as file:
            file.truncate(size)
        (blocker,) = blockers()
        assert blocker.message == f"{weights} {message}"
        assert (blocker.exit_code, blocker.hint) == (
            5, "remove model.safetensors, then put all files of the checkpoint into this folder",
        )  # fmt: skip
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "Git LFS" in blockers()[0].message
    # What the header says wrongly is for the engine to tell.
    weights.write_bytes((2).to_bytes(8, "little") + b"[]")
    assert blockers() == ()


# The engine's start.


def test_the_engine_gets_only_declared_variables(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "tiny-oss", HF_TOKEN="canary", SECRET="canary", PATH="/bin", OMP_NUM_THREADS="2")
    environment = plan.environment_mapping
    assert "canary" not in environment.values()
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["OMP_NUM_THREADS"] == "2"
    assert {item.name: item.origin for item in plan.environment}["PATH"] == "inherited"


def test_argv_and_engine_json_are_what_will_be_used(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "tiny-oss", "max-num-seqs=4", "port=8123")
    config = tmp_path / "state/instances/tiny-oss/engine.json"
    assert plan.argv[1:] == ("-m", "engine.server", "--config", str(config), "--status-fd", "N")
    assert EngineConfig.from_json(plan.config.to_json()) == plan.config
    assert plan.config.scheduler.max_num_seqs == 4
    assert plan.config.server.port == 8123
    assert plan.config.server.served_model_names == ("tiny-oss", "tiny")
    assert plan.placement is not None
    assert plan.placement.is_single_rank
    assert not config.parent.exists(), "a plan writes nothing"


def test_a_launcher_without_the_engine_names_the_packages_and_the_command() -> None:
    from launcher.plan.environment import engine_packages_missing

    assert engine_packages_missing() is None
    error = engine_packages_missing(("json", "no_such_package"))
    assert error is not None
    assert "no_such_package" in error.message
    assert "json" not in error.message
    assert error.hint == "run: pip install 'hlaunch[engine]'"


def test_the_waterfall_places_a_phase_in_the_whole() -> None:
    from launcher.plan.drawing import span_bar

    assert span_bar(0.0, 5.0, 10.0, 10) == "█████·····"
    assert span_bar(5.0, 5.0, 10.0, 10) == "·····█████"
    assert span_bar(9.99, 0.001, 10.0, 10) == "·········▏"
    assert all(len(span_bar(b / 7, s / 5, 3.0, 30)) == 30 for b in range(21) for s in range(15))
