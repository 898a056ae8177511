"""The plan's memory against what real CPU engines take, each in a process of its own, driven to its limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import cpu_memory
from engine.config import BUNDLED_MODELS, load_model_config
from engine.cpu_memory import CpuLimits, HalfExact
from engine.exactness import half_exact_of_dummies, half_exact_of_files
from engine.models.checkpoint import Checkpoint
from engine.models.dummy import DummySource
from kernels.cpu import attention, moe, packing

ROOT = Path(__file__).parents[2]
TINY = load_model_config(BUNDLED_MODELS["tiny-oss"])
LIMITS = CpuLimits(
    dtype="float32",
    kv_dtype="float32",
    is_expanded=True,
    block_size=16,
    max_model_len=2048,
    max_num_seqs=16,
    max_num_batched_tokens=2048,
)


@pytest.mark.parametrize("case", ["tiny-oss", "tiny-oss-defaults", "true-widths-dummy", "true-widths-checkpoint"])
def test_the_estimate_is_within_three_percent_of_what_is_taken(case: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "memory_estimate.py"), "--json", "--case", case],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=280,
    )
    (result,) = json.loads(done.stdout)
    planned, measured = result["planned"], result["measured"]
    assert planned["weight_bytes"] == pytest.approx(measured["weight_bytes"], rel=0.001)
    assert planned["kv_bytes"] == measured["kv_bytes"]
    assert result["ratio"] == pytest.approx(1.0, abs=0.03), result


def test_the_rules_are_the_kernels() -> None:
    assert cpu_memory.MAX_PACKED_BYTES == packing.MAX_PACKED_BYTES == moe.MAX_PACKED_BYTES
    assert cpu_memory.SERIAL_WORK == packing.SERIAL_WORK
    assert cpu_memory.MAX_GATHERED_BYTES == attention.MAX_GATHERED_BYTES
    assert cpu_memory.SINGLE_ROWS == attention.SINGLE_ROWS
    assert cpu_memory.QUERY_TILE == attention.QUERY_TILE
    assert cpu_memory.TILE_TOKENS == moe.TILE_TOKENS


def test_what_float16_holds_is_told_from_a_few_values() -> None:
    files = half_exact_of_files(BUNDLED_MODELS["tiny-oss"])
    source = Checkpoint.open(BUNDLED_MODELS["tiny-oss"])
    names = {"qkv": "self_attn.q_proj", "out": "self_attn.o_proj"}
    for kind, name in names.items():
        weight = source.get(f"model.layers.0.{name}.weight").float()
        assert getattr(files, kind) == packing.half_is_exact(weight), kind
    assert files.head == packing.half_is_exact(source.get("lm_head.weight").float())


@pytest.mark.parametrize("hidden", [224, 2880])
def test_what_float16_holds_of_made_up_weights_follows_from_their_size(hidden: int) -> None:
    model = replace(TINY, hidden_size=hidden, num_layers=1, layer_windows=(None,))
    source, told = DummySource(model), half_exact_of_dummies(model)
    assert told.qkv == packing.half_is_exact(source.get("model.layers.0.self_attn.q_proj.weight").float())
    assert told.out == packing.half_is_exact(source.get("model.layers.0.self_attn.o_proj.weight").float())
    assert told.head == packing.half_is_exact(source.get("lm_head.weight").float())


def test_files_that_cannot_be_read_count_as_not_exact(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    assert half_exact_of_files(tmp_path) == HalfExact()
    assert half_exact_of_files(tmp_path / "nothing") == HalfExact()


def test_weights_that_float16_does_not_hold_take_a_layout_in_float32() -> None:
    without = cpu_memory.cpu_memory(TINY, LIMITS)
    exact = cpu_memory.cpu_memory(TINY, replace(LIMITS, half_exact=HalfExact(qkv=True, out=True, head=True)))
    assert exact.primitive_bytes == 0 < without.primitive_bytes
    one = cpu_memory.half_layout_bytes(640, 224, threads=1)
    assert one == 2 * 640 * 512
    assert cpu_memory.half_layout_bytes(640, 224, threads=2) == 2 * one
    assert cpu_memory.half_layout_bytes(5120, 2880, threads=2) == 2 * 5120 * 3072


def test_a_longer_context_takes_more_of_everything_but_weights() -> None:
    short, long = (cpu_memory.cpu_memory(TINY, replace(LIMITS, max_model_len=length)) for length in (2048, 65536))
    assert long.packed_bytes == short.packed_bytes
    assert long.table_bytes > 30 * short.table_bytes
    assert long.gathered_bytes > 20 * short.gathered_bytes
    assert long.activation_bytes > short.activation_bytes


def test_a_weight_is_compared_with_float16_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(40, 30)
    weight[39, 29] = 1 + 2.0**-12
    for piece in (1 << 18, 64):
        monkeypatch.setattr(packing, "_PIECE", piece)
        assert not packing.half_is_exact(weight)
        assert not packing.half_is_exact(weight.t().contiguous().t())
        assert packing.half_is_exact(weight[:39])
