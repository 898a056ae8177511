"""What people see of the registry and of plans, as reviewed snapshots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from screens_support import SCREENS, Screens, masked, prepare, reviewed_names

REVIEWED = SCREENS / "plans"

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


DIGEST = masked(r"(executor, plan) [0-9a-f]{12}", r"\1 DIGEST")


@pytest.fixture
def screens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Screens:
    (tmp_path / "model_registry.yml").write_text(REGISTRY)
    (tmp_path / "broken.yml").write_text(BROKEN)
    (tmp_path / "host.json").write_text(json.dumps(HOST))
    prepare(tmp_path, monkeypatch)
    return Screens(tmp_path, REVIEWED, monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_screen_is_as_reviewed(name: str, screens: Screens) -> None:
    args, code = CASES[name]
    screens.check(name, args, code, DIGEST)


def test_every_reviewed_screen_is_of_a_case() -> None:
    assert reviewed_names(REVIEWED) == set(CASES)
