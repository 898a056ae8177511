"""What people see of the registry and of plans, as reviewed snapshots of 80 columns: the same words with and without
colour.

To accept a change: ACCEPT_SCREENS=1 pytest tests/launcher/test_screens.py, then read the diff.
"""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import run

SCREENS = Path(__file__).with_name("screens")

REGISTRY = """\
version: 1
defaults: {gpu-memory-utilization: 0.9}
profiles: {long: {max-model-len: 131072}}
clusters:
  rack:
    fabric: {rdma: required}
    ray: {port: 6379}
    nodes:
      - {name: n1, role: head, ip: 10.0.0.1, gpus: 8, gpu-memory: 80GiB, cpus: 64, memory: 1TiB}
      - {name: n2, role: worker, ip: 10.0.0.2, gpus: 8, gpu-memory: 80GiB, cpus: 64, memory: 1TiB}
models:
  tiny: {model: tiny-oss, description: "bundled, runs on CPU", tags: [cpu]}
  big: {model: openai/gpt-oss-120b, cluster: rack, tp: 2, pp: 4, dp: 2, max-model-len: 32k, aliases: [b]}
  wide: {model: openai/gpt-oss-120b, cluster: rack, tp: 16, max-model-len: 32k}
  small: {model: openai/gpt-oss-20b, description: does not fit}
"""
BROKEN = """\
version: 1
models:
  a: {model: tiny-oss, max-num-seq: 4, dtype: float8}
  b: {model: tiny-oss, tp: 0, gpu-memory-utilization: 1.5}
  A: {model: -x}
"""
HOST = {
    "hlaunch_inventory": 1,
    "node": "host",
    "cpu_name": "Example CPU",
    "cpu_cores": 8,
    "numa_nodes": 1,
    "memory_total_bytes": 32 << 30,
    "memory_available_bytes": 24 << 30,
    "gpus": [],
}

CASES: dict[str, tuple[list[str], int]] = {
    "help": (["--help"], 0),
    "registry-help": (["registry", "--help"], 0),
    "list": (["list"], 0),
    "show": (["show", "big"], 0),
    "show-explain": (["show", "big", "--explain", "--profile", "long"], 0),
    "validate": (["validate"], 0),
    "validate-broken": (["validate", "broken.yml"], 3),
    "plan": (["plan", "tiny", "--inventory", "host.json"], 0),
    "plan-cluster": (["plan", "big"], 0),
    "plan-tensor-across-nodes": (["plan", "wide"], 0),
    "plan-does-not-fit": (["plan", "small", "--inventory", "host.json"], 6),
    "fit": (["fit", "tiny", "--inventory", "host.json"], 0),
    "topo": (["topo", "big"], 0),
    "unknown-model": (["plan", "tyni"], 4),
    "schema-keys": (["schema", "--keys"], 0),
    "registry-set": (["registry", "set", "big", "max-num-seqs=8", "--dry-run"], 0),
}


class Pipe(io.StringIO):
    """A stream that carries every character."""

    encoding = "utf-8"


class Terminal(Pipe):
    """One that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model_registry.yml").write_text(REGISTRY)
    (tmp_path / "broken.yml").write_text(BROKEN)
    (tmp_path / "host.json").write_text(json.dumps(HOST))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in list(os.environ):
        if name.startswith(("HLAUNCH_", "HF_", "XDG_", "NCCL_", "CUDA_", "NO_COLOR")):
            monkeypatch.delenv(name)
    return tmp_path


def shown(args: list[str], monkeypatch: pytest.MonkeyPatch, folder: Path, make: Any) -> tuple[str, int]:
    out, err = make(), make()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    code = run(args)
    text = out.getvalue() + ("--- messages\n" + err.getvalue() if err.getvalue() else "")
    for path, name in ((str(folder), "FOLDER"), (str(Path(__file__).parents[2]), "ROOT")):
        text = text.replace(path, name)
    text = re.sub(r"(executor, plan) [0-9a-f]{12}", r"\1 DIGEST", text)
    return re.sub(r"ROOT/\S*python\S*|/\S*/bin/python\S*", "PYTHON", text), int(code or 0)


@pytest.mark.parametrize("name", CASES)
def test_screen_is_as_reviewed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args, expected = CASES[name]
    with monkeypatch.context() as patch:
        plain, code = shown(args, patch, folder, Pipe)
    assert code == expected
    path = SCREENS / f"{name}.txt"
    if os.environ.get("ACCEPT_SCREENS"):
        path.write_text(plain)
    assert plain == path.read_text()
    pasted = re.compile(r"(FOLDER|PYTHON|ROOT)|^(error|hint|warning|info|note|  looked in|[\w.]+yml:\d+:)")
    wide = [line for line in plain.splitlines() if len(line) > 80 and not pasted.search(line)]
    assert wide == [] or name == "registry-set"  # a difference shows lines as they stand
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    with monkeypatch.context() as patch:
        coloured, _ = shown(args, patch, folder, Terminal)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


def test_every_reviewed_screen_is_of_a_case() -> None:
    assert {path.stem for path in SCREENS.glob("*.txt")} == set(CASES)
