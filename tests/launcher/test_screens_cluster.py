"""What people see of a launch on two nodes, as reviewed snapshots: all is real but what is behind ssh."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from screens_support import ROOT, SCREENS, Pipe, Screens, masked, prepare, reviewed_names
from trees import healthy

from launcher.fabric.collector.main import collect

REVIEWED = SCREENS / "cluster"
STAND_IN = ROOT / "tests/fabric/stand_in_node.py"
NAMES = ("spark-01", "spark-02")
UP = ["up", "gpt", "--runtime", "process"]

REGISTRY = """\
version: 1
clusters:
  pair:
    platform: hopper
    fabric: {rdma: required, subnet: 192.168.100.0/24}
    ray: {port: 6379}
    nodes:
      - {name: spark-01, role: head, ip: 192.168.100.1, ssh: one, gpus: 1, gpu-memory: 80GiB, ifname: enP2p1s0f0np0,
         hcas: [rocep1s0f0, roceP2p1s0f0]}
      - {name: spark-02, role: worker, ip: 192.168.100.2, ssh: two, gpus: 1, gpu-memory: 80GiB, ifname: enP2p1s0f0np0,
         hcas: [rocep1s0f0, roceP2p1s0f0]}
models:
  gpt: {model: tiny-oss, cluster: pair, pp: 2, host: 192.168.100.1, insecure-no-auth: true, ready: {timeout: 60s}}
"""
NCCL = "engine: host:4:7 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via NET/{}/0\n"
FULL = "engine: No space left on device\n"
TOOK = masked(r"after \d+\.\d s$", "after N.N s")


def phase(name: str, seconds: float, detail: str = "") -> dict[str, Any]:
    return {"name": name, "state": "end", "seconds": seconds, "detail": detail}


HEAD = {
    "url": "http://192.168.100.1:8000",
    "uptime_seconds": 11520.0,
    "facts": {"max_model_len": 131072},
    "phases": [
        phase("ray", 2.31, "192.168.100.1 joined"),
        phase("nodes", 1.87, "2 of 2"),
        phase("import", 4.05, "torch"),
        phase("load", 11.62, "6.9 GiB of weights on 2 ranks"),
        phase("kv", 0.21, "33214 blocks, 64.9 full requests"),
        phase("warmup", 3.4),
    ],
    "events": [{"age_seconds": 4211.0, "text": "worker spark-02 (192.168.100.2) was restarted and joined again"}],
    "environment": {"NCCL_IB_HCA": "=rocep1s0f0", "NCCL_DEBUG": "INFO", "NCCL_SOCKET_IFNAME": "=enP2p1s0f0np0"},
}
WORKER = {
    "phases": [phase("head", 1.1, "spark-01 at 192.168.100.1:6379"), phase("ray", 2.02, "192.168.100.2 joined")],
    "previous": {"restarts": 1, "cause": "Ray's raylet died: killed by SIGKILL"},
    "environment": {"NCCL_IB_HCA": "=roceP2p1s0f0", "NCCL_DEBUG": "WARN", "NCCL_SOCKET_IFNAME": "=enP2p1s0f0np0"},
}


def node_by_node(text: str) -> str:
    """Two nodes report side by side: put what each said together."""
    return re.sub(
        r"(?:^  spark-.*\n)+", lambda told: "".join(sorted(told[0].splitlines(True), key=_node)), text, flags=re.M
    )


def _node(line: str) -> str:
    return line.split()[0]


class Nodes:
    """Two stand-ins for nodes: what each reports, and what stands in its log."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        (folder / "model_registry.yml").write_text(REGISTRY)
        ssh = folder / "ssh"
        ssh.write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} {folder} "$@"\n')
        ssh.chmod(0o755)
        prepare(folder, monkeypatch, HLAUNCH_SSH=str(ssh), PYTHONPATH=str(ROOT))
        self.screens = Screens(folder, REVIEWED, monkeypatch)
        self.facts = collect(healthy(folder / "tree", 1).root)

    def say(self, head: Mapping[str, Any], worker: Mapping[str, Any], transport: str = "IB", last: str = "") -> None:
        facts = self.facts
        for name, report in (("one", head), ("two", worker)):
            # Each look at the host finds what its HCAs have moved since.
            looks = []
            for num_bytes in (0, 96 << 20, 96 << 20, 192 << 20):
                for hca in facts["hcas"]:
                    hca["ports"][0]["counters"]["port_xmit_data"] = num_bytes // 4
                looks.append(json.dumps(facts))
            (self.folder / f"{name}.facts").write_text("\n".join(looks) + "\n")
            (self.folder / f"{name}.json").write_text(json.dumps(report))
            (self.folder / f"{name}.log").write_text(NCCL.format(transport) + last)

    def check(self, name: str, args: list[str], code: int = 0) -> None:
        self.screens.check(name, args, code, TOOK, node_by_node, drawn=r"  spark-\d+ .* s\b")

    def once(self, name: str, args: list[str], code: int = 0) -> None:
        self.screens.compare(name, self.screens.shown(args, Pipe, [TOOK, node_by_node]), code)


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nodes:
    made = Nodes(tmp_path, monkeypatch)
    made.say(HEAD, WORKER)
    return made


def test_a_launch_from_its_start_to_its_end(nodes: Nodes) -> None:
    nodes.once("up", UP)
    nodes.check("up-again", UP, 5)
    nodes.check("ps", ["ps"])
    nodes.check("status", ["status", "gpt"])
    nodes.check("status-env", ["status", "gpt", "--env"])
    nodes.check("logs", ["logs", "gpt"])
    nodes.check("logs-transport", ["logs", "gpt", "--transport"])
    nodes.once("down", ["down", "gpt"])


def test_a_node_that_cannot_start_is_the_cause(nodes: Nodes) -> None:
    loading = {"name": "load", "state": "progress", "fraction": 0.4, "detail": "2.8 of 6.9 GiB"}
    failed = {"state": "failed", "cause": "the checkpoint is cut off", "hint": "download it again", "exit_code": 5}
    nodes.say({**failed, "phases": [*HEAD["phases"][:3], loading]}, {"state": "starting"}, last=FULL)
    nodes.check("up-fails", UP, 5)


def test_another_transport_than_declared_ends_the_launch(nodes: Nodes) -> None:
    nodes.say(HEAD, WORKER, "Socket")
    nodes.once("up-over-tcp", UP, 9)


def test_every_reviewed_screen_is_of_a_case() -> None:
    lived = {"up", "up-again", "ps", "status", "status-env", "logs", "logs-transport", "down"}
    assert reviewed_names(REVIEWED) == {*lived, "up-fails", "up-over-tcp"}
