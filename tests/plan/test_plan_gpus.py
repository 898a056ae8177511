"""Choosing a GPU: what auto takes, what cuda refuses and why, budgets, who holds the memory, what would fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from plan_support import shape

from launcher.errors import DoesNotFit, HlaunchError, PreflightError
from launcher.plan import LaunchPlan, gpus, make_plan
from launcher.plan.drawing import plan_data
from launcher.plan.gpus import choose_device, driver_problem, gpu_packages_missing, visible_gpus
from launcher.plan.inventory import Finding, Gpu, GpuProcess, Inventory
from launcher.registry import load_registry, resolve

GIB = 1 << 30
H100 = Gpu(0, "NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, (9, 0), "0000:3b:00.0", "GPU-aa")
T4 = Gpu(0, "Tesla T4", 15 * GIB, 15 * GIB, (7, 5), uuid="GPU-t4")
HOST = Inventory(
    "host", "CPU", 16, 1, 256 * GIB, 200 * GIB, (H100,), driver_version="580.65.06", torch_cuda="13.0", source="saved"
)
REGISTRY = """\
models:
  oss20: {model: openai/gpt-oss-20b, max-num-seqs: 64, max-num-batched-tokens: 8192}
  oss120: {model: openai/gpt-oss-120b, max-num-seqs: 8}
  tiny: {model: tiny-oss}
