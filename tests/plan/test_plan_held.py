"""The plan's memory against what a CPU rank really holds, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config import BUNDLED_MODELS, EngineConfig, SchedulerConfig, load_model_config
from kernels.cpu import moe, packing
from launcher.plan import held
from launcher.plan.fit import rank_weight_bytes, report_fit

ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("held_child.py")


@pytest.mark.parametrize("form", ["expand", "pack"])
def test_the_estimate_is_within_three_percent_of_what_is_held(form: str) -> None:
    result = subprocess.run(
        [sys.executable, str(CHILD), "tiny-oss", form],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    real = json.loads(result.stdout)
    model = load_model_config(BUNDLED_MODELS["tiny-oss"])
    weights = rank_weight_bytes(
        model,
        None,
        is_gpu=False,
        dtype="float32",
        is_expanded=form == "expand",
        num_positions=model.max_position_embeddings,
    )
    assert weights == pytest.approx(real["weight_bytes"], rel=0.03)
    assert weights == pytest.approx(real["loaded"], rel=0.03)
    config = EngineConfig(
        "tiny-oss", cpu_threads=2, scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=512)
    )
    report = report_fit(config, model, None, 32 << 30)
    assert real["table_bytes"] <= report.held.table_bytes
    # Second layouts are made when first used, and not every expert meets every size of step.
    in_use = real["served"] - real["kv_bytes"]
    upper = weights + report.held.total + report.memory.activation_bytes
    assert weights < in_use < 1.03 * upper


def test_the_rules_are_the_kernels() -> None:
    assert held.MAX_PACKED_BYTES == packing.MAX_PACKED_BYTES == moe.MAX_PACKED_BYTES
    assert held.SERIAL_WORK == packing.SERIAL_WORK
