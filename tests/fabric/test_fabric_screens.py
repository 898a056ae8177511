"""What people see, as reviewed snapshots of 80 columns: the same words with and without colour.

To accept a change: ACCEPT_SCREENS=1 pytest tests/fabric/test_fabric_screens.py, then read the diff.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
from trees import EMPTY_GID, healthy

from launcher.cli import run

SCREENS = Path(__file__).with_name("screens")

REGISTRY = """\
version: 1
clusters:
  spark-pair:
    platform: gb10
    fabric: {rdma: required, subnet: 192.168.100.0/24, mtu: 9000, tc: 106}
    ray: {port: 6379}
    env: {NCCL_DEBUG: TRACE, NCCL_IB_TIMOUT: "23"}
    nodes:
      - {name: spark-01, role: head, ip: 192.168.100.1, ssh: spark-01, gpus: 1, ifname: enP2p1s0f0np0,
         hcas: [rocep1s0f0, roceP2p1s0f0]}
      - {name: spark-02, role: worker, ip: 192.168.100.2, ssh: spark-02, gpus: 1, ifname: enP2p1s0f0np0,
         hcas: [rocep1s0f0, roceP2p1s0f0]}
models:
  gpt-oss-20b: {model: openai/gpt-oss-20b, cluster: spark-pair}
"""

CASES = {
    "doctor": ["doctor", "gpt-oss-20b", "--root", "trees"],
    "env": ["env", "gpt-oss-20b"],
    "env-node": ["env", "gpt-oss-20b", "--node", "spark-02"],
    "explain": ["env", "gpt-oss-20b", "--explain", "NCCL_IB_HCA"],
    "lint": ["env", "gpt-oss-20b", "--lint"],
    "firewall": ["doctor", "--cluster", "spark-pair", "--node", "spark-01", "--print-firewall", "--firewall", "nft"],
}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model_registry.yml").write_text(REGISTRY)
    healthy(tmp_path / "trees/spark-01", 1)
    second = healthy(tmp_path / "trees/spark-02", 2)
    second.set("sys/class/net/enP2p1s0f0np0/mtu", "1500\n")
    second.set("etc/nccl.conf", "NCCL_IB_TC=8\n")
    second.set("sys/class/infiniband/roceP2p1s0f0/ports/1/state", "1: DOWN\n")
    second.gid("rocep1s0f0", 3, EMPTY_GID, "", "")
    second.listen(6380, 4242, "redis-server *:6380")
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("NCCL_", "RAY_", "GLOO_", "UCX_", "CUDA_", "HLAUNCH_", "NO_COLOR")):
            monkeypatch.delenv(name)
    return tmp_path


def screen(args: list[str], monkeypatch: pytest.MonkeyPatch, stream: Any) -> str:
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    run(args)
    text: str = stream.getvalue()
    return text


@pytest.mark.parametrize("name", CASES)
def test_screen_is_as_reviewed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        plain = screen(CASES[name], patch, io.StringIO())
    path = SCREENS / f"{name}.txt"
    if os.environ.get("ACCEPT_SCREENS"):
        path.write_text(plain)
    assert plain == path.read_text()
    for line in plain.splitlines():
        assert len(line) <= 80 or line.startswith(("  fix: ", "sudo "))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    with monkeypatch.context() as patch:
        coloured = screen(CASES[name], patch, Terminal())
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    assert "\x1b[" in coloured or name == "firewall"
