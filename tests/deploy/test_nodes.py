"""Two nodes without Docker: Ray joins with the token, the head serves, failures are named and recovered from."""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from two_nodes import HEAD_IP, WORKER_IP, RunningNode, TwoNodes, wait_for, why_not

from engine.config import EngineConfig, SchedulerConfig, ServerConfig
from launcher.registry.cluster import RaySettings
from launcher.supervise.node_fabric import NodeFabric
from launcher.supervise.node_spec import NodeSpec, Peer

REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)
STREAM = """\
import http.client, json
connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=30)
body = {"model": "tiny-oss", "prompt": "ROMEO:", "max_tokens": 8, "stream": True}
connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
response = connection.getresponse()
lines = [line for line in response.read().split(b"\\n") if line.startswith(b"data:")]
print(response.status, len(lines), lines[-1].decode())
"""


def make_node(nodes: TwoNodes, role: str, folder: Path, token: str, *, join: float = 60.0) -> RunningNode:
    """Write one node's files and return the node, not started."""
    folder.mkdir()
    token_file = folder / "ray_token"
    token_file.write_text(token)
    token_file.chmod(0o600)
    engine = folder / "engine.json"
    engine.write_text(
        EngineConfig(
            model="tiny-oss",
            scheduler=SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=256),
            server=ServerConfig(served_model_names=("tiny-oss",), drain_timeout_seconds=3.0),
        ).to_json()
    )
    tag = secrets.token_hex(4)
    spec = NodeSpec(
        launch="tiny-oss", cluster="pair", node=f"{role}-01", role=role, ip=HEAD_IP if role == "head" else WORKER_IP,
        plan="0" * 64, peers=(Peer("head-01", HEAD_IP, "head"), Peer("worker-01", WORKER_IP, "worker")),
        model="tiny-oss", revision=None, run_folder=f"/tmp/hl-{tag}",
        engine_config=str(engine) if role == "head" else "",
        ray=replace(RaySettings(), object_store_bytes=100 << 20), ray_folder=f"/tmp/hl-{tag}-ray",
        token_file=str(token_file), cpus=1, join_timeout_seconds=join, drain_timeout_seconds=3.0,
    )  # fmt: skip
    plan = folder / "node.json"
    plan.write_text(spec.to_json())
    return RunningNode(nodes, role, plan, Path(spec.run_folder), folder / "node.log")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[TwoNodes]:
    with TwoNodes(tmp_path).connected() as pair:
        yield pair


def raylet_of(nodes: TwoNodes, role: str) -> int:
    listed = nodes.run(role, "ip", "netns", "pids", nodes.names[0 if role == "head" else 1]).stdout.split()
    for pid in listed:
        if b"raylet/raylet\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return int(pid)
    raise AssertionError("no raylet")


@pytest.mark.slow  # test_cluster_processes.py goes the same way through the command, in the default tier.
def test_two_nodes_serve_lose_one_and_get_it_back(nodes: TwoNodes, tmp_path: Path) -> None:
    token = secrets.token_urlsafe(32)
    head = make_node(nodes, "head", tmp_path / "h", token)
    worker = make_node(nodes, "worker", tmp_path / "w", token)
    try:
        worker.start()  # First on purpose: it waits for its head.
        assert wait_for(lambda: worker.status().get("phases"), 20)[0]["name"] == "head"
        assert worker.probe("worker").returncode == 1
        head.start()
        wait_for(lambda: head.probe("ready").returncode == 0, 90)
        assert worker.probe("worker").returncode == 0, worker.text()
        status = head.status()
        assert [node["is_alive"] for node in status["nodes"]] == [True, True]
        assert {"ray", "nodes", "spawn", "ready"} <= {phase["name"] for phase in status["phases"]}

        streamed = nodes.run("head", sys.executable, "-c", STREAM)
        code, num_lines, last = streamed.stdout.split(maxsplit=2)
        assert (code, last.strip()) == ("200", "data: [DONE]"), streamed
        assert int(num_lines) >= 3

        os.kill(raylet_of(nodes, "worker"), signal.SIGKILL)
        # Ray may believe the death only after the successor has joined: then there is no moment without the node.
        wait_for(lambda: any("joined again" in event["text"] for event in head.status()["events"]), 60)
        wait_for(lambda: worker.probe("worker").returncode == 0, 30)
        again = wait_for(lambda: worker.status(), 10)
        assert "raylet" in again["previous"]["cause"]
        assert again["previous"]["restarts"] == 1
        assert "keeper: ended with 1; restart 1 of 3" in worker.text()
        assert nodes.run("head", sys.executable, "-c", STREAM).stdout.startswith("200")

        assert worker.stop()["killed"] == 0
        wait_for(lambda: head.status()["state"] == "degraded", 40)
        lost = head.probe("head")
        assert (lost.returncode, lost.stdout.strip()) == (1, "not in the cluster: worker-01")
        assert any("worker worker-01 (10.77.0.2) left" in event["text"] for event in head.status()["events"])
        assert token not in head.text() + worker.text() + json.dumps(head.status())
    finally:
        ends = [worker.stop(), head.stop()]
    assert [end["killed"] for end in ends] == [0, 0]
    assert nodes.pids() == []
    assert not head.run_folder.exists()
    assert not Path(f"{head.run_folder}-ray").exists()


