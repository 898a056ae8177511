"""The rendered files in a real Docker Engine: two containers with their own addresses, from `up` to nothing left.

By hand: `.venv/bin/pytest -m slow -s tests/deploy/test_cluster_docker.py`. It finds or starts its engine by itself
(`docker_engine.py`) and skips with the reason where none can run; the image is built from deploy/Dockerfile.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from docker_engine import COMPOSE, IMAGE, ROOT, DockerEngine

from launcher.supervise.docker import read_host_facts

HEAD_IP, WORKER_IP = "172.30.77.11", "172.30.77.12"
HEAD, WORKER = "hl-tiny-oss-one-node-1", "hl-tiny-oss-two-node-1"
KEY = "canary-api-key-of-the-proof"
REGISTRY = f"""\
version: 1
clusters:
  pair:
    platform: cpu
    fabric: {{rdma: "off", subnet: 172.30.77.0/24}}
    ray: {{port: 6379, object-store-memory: 100MiB}}
    container: {{image: "{IMAGE}", shm-size: 1GiB, gpu-mode: none, network: hl-proof}}
    nodes:
      - {{name: one, role: head, ip: {HEAD_IP}, cpus: 1, ifname: eth0}}
      - {{name: two, role: worker, ip: {WORKER_IP}, cpus: 1, ifname: eth0}}
models:
  tiny-oss: {{model: tiny-oss, cluster: pair, device: cpu, host: {HEAD_IP}, api-key: "${{HLAUNCH_API_KEY}}",
    tensor-parallel-size: 2, max-num-seqs: 2, drain-timeout: 3s, ready: {{timeout: 120s}}}}
"""
STREAM = f"""\
import http.client, json
connection = http.client.HTTPConnection("{HEAD_IP}", 8000, timeout=30)
body = {{"model": "tiny-oss", "prompt": "ROMEO:", "max_tokens": 8, "stream": True}}
connection.request("POST", "/v1/completions", json.dumps(body),
                   {{"Content-Type": "application/json", "Authorization": "Bearer {KEY}"}})
response = connection.getresponse()
print(response.status, [line for line in response.read().split(b"\\n") if line][-1].decode())
"""


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.3)
    return value


class Deployment:
    def __init__(self, folder: Path, engine: DockerEngine) -> None:
        self.folder, self.engine, self.said = folder, engine, ""
        (folder / "model_registry.yml").write_text(REGISTRY)
        self.environ = {**engine.environ, "HOME": str(folder), "PYTHONPATH": str(ROOT), "HLAUNCH_API_KEY": KEY}
        self.environ["HLAUNCH_COMPOSE"] = str(COMPOSE)
        self.environ.pop("HLAUNCH_STATE_DIR", None)

    def cli(self, *args: str, seconds: float = 180) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "launcher.cli", *args],
            cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
        self.said += done.stdout + done.stderr
        return done

    def stream(self) -> str:
        return subprocess.run(
            [sys.executable, "-c", STREAM], capture_output=True, text=True, timeout=60, check=False
        ).stdout.strip()

    def states(self) -> list[str]:
        launches = json.loads(self.cli("ps", "--json").stdout)
        return [node["state"] for node in launches[0]["nodes"]]


class Stopwatch:
    """Times of the steps, printed at the end: `pytest -s` shows them."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.steps: list[str] = []

    def lap(self, what: str) -> None:
        now = time.monotonic()
        self.steps.append(f"{what} {now - self._last:.1f} s")
        self._last = now


@pytest.fixture
def deployment(tmp_path: Path, docker_engine: DockerEngine, engine_image: str) -> Iterator[Deployment]:
    assert engine_image == IMAGE
    made = Deployment(tmp_path, docker_engine)
    yield made
    made.cli("down", "--all")


def check_override(deployment: Deployment, up: subprocess.CompletedProcess[str]) -> None:
    """Where Docker cannot raise limits, the files of this host say so, the user was told, and the containers run."""
    files = list((deployment.folder / ".local/state/hlaunch/nodes").glob("*/docker-compose.yml"))
    assert len(files) == 2
    assert all("memlock: -1" in file.read_text() for file in files), "the rendered file is the same on all hosts"
    overrides = [file.with_name("docker-compose.override.yml") for file in files]
    if read_host_facts(deployment.environ).can_raise_limits:
        assert not any(path.is_file() and "memlock" in path.read_text() for path in overrides)
        return
    for path in overrides:
        assert "memlock: !reset" in path.read_text()
        assert "# no memlock: -1, because Docker here lacks CAP_SYS_RESOURCE" in path.read_text()
    for name in ("one", "two"):
        assert f"{name}: no memlock: -1, because Docker here lacks CAP_SYS_RESOURCE" in up.stderr


