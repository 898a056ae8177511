"""What people see of the registry and of plans, as reviewed snapshots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from screens_support import SCREENS, Screens, masked, prepare, reviewed_names, same_width

from launcher.cli import run

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
VLLM = """\
model: openai/gpt-oss-20b
served-model-name: gpt
max-model-len: 8192
gpu-memory-utilization: 0.85
disable-log-requests: true
swap-space: 4
"""
SERVE = "vllm serve openai/gpt-oss-120b --tensor-parallel-size 2 --port 9000 --enforce-eager --api-key secret-of-mine"
MIXVLLM = """\
models:
  gpt-oss-20b:
    model: openai/gpt-oss-20b
    gpu_memory_utilization: 0.9
    trust_remote_code: true
    env: {NCCL_DEBUG: INFO}
"""
DOTENV = "HEAD_NODE_IP=10.0.0.1\nHF_TOKEN=hf_canary\nNCCL_SOCKET_IFNAME=eth0\n"
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
LINK = {"kind": "nvlink", "lanes": 18, "detail": ""}
GPU_HOST = {
    **HOST,
    "node": "dgx",
    "cpu_cores": 112,
    "numa_nodes": 2,
    "memory_total_bytes": 2 << 40,
    "memory_available_bytes": 1900 << 30,
    "cpu_features": ["AVX2", "AVX-512", "AVX-512 bf16", "AMX"],
    "driver_version": "580.82.07",
    "torch_cuda": "13.0",
    "memory_bandwidth": 412.5e9,
    "gpus": [
        {"index": i, "name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 << 30, "free_bytes": (79 - i) << 30,
         "capability": [9, 0], "bus_id": f"0000:{0x19 + i:02x}:00.0", "numa_node": 0,
         "links": [{"peer": 1 - i, **LINK}]}
        for i in range(2)
    ],
    "rdma_ports": [
        {"device": "mlx5_0", "port": 1, "state": "ACTIVE", "link_layer": "Ethernet", "rate_gbps": 400.0,
         "netdev": "eth2"},
    ],
    "nics": [
        {"name": "eth0", "state": "up", "speed_gbps": 25.0, "mtu": 1500, "addresses": ["10.0.0.1"]},
        {"name": "eth2", "state": "up", "speed_gbps": 400.0, "mtu": 9000, "addresses": ["192.168.100.1"]},
    ],
    "findings": [
        {"code": "ib-port-down", "message": "mlx5_1 port 1 is DOWN", "fix": "sudo ip link set eth3 up"},
    ],
}  # fmt: skip

CASES: dict[str, tuple[list[str], int]] = {
    "list": (["list"], 0),
    "show": (["show", "big"], 0),
    "show-explain": (["show", "big", "--explain", "--profile", "long"], 0),
    "init-again": (["init"], 2),
    "completion": (["completion", "bash"], 0),
    "completion-unknown": (["completion", "tcsh"], 2),
    "restart-not-running": (["restart", "tiny"], 1),
    "elsewhere": (["compose", "tiny"], 2),
    "elsewhere-option": (["topo", "tiny", "--format", "mermaid"], 2),
    "validate": (["validate"], 0),
    "validate-broken": (["validate", "broken.yml"], 3),
    "plan": (["plan", "tiny", "--inventory", "host.json"], 0),
    "plan-cluster": (["plan", "big"], 0),
    "plan-tensor-across-nodes": (["plan", "wide"], 0),
    "plan-does-not-fit": (["plan", "small", "--inventory", "host.json"], 6),
    "fit": (["fit", "tiny", "--inventory", "host.json"], 0),
    "topo": (["topo", "big"], 0),
    "topo-case": (["topo", "big", "--case", "3"], 0),
    "topo-case-too-large": (["topo", "tiny", "--case", "7"], 6),
    "unknown-model": (["plan", "tyni"], 4),
    "schema-keys": (["schema", "--keys"], 0),
    "plan-diff": (["plan", "big", "--diff", "--against", "deploy", "--set", "max-num-seqs=8"], 0),
    "render": (["render", "big", "-o", "written"], 0),
    "render-check": (["render", "big", "-o", "deploy", "--check", "--set", "max-num-seqs=8"], 10),
    "render-no-cluster": (["render", "tiny"], 2),
    "inventory": (["inventory", "--inventory", "dgx.json"], 0),
    "inventory-cluster": (["inventory", "--cluster", "rack"], 0),
    "import-vllm-config": (["import", "vllm-config", "config.yaml"], 0),
    "import-vllm-serve": (["import", "vllm-serve", SERVE], 0),
    "import-mixvllm": (["import", "mixvllm", "mixvllm.yml", "--env", "mixvllm.env"], 0),
    "import-written": (["import", "vllm-config", "config.yaml", "-o", "new.yml", "--force"], 0),
    "explain": (["explain", "--kernels", "tiny", "--device", "cuda", "--op", "paged_attention"], 0),
    "explain-what": (["explain"], 2),
    "registry-add": (["registry", "add", "mine", "--model", "tiny-oss", "--set", "tp=2", "--dry-run"], 0),
    "registry-set": (["registry", "set", "big", "max-num-seqs=8", "--dry-run"], 0),
}


DIGEST = masked(r"(executor, plan) [0-9a-f]{12}", r"\1 DIGEST")
WHOLE_DIGEST = same_width(r"\b[0-9a-f]{64}\b", "DIGEST")


@pytest.fixture
def screens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Screens:
    (tmp_path / "model_registry.yml").write_text(REGISTRY)
    (tmp_path / "broken.yml").write_text(BROKEN)
    (tmp_path / "host.json").write_text(json.dumps(HOST))
    (tmp_path / "dgx.json").write_text(json.dumps(GPU_HOST))
    (tmp_path / "config.yaml").write_text(VLLM)
    (tmp_path / "mixvllm.yml").write_text(MIXVLLM)
    (tmp_path / "mixvllm.env").write_text(DOTENV)
    prepare(tmp_path, monkeypatch)
    return Screens(tmp_path, REVIEWED, monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_screen_is_as_reviewed(name: str, screens: Screens) -> None:
    args, code = CASES[name]
    if "deploy" in args:
        assert run(["render", "big", "-o", "deploy"]) == 0
    screens.check(name, args, code, DIGEST, WHOLE_DIGEST)


def test_every_reviewed_screen_is_of_a_case() -> None:
    assert reviewed_names(REVIEWED) == set(CASES)