def test_a_wrong_token_is_refused_and_named(nodes: TwoNodes, tmp_path: Path) -> None:
    head = make_node(nodes, "head", tmp_path / "h", secrets.token_urlsafe(32))
    worker = make_node(nodes, "worker", tmp_path / "w", secrets.token_urlsafe(32))
    try:
        head.start()
        wait_for(lambda: any(phase["name"] == "nodes" for phase in head.status().get("phases", ())), 60)
        run = nodes.run(
            "worker", sys.executable, "-m", "launcher.node", "worker", "--plan", str(worker.plan), seconds=60
        )
        assert run.returncode == 5, run.stdout
        assert run.stdout.splitlines()[-1] == "error: worker worker-01: the head refused this node's Ray token"
        assert [node["is_alive"] for node in head.status()["nodes"]] == [True, False]
    finally:
        worker.stop()
        head.stop()
    assert nodes.pids() == []


def test_a_head_that_never_comes_is_named(nodes: TwoNodes, tmp_path: Path) -> None:
    worker = make_node(nodes, "worker", tmp_path / "w", "x" * 43, join=2.0)
    run = nodes.run("worker", sys.executable, "-m", "launcher.node", "worker", "--plan", str(worker.plan), seconds=60)
    assert run.returncode == 8
    assert "the head head-01 (10.77.0.1:6379) did not answer within 2 s" in run.stdout.splitlines()[-1]
    worker.stop()
    assert not worker.run_folder.exists()


def run_with_fabric(nodes: TwoNodes, worker: RunningNode, fabric: NodeFabric) -> tuple[int, list[str]]:
    """Run a worker whose head never comes, with this view of its fabric; return exit code and lines."""
    spec = NodeSpec.from_json(worker.plan.read_text(), "plan")
    worker.plan.write_text(replace(spec, fabric=fabric).to_json())
    argv = (sys.executable, "-m", "launcher.node", "worker", "--plan", str(worker.plan))
    run = nodes.run("worker", *argv, seconds=60)
    return run.returncode, run.stdout.splitlines()


def test_a_node_fills_in_its_own_fabric_and_ends_where_the_declared_is_not_there(
    nodes: TwoNodes, tmp_path: Path
) -> None:
    worker = make_node(nodes, "worker", tmp_path / "w", "x" * 43, join=1.0)
    code, lines = run_with_fabric(nodes, worker, NodeFabric("cpu"))
    assert (code, lines[0]) == (8, f"node: GLOO_SOCKET_IFNAME=vw{nodes.tag}, as measured here")
    code, lines = run_with_fabric(nodes, worker, NodeFabric("cpu", ifname="eth9"))
    assert code == 5
    assert lines[-1].startswith("error: worker worker-01: eth9: ")
    assert f"vw{nodes.tag}" in lines[-1]
    assert lines[-2].startswith("hint: ")
    worker.stop()