def check_doctor(deployment: Deployment) -> None:
    """The doctor looks into both containers and finds them at their addresses, on the fabric's interface."""
    done = deployment.cli("doctor", "tiny-oss", "--inside", "--json")
    answer = json.loads(done.stdout)
    assert {name: node["read"] for name, node in answer["nodes"].items()} == {"one": True, "two": True}, done
    codes = {found["code"] for found in answer["findings"]}
    assert not codes & {"node-unreachable", "node-ip-absent", "ifname-absent", "peer-unreachable", "port-busy"}, done
    assert [f["where"] for f in answer["findings"] if f["code"] == "version-skew"] == []
    active = json.loads(deployment.cli("doctor", "tiny-oss", "--inside", "--active", "--json").stdout)
    summed = [found for found in active["findings"] if found["code"].startswith("all-reduce")]
    assert [(found["code"], found["subject"]) for found in summed] == [("all-reduce-ok", "one <-> two")], summed
    assert "over gloo" in summed[0]["evidence"]
    table = deployment.cli("doctor", "tiny-oss", "--inside").stdout.splitlines()
    assert [line.split()[:3] for line in table[1:3]] == [["one", HEAD_IP, "eth0"], ["two", WORKER_IP, "eth0"]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_containers_from_up_to_nothing_left(deployment: Deployment) -> None:
    docker, watch = deployment.engine.docker, Stopwatch()
    up = deployment.cli("up", "tiny-oss")
    watch.lap("up")
    assert up.returncode == 0, up.stderr
    assert f"tiny-oss is ready at http://{HEAD_IP}:8000 on 2 nodes" in up.stdout
    check_override(deployment, up)
    assert deployment.states() == ["ready", "ready"]
    table = deployment.cli("ps").stdout
    assert f"one   head    {HEAD_IP}  ready" in table
    assert f"two   worker  {WORKER_IP}  ready" in table
    assert docker("exec", HEAD, "python", "-m", "launcher.probe", "ready").returncode == 0
    assert docker("exec", WORKER, "python", "-m", "launcher.probe", "worker").returncode == 0
    watch.lap("ps and probes")
    check_doctor(deployment)
    watch.lap("doctor: passive, with two ranks, as a table")
    assert deployment.stream() == "200 data: [DONE]"
    watch.lap("stream")

    # Ray refuses a wrong token: the very same image, network and address space, another token.
    view = ("python", "-m", "engine.executor.ray_view", "--address", f"{HEAD_IP}:6379")
    assert docker("exec", WORKER, *view).returncode == 0
    wrong = docker("exec", "-e", "RAY_AUTH_TOKEN_PATH=", "-e", "RAY_AUTH_TOKEN=" + "x" * 43, WORKER, *view)
    assert (wrong.returncode, json.loads(wrong.stdout)["error"]) == (1, "refused"), wrong
    watch.lap("right and wrong token")

    # The worker's Ray dies: Docker starts the container again, the node joins again, the cause has a name.
    kill = "import os, signal\nfor p in os.listdir('/proc'):\n if p.isdigit() and b'raylet/raylet\\0' in "
    kill += "open(f'/proc/{p}/cmdline','rb').read(): os.kill(int(p), signal.SIGKILL)"
    assert docker("exec", WORKER, "python", "-c", kill).returncode == 0
    wait_for(lambda: "restarted once, after: Ray's raylet died" in deployment.cli("status", "tiny-oss").stdout, 90)
    wait_for(lambda: deployment.states() == ["ready", "ready"], 90)
    wait_for(lambda: "joined again" in deployment.cli("status", "tiny-oss").stdout, 60)
    assert deployment.stream() == "200 data: [DONE]"
    watch.lap("worker killed, named, back")

    inspected = docker("inspect", HEAD, WORKER).stdout
    assert KEY not in inspected
    down = deployment.cli("down", "tiny-oss")
    watch.lap("down")
    assert (down.returncode, down.stdout) == (0, "tiny-oss: stopped on 2 nodes, nothing is left\n"), down.stderr
    assert docker("ps", "-aq", "--filter", "label=dev.hlaunch.model=tiny-oss").stdout == ""
    assert docker("network", "ls", "-q", "--filter", "name=hl-proof").stdout == ""
    assert not list((deployment.folder / ".local/state/hlaunch/nodes").glob("*"))
    assert KEY not in deployment.said
    print("\n" + "\n".join(watch.steps))
