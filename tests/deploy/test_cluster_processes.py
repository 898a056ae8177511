"""`hlaunch up NAME --runtime process` on two nodes that only ssh reaches: up, ps, status, logs, a killed node, down."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from two_nodes import HEAD_IP, ROOT, WORKER_IP, TwoNodes, wait_for, why_not

REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)
REGISTRY = """\
version: 1
clusters:
  pair:
    platform: cpu
    fabric: {{rdma: "off", subnet: 10.77.0.0/24}}
    ray: {{port: 6379, object-store-memory: 100MiB}}
    nodes:
      - {{name: one, role: head, ip: {head}, ssh: {head_name}, cpus: 1, ifname: {head_if}}}
      - {{name: two, role: worker, ip: {worker}, ssh: {worker_name}, cpus: 1, ifname: {worker_if}}}
models:
  tiny-oss:
    model: tiny-oss
    cluster: pair
    device: cpu
    host: {head}
    api-key: ${{HLAUNCH_API_KEY}}
    max-num-seqs: 2
    tensor-parallel-size: 2
    drain-timeout: 3s
    ready: {{timeout: 120s}}
"""
KEY = "canary-api-key-of-the-test"


class Cluster:
    def __init__(self, nodes: TwoNodes, folder: Path) -> None:
        self.nodes, self.folder = nodes, folder
        head, worker = nodes.names
        (folder / "model_registry.yml").write_text(
            REGISTRY.format(
                head=HEAD_IP,
                worker=WORKER_IP,
                head_name=head,
                worker_name=worker,
                head_if=f"vh{nodes.tag}",
                worker_if=f"vw{nodes.tag}",
            )  # fmt: skip
        )
        ssh = folder / "ssh"
        ssh.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("namespace_ssh.py")} "$@"\n')
        ssh.chmod(0o755)
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            "HLAUNCH_SSH": str(ssh),
            "HLAUNCH_API_KEY": KEY,
        }
        self.said = ""

    def cli(self, *args: str, seconds: float = 150) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "launcher.cli", *args],
            cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
        self.said += done.stdout + done.stderr
        return done


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with TwoNodes(tmp_path).connected() as pair:
        made = Cluster(pair, tmp_path)
        yield made
        made.cli("down", "--all")


def test_up_ps_status_logs_kill_down(cluster: Cluster) -> None:
    up = cluster.cli("up", "tiny-oss", "--runtime", "process")
    assert up.returncode == 0, up.stderr
    assert f"tiny-oss is ready at http://{HEAD_IP}:8000 on 2 nodes" in up.stdout
    for phase in ("one ray", "one nodes", "two head", "two ray"):
        assert phase in up.stderr
    launches = json.loads(cluster.cli("ps", "--json").stdout)
    assert [(node["name"], node["state"]) for node in launches[0]["nodes"]] == [("one", "ready"), ("two", "ready")]
    assert "10.77.0.2  ready" in cluster.cli("ps").stdout
    examined = json.loads(cluster.cli("doctor", "tiny-oss", "--json").stdout)
    assert {name: node["read"] for name, node in examined["nodes"].items()} == {"one": True, "two": True}
    codes = {found["code"] for found in examined["findings"]}
    assert not codes & {"node-unreachable", "node-ip-absent", "ifname-absent", "peer-unreachable"}, examined
    again = cluster.cli("up", "tiny-oss", "--runtime", "process")
    assert again.returncode == 5
    assert "is running on cluster pair" in again.stderr

    raylet = next(
        int(pid)
        for pid in cluster.nodes.run("worker", "ip", "netns", "pids", cluster.nodes.names[1]).stdout.split()
        if b"raylet/raylet\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(raylet, signal.SIGKILL)
    wait_for(lambda: "restarted once, after: Ray's raylet died" in cluster.cli("status", "tiny-oss").stdout, 60)
    wait_for(lambda: json.loads(cluster.cli("ps", "--json").stdout)[0]["state"] == "ready", 60)
    told = "worker two (10.77.0.2) was restarted and joined again"
    wait_for(lambda: told in cluster.cli("status", "tiny-oss").stdout, 60)
    logs = cluster.cli("logs", "tiny-oss", "-n", "500").stdout
    assert "one | node: ready" in logs
    assert "two | keeper: ended with 1; restart 1 of 3" in logs

    record = json.loads(next((cluster.folder / ".local/state/hlaunch").glob("**/cluster.json")).read_text())
    for node in record["nodes"]:
        # Ray opens its folder to everyone on the host; the one around it is ours alone.
        assert stat.S_IMODE(Path(node["run_folder"]).stat().st_mode) == 0o700
        assert Path(node["run_folder"], "ray", "session_latest").is_dir()
    folders = [Path(node["run_folder"]) for node in record["nodes"]]
    down = cluster.cli("down", "tiny-oss")
    assert (down.returncode, down.stdout) == (0, "tiny-oss: stopped on 2 nodes, nothing is left\n"), down.stderr
    assert cluster.nodes.pids() == []
    assert not [folder for folder in folders if folder.exists()]
    assert not list((cluster.folder / ".local/state/hlaunch/nodes").glob("*"))
    assert cluster.cli("ps").stdout == ""
    assert KEY not in cluster.said
