"""The folder that `hlaunch synth` writes: readable, the same from any number of threads, resumable, whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import model_helpers
import pytest
import torch

from engine.config import parse_model_config
from engine.models.checkpoint import Checkpoint
from engine.models.dummy import DummySource
from engine.models.gpt_oss_weights import expected_tensors
from engine.synthesis import writer
from engine.synthesis.__main__ import model_tensors
from engine.synthesis.stand_in import stand_in_tokenizer
from engine.synthesis.values import PIECE_BYTES
from engine.synthesis.writer import FolderTaken, Job, NoSpace, SyntheticTensor, write_synthetic
from engine.text import Tokenizer, chat_format_for

CONFIG = model_helpers.small_config()
SHARD_BYTES = 100_000


def job(folder: Path, **changes: Any) -> Job:
    plain = Job(
        folder, CONFIG, model_tensors(CONFIG), seed=5, model="small", shard_bytes=SHARD_BYTES, files={"a.txt": b"a"}
    )
    return replace(plain, **changes)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_written_checkpoint_is_what_dummy_weights_are(tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    outcome = write_synthetic(job(tmp_path), 2, lambda done, total: reports.append((done, total)))
    assert outcome.num_shards > 3
    assert outcome.written_bytes == job(tmp_path).weight_bytes == reports[-1][0] == reports[-1][1]
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    model = parse_model_config(json.loads((tmp_path / "config.json").read_text()))
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.check(expected_tensors(model))
    dummy = DummySource(model, 5)
    for name in expected_tensors(model):
        assert torch.equal(checkpoint.get(name), dummy.get(name)), name
    marker = json.loads((tmp_path / "synthetic.json").read_text())
    assert marker["synthetic"] is True
    assert marker["seed"] == 5
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".") or "unfinished" in path.name]


def test_safetensors_reads_the_files(tmp_path: Path) -> None:
    from safetensors import safe_open

    write_synthetic(job(tmp_path), 1)
    names = set()
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
            assert file.metadata() == {"format": "pt"}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert names == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(tensor.num_bytes for tensor in model_tensors(CONFIG))


def test_bytes_do_not_depend_on_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "TASK_BYTES", 4096)
    write_synthetic(job(tmp_path / "one"), 1)
    write_synthetic(job(tmp_path / "four"), 4)
    assert digests(tmp_path / "one") == digests(tmp_path / "four")
    write_synthetic(job(tmp_path / "other", seed=6), 4)
    assert digests(tmp_path / "other") != digests(tmp_path / "one")


def test_an_interrupted_job_keeps_its_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_synthetic(job(tmp_path / "whole"), 1)
    write_all, calls = writer._write_all, 0

    def breaks(file: int, data: Any, place: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 60:
            raise OSError(errno.EIO, "Input/output error")
        write_all(file, data, place)

    folder = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_all", breaks)
        with pytest.raises(OSError, match="Input/output"):
            write_synthetic(job(folder), 1)
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert kept
    assert not (folder / "config.json").exists()
    outcome = write_synthetic(job(folder), 2)
    assert 0 < outcome.resumed_bytes < job(folder).weight_bytes
    assert outcome.resumed_bytes + outcome.written_bytes == job(folder).weight_bytes
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    assert digests(folder) == digests(tmp_path / "whole")
    again = write_synthetic(job(folder), 1)
    assert (again.written_bytes, again.num_shards) == (0, outcome.num_shards)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("x")
    with pytest.raises(FolderTaken, match="is not empty: it holds thesis.txt"):
        write_synthetic(job(taken), 1)
    assert [path.name for path in taken.iterdir()] == ["thesis.txt"]
    with pytest.raises(FolderTaken, match="is a file"):
        write_synthetic(job(taken / "thesis.txt"), 1)
    folder = tmp_path / "own"
    write_synthetic(job(folder), 1)
    with pytest.raises(FolderTaken, match="holds a synthetic checkpoint of small, seed 5"):
        write_synthetic(job(folder, seed=6), 1)
    (folder / "config.json").unlink()
    (folder / "synthetic.json").rename(folder / "unfinished-synthetic.json")
    with pytest.raises(FolderTaken, match="an unfinished synthetic checkpoint of small, seed 5"):
        write_synthetic(job(folder, seed=6), 1)


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = writer.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(writer.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(NoSpace, match=r"0\.0 GB free"):
            write_synthetic(job(tmp_path / "a"), 1)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoSpace, match="No space left on device") as caught:
        write_synthetic(job(tmp_path / "b"), 1)
    assert "whole shards are kept" in caught.value.hint
    assert not list((tmp_path / "b").glob("*.safetensors"))


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """96 MiB through one thread: a handful of pieces at a time, not the tensor."""
    large = SyntheticTensor("model.embed_tokens.weight", (48, 1 << 20), "BF16")
    write_synthetic(job(tmp_path / "warm"), 1)
    tracemalloc.start()
    try:
        write_synthetic(job(tmp_path / "large", tensors=[large]), 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 * PIECE_BYTES


def test_the_stand_in_tokenizer_takes_text_and_names_every_id(tmp_path: Path) -> None:
    for name, content in stand_in_tokenizer(201088).items():
        (tmp_path / name).write_bytes(content)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.vocab_size == 201088
    text = "Grüße, <|end|> 世界"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(tokenizer.encode(text)) < 256
    assert len({tokenizer.token_bytes(i) for i in range(201088)}) == 201088
    assert tokenizer.special_ids["<|return|>"] == 200002
    assert set(chat_format_for("gpt_oss", tokenizer).stop_token_ids) == {200002, 200012, 199999}
    with pytest.raises(ValueError, match="does not hold Harmony's ids"):
        stand_in_tokenizer(1000)


def hlaunch(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "NO_COLOR": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", *args], cwd=cwd, env=environ, capture_output=True, text=True
    )


def test_synth_writes_a_checkpoint_that_the_engine_loads(tmp_path: Path) -> None:
    done = hlaunch("synth", "tiny-oss", "weights", "--seed", "3", "--layers", "2", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["seed"], facts["tokenizer"], facts["resumed_bytes"]) == (3, "copied", 0)
    from engine import LLM, SamplingParams

    llm = LLM(str(tmp_path / "weights"), cpu_threads=1, max_model_len=256)
    try:
        params = SamplingParams(max_tokens=4, ignore_eos=True, temperature=0)
        (result,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
    finally:
        llm.close()
    assert len(result.outputs[0].token_ids) == 4
    again = hlaunch("synth", "tiny-oss", "weights", "--seed", "3", "--layers", "2", "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["written_bytes"] == 0
    assert "held this very checkpoint already" in again.stderr


@pytest.mark.parametrize(
    ("args", "code", "cause"),
    [
        (("tiny-os", "x"), 4, "error: model 'tiny-os' is not in "),
        (("tiny-oss", "x", "--layers", "99"), 5, "error: tiny-oss has 6 layers, not 99"),
        (("tiny-oss", "."), 5, "is not empty: it holds here.txt"),
        (("tiny-oss", "x", "--seed", "-1"), 2, "error: Invalid value for '--seed'"),
    ],
)
def test_synth_refuses_in_one_line(tmp_path: Path, args: tuple[str, ...], code: int, cause: str) -> None:
    (tmp_path / "here.txt").write_text("x")
    done = hlaunch("synth", *args, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert cause in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