"""


def plan_of(folder: Path, name: str, *overrides: str, inventory: Inventory = HOST, **environ: str) -> LaunchPlan:
    path = folder / "model_registry.yml"
    path.write_text(REGISTRY)
    entry = resolve(load_registry(path), name, environ, overrides)
    return make_plan(entry, inventory, environ, folder / "state" / entry.name)


def test_auto_takes_the_gpu(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "oss20")
    assert plan.config.device == "cuda:0"
    assert plan.config.cache.gpu_memory_utilization == 0.9
    assert plan.problems == ()
    assert plan.notes == ()
    assert plan.placement is not None
    assert plan.placement.ranks[0].device == "cuda:0"
    assert plan.fit is not None
    assert plan.fit.fits
    assert plan.fit.dtype == plan.fit.kv_dtype == "bfloat16"
    assert plan.fit.memory.budget_bytes == int(0.9 * 80 * GIB)
    # 12.8 GiB of checkpoint, scales twice (0.57 GiB of them), and little else.
    assert 13.2 < plan.fit.memory.weight_bytes / GIB < 13.6
    assert plan.fit.memory.max_full_requests > 10


def test_cpu_and_other_machines_stay_as_they_were(tmp_path: Path) -> None:
    assert plan_of(tmp_path, "tiny", "device=cpu").config.device == "cpu"
    plan = plan_of(tmp_path, "tiny", inventory=replace(HOST, gpus=()))
    assert plan.config.device == "cpu"
    assert plan.notes == ()


@pytest.mark.parametrize(
    ("inventory", "said", "kind", "hint"),
    [
        (replace(HOST, gpus=(T4,)), "GPU 0 (Tesla T4) has compute capability 7.5", DoesNotFit, "device=cpu"),
        (
            replace(HOST, driver_version="570.86.15"),
            "driver 570.86.15 is too old for torch's CUDA 13.0: it needs 580 or newer",
            PreflightError,
            "update the driver, or install torch for CUDA 12",
        ),
        (
            replace(HOST, driver_version="520.61", torch_cuda="12.8"),
            "it needs 525.60 or newer",
            PreflightError,
            "install torch for CUDA 11",
        ),
        (
            replace(
                HOST,
                gpus=(Gpu(0, "NVIDIA GPU"),),
                findings=(Finding("nvml-missing", "their memory cannot be read", "run: pip install nvidia-ml-py"),),
            ),
            "their memory cannot be read",
            PreflightError,
            "pip install nvidia-ml-py",
        ),
        (replace(HOST, gpus=(Gpu(0, "NVIDIA GPU"),)), "the driver tells no capability", PreflightError, "update"),
    ],
)
def test_a_gpu_that_cannot_serve_is_refused_or_passed_over(
    tmp_path: Path, inventory: Inventory, said: str, kind: type[HlaunchError], hint: str
) -> None:
    demanded = plan_of(tmp_path, "oss20", "device=cuda", inventory=inventory)
    found = [error for error in (*demanded.problems, *demanded.blockers) if said in error.message]
    assert [type(error) for error in found] == [kind]
    assert hint in found[0].hint
    automatic = plan_of(tmp_path, "tiny", inventory=inventory)
    assert automatic.config.device == "cpu"
    (note,) = automatic.notes
    assert note.startswith("device auto runs on CPU: ")
    assert said in note


def test_the_second_gpu_serves_when_the_first_cannot(tmp_path: Path) -> None:
    both = replace(HOST, gpus=(T4, replace(H100, index=1)))
    assert plan_of(tmp_path, "oss20", inventory=both).config.device == "cuda:1"
    assert plan_of(tmp_path, "oss20", inventory=both, CUDA_VISIBLE_DEVICES="1,0").config.device == "cuda:0"


def test_visible_devices_are_cudas(tmp_path: Path) -> None:
    several = tuple(replace(H100, index=i, uuid=f"GPU-{i}{i}") for i in range(4))

    def seen(text: str) -> list[int]:
        return [gpu.index for gpu in visible_gpus(several, {"CUDA_VISIBLE_DEVICES": text})]

    assert [gpu.index for gpu in visible_gpus(several, {})] == [0, 1, 2, 3]
    assert seen("2,0") == [2, 0]
    assert seen("GPU-33,1") == [3, 1]
    assert seen("1,9,2") == [1], "CUDA stops at the first that is none"
    assert seen("") == seen("-1") == seen("1x") == seen("²") == seen("9" * 5000) == []
    assert seen("1,1") == [1]
    hidden = plan_of(tmp_path, "oss20", "device=cuda", CUDA_VISIBLE_DEVICES="-1")
    assert "(CUDA_VISIBLE_DEVICES=-1 hides all)" in hidden.problems[0].message


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    error = gpu_packages_missing("13.0", {"json": "json", "no_such_module": "no-such-package"})
    assert error is not None
    assert error.message == "a GPU needs packages that are not installed: no-such-package"
    assert error.hint.startswith("run: pip install no-such-package")
    without = gpu_packages_missing("", {"json": "json"})
    assert without is not None
    assert without.message == "the installed torch was built without CUDA"
    assert gpu_packages_missing("13.0", {"json": "json"}) is None
    # Only of this host: what another machine has installed is not known here.
    monkeypatch.setattr(gpus, "gpu_packages_missing", lambda _: PreflightError("no packages"))
    assert gpus.gpu_problem(H100, HOST) is None
    here = gpus.gpu_problem(H100, replace(HOST, source="this host"))
    assert here is not None
    assert here.message == "no packages"


@pytest.mark.parametrize(
    ("driver", "cuda", "is_fine"),
    [
        ("580.65.06", "13.0", True),
        ("579.99", "13.0", False),
        ("600.1", "13.1", True),
        ("525.60.13", "12.4", True),
        ("525.59", "12.4", False),
        ("", "13.0", True),
        ("470.1", "", True),
        ("470.1", None, True),
        ("999.1", "99.0", True),
    ],
)
def test_one_table_says_which_driver_does(driver: str, cuda: str | None, is_fine: bool) -> None:
    assert (driver_problem(replace(HOST, driver_version=driver, torch_cuda=cuda)) is None) is is_fine


def test_a_model_without_mxfp4_stays_on_the_cpu() -> None:
    plain = replace(shape(), quantization="none")
    assert choose_device("auto", HOST, {}, plain).device == "cpu"
    (problem,) = choose_device("cuda", HOST, {}, plain).problems
    assert "MXFP4" in problem.message


@pytest.mark.parametrize("override", ["dtype=float32", "kv-cache-dtype=float32"])
def test_a_gpu_computes_in_bfloat16(tmp_path: Path, override: str) -> None:
    plan = plan_of(tmp_path, "oss20", override)
    assert plan.problems[0].message.endswith(": a GPU rank computes in bfloat16")


# Memory.


def test_memory_that_others_hold_is_named(tmp_path: Path) -> None:
    held = (GpuProcess(42, "vllm", 60 * GIB), GpuProcess(7, "python", 0))
    busy = replace(HOST, gpus=(replace(H100, free_bytes=19 * GIB, processes=held),))
    plan = plan_of(tmp_path, "oss20", inventory=busy)
    (note,) = plan.notes
    assert note == ("GPU 0: 61.0 of 80.0 GiB are held by vllm (pid 42, 60.0 GiB), python (pid 7); 19.0 GiB are left")
    assert plan.fit is not None
    assert plan.fit.memory.budget_bytes == 19 * GIB
    full = replace(HOST, gpus=(replace(H100, free_bytes=2 * GIB, processes=held),))
    refused = plan_of(tmp_path, "oss20", inventory=full)
    assert "2.0 GiB are available" in refused.problems[0].message
    assert any("vllm (pid 42" in line for line in refused.problems[0].details)


def test_a_share_that_is_too_small_says_which_would_do(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "oss20", "gpu-memory-utilization=0.2")
    (problem,) = plan.problems
    assert isinstance(problem, DoesNotFit)
    first = plan.fit.suggestions[0].settings if plan.fit is not None else ()
    assert first[0][0] == "gpu-memory-utilization"
    assert f"--set gpu-memory-utilization={first[0][1]}" in problem.hint
    again = plan_of(tmp_path, "oss20", f"gpu-memory-utilization={first[0][1]}")
    assert again.problems == ()
    less = f"gpu-memory-utilization={float(first[0][1]) - 0.01:.2f}"
    assert plan_of(tmp_path, "oss20", less).problems, "the smallest that fits"


def test_a_gpu_that_is_too_small_is_told_what_it_takes(tmp_path: Path) -> None:
    small = replace(HOST, gpus=(replace(H100, memory_bytes=24 * GIB, free_bytes=24 * GIB),))
    (problem,) = plan_of(tmp_path, "oss120", inventory=small).problems
    assert problem.hint.startswith("no setting helps: this needs a GPU with 71.4 GiB free")


def test_unified_memory_leaves_what_the_entry_wants_free(tmp_path: Path) -> None:
    gb10 = replace(
        H100, name="NVIDIA GB10", memory_bytes=120 * GIB, free_bytes=100 * GIB, is_unified=True, capability=(9, 0)
    )
    host = replace(HOST, gpus=(gb10,), memory_total_bytes=120 * GIB, memory_available_bytes=100 * GIB)
    plan = plan_of(tmp_path, "oss20", inventory=host)
    assert plan.fit is not None
    assert plan.fit.memory.budget_bytes <= 100 * GIB
    smaller = plan_of(tmp_path, "oss20", "gpu-memory-utilization=0.35", inventory=host)
    assert smaller.fit is not None
    assert smaller.fit.memory.budget_bytes == int(0.35 * 120 * GIB)


def test_the_plan_as_data_names_the_gpu(tmp_path: Path) -> None:
    data = plan_data(plan_of(tmp_path, "oss20"))
    assert data["placement"][0]["device"] == "cuda:0"
    assert data["engine_config"]["device"] == "cuda:0"
    assert data["fit"]["fits"] is True
