"""`hlaunch explain --kernels`: the registry's own choice, with the reason for each kernel that does not run."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.config import parse_model_config
from engine.kernel_report import kernel_report
from kernels.ops import ALL_OPS, Platform
from kernels.stages import BANDS, PREFILL_TOKENS_PER_EXPERT, STAGES
from launcher.plan.known_models import KNOWN_CONFIGS

ROOT = Path(__file__).resolve().parents[2]


def explain(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", "explain", *args],
        cwd=ROOT,
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_op_has_one_kernel_and_a_reason_for_each_other(device: str) -> None:
    report = kernel_report(Platform(device, torch.float32))  # type: ignore[arg-type]
    assert [op["op"] for op in report["ops"]] == [op.name for op in ALL_OPS]
    for op, known in zip(report["ops"], ALL_OPS, strict=True):
        assert [line["selected"] for line in op["candidates"]] == [True] + [False] * (len(known.specs) - 1)
        assert {line["kernel"] for line in op["candidates"]} == {spec.name for spec in known.specs}
        assert all(line["reason"] for line in op["candidates"])


def test_a_cpu_kernel_is_ruled_out_on_a_gpu_by_name() -> None:
    (op,) = kernel_report(Platform("cuda", torch.bfloat16), op="moe_add")["ops"]
    assert op["candidates"][0]["kernel"] == "reference"
    assert {"kernel": "cpu_packed", "band": "SPECIALIZED", "selected": False, "reason": "for CPUs, not cuda"} in op[
        "candidates"
    ]


def test_every_stage_on_a_gpu_names_kernels_and_twins_that_exist() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "kernels").rglob("*") if path.suffix in (".py", ".cu"))
    borders = [(band.low, band.high) for band in BANDS]
    assert borders[0][0] == 1
    assert borders[-1][1] is None
    assert all(high + 1 == low for (_, high), (low, _) in itertools.pairwise(borders) if high is not None)
    for stage in STAGES:
        module, _, function = stage.twin.rpartition(".")
        assert callable(getattr(importlib.import_module(module), function)), stage.twin
        assert len(stage.kernels) == len(BANDS)
        for names, language in stage.kernels:
            for name in names.split(", "):
                if language in ("torch", "cuBLAS") and name in ("linear", "index_select"):
                    continue
                pattern = rf"KERNEL\([^)]*\)\s*{name}\(" if language == "CUDA C++" else rf"def {name}\("
                assert re.search(pattern, sources), (stage.name, name, language)


def test_the_bands_are_those_of_the_runner() -> None:
    # Read, not imported: the runner needs Triton.
    runner = (ROOT / "engine/worker/gpu_decode.py").read_text()
    assert "SMALL = gpu.BATCH_SIZES" in runner
    assert re.search(rf"^LARGE = \(.*, {BANDS[2].high}\)$", runner, re.MULTILINE)
    router = (ROOT / "kernels/triton/router.py").read_text()
    assert f"mean < {PREFILL_TOKENS_PER_EXPERT} else 256" in router


def test_shapes_are_the_models() -> None:
    model = parse_model_config(KNOWN_CONFIGS["openai/gpt-oss-20b"])
    shapes = {op["op"]: op["shape"] for op in kernel_report(Platform("cpu", torch.float32), model)["ops"]}
    assert shapes["qkv_project"]["weight"] == "[5120, 2880]"
    assert shapes["linear_add"]["weight"] == "[2880, 4096]"
    assert shapes["paged_attention"]["query"] == "[T, 64, 64]"
    assert shapes["logits"]["weight"] == "[201088, 2880]"
    assert shapes["router_topk"]["weight"] == "[32, 2880]"


def test_the_command_draws_a_table_of_80_columns_and_gives_the_same_as_json() -> None:
    done = explain("--kernels", "tiny-oss")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "kernels on cpu/float32, sizes of tiny-oss"
    assert max(map(len, lines)) <= 80
    assert any(line.split()[:3] == ["moe_add", "*", "cpu_packed"] for line in lines)
    data = json.loads(explain("--kernels", "--json", "--op", "moe_add").stdout)
    assert data["platform"] == "cpu/float32"
    assert [op["op"] for op in data["ops"]] == ["moe_add"]


@pytest.mark.parametrize(
    ("args", "code", "cause"),
    [
        ((), 2, "error: explain what?"),
        (("--kernels", "--device", "tpu"), 2, "error: --device tpu: expected cpu or cuda"),
        (("--kernels", "--dtype", "int8"), 2, "error: --dtype int8"),
        (("--kernels", "--op", "conv"), 2, "error: no such op: conv; ops: rms_norm"),
        (("--kernels", "tiny-os"), 4, "error: model 'tiny-os' is not in"),
    ],
)
def test_it_refuses_in_one_line(args: tuple[str, ...], code: int, cause: str) -> None:
    done = explain(*args)
    assert done.returncode == code
    assert done.stderr.startswith(cause)
