"""The rendered files in a real Docker Engine: two containers with their own addresses, from `up` to nothing left.

By hand: `.venv/bin/pytest -m slow tests/deploy/test_cluster_docker.py`. Needs a running daemon (`dockerd &`, or
DOCKER_HOST); the image is built from deploy/Dockerfile on a base made of this machine, since none can be pulled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE = next(Path(path) for path in sys.path if path.endswith("site-packages"))
COMPOSE = SITE / "compose" / "docker-compose"
IMAGE, BASE = "hlaunch-engine:proof", "hlaunch-base:here"
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
    max-num-seqs: 2, drain-timeout: 3s, ready: {{timeout: 120s}}}}
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


def docker(*args: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *args], capture_output=True, text=True, timeout=seconds, check=False)


def why_not() -> str:
    try:
        found = docker("version", "--format", "{{.Server.Version}}")
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no docker here: {error}"
    return "" if found.returncode == 0 else f"no Docker daemon answers: {found.stderr.strip()[:120]}"


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.3)
    return value


class Deployment:
    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, ""
        (folder / "model_registry.yml").write_text(REGISTRY)
        self.environ = {**os.environ, "HOME": str(folder), "PYTHONPATH": str(ROOT), "HLAUNCH_API_KEY": KEY}
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


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    if reason := why_not():
        pytest.skip(reason)
    if docker("image", "inspect", BASE).returncode != 0:
        script = Path(__file__).with_name("base_image.sh")
        prefix = str(Path(sys.base_prefix).resolve())
        subprocess.run(["sh", str(script), BASE, prefix, str(SITE)], check=True, timeout=280)
    subprocess.run(
        ["docker", "build", "-q", "-f", "deploy/Dockerfile", "-t", IMAGE,
         "--build-arg", f"BASE={BASE}", "--build-arg", "FLAVOUR=prepared", "."],
        cwd=ROOT, env={**os.environ, "DOCKER_BUILDKIT": "0"}, check=True, timeout=280, capture_output=True,
    )  # fmt: skip
    made = Deployment(tmp_path)
    yield made
    made.cli("down", "--all")


@pytest.mark.slow
def test_two_containers_from_up_to_nothing_left(deployment: Deployment) -> None:
    up = deployment.cli("up", "tiny-oss")
    assert up.returncode == 0, up.stderr
    assert f"tiny-oss is ready at http://{HEAD_IP}:8000 on 2 nodes" in up.stdout
    assert deployment.states() == ["ready", "ready"]
    assert docker("exec", HEAD, "python", "-m", "launcher.probe", "ready").returncode == 0
    assert docker("exec", WORKER, "python", "-m", "launcher.probe", "worker").returncode == 0
    assert deployment.stream() == "200 data: [DONE]"

    # Ray refuses a wrong token: the very same image, network and address space, another token.
    view = ("python", "-m", "engine.executor.ray_view", "--address", f"{HEAD_IP}:6379")
    assert docker("exec", WORKER, *view).returncode == 0
    wrong = docker("exec", "-e", "RAY_AUTH_TOKEN_PATH=", "-e", "RAY_AUTH_TOKEN=" + "x" * 43, WORKER, *view)
    assert (wrong.returncode, json.loads(wrong.stdout)["error"]) == (1, "refused"), wrong

    # The worker's Ray dies: Docker starts the container again, the node joins again, the cause has a name.
    kill = "import os, signal\nfor p in os.listdir('/proc'):\n if p.isdigit() and b'raylet/raylet\\0' in "
    kill += "open(f'/proc/{p}/cmdline','rb').read(): os.kill(int(p), signal.SIGKILL)"
    assert docker("exec", WORKER, "python", "-c", kill).returncode == 0
    wait_for(lambda: "restarted 1 time(s), after: Ray's raylet died" in deployment.cli("status", "tiny-oss").stdout, 90)
    wait_for(lambda: deployment.states() == ["ready", "ready"], 90)
    wait_for(lambda: "joined again" in deployment.cli("status", "tiny-oss").stdout, 60)
    assert deployment.stream() == "200 data: [DONE]"

    inspected = docker("inspect", HEAD, WORKER).stdout
    assert KEY not in inspected
    down = deployment.cli("down", "tiny-oss")
    assert (down.returncode, down.stdout) == (0, "tiny-oss: stopped on 2 nodes, nothing is left\n"), down.stderr
    assert docker("ps", "-aq", "--filter", "label=dev.hlaunch.model=tiny-oss").stdout == ""
    assert docker("network", "ls", "-q", "--filter", "name=hl-proof").stdout == ""
    assert not list((deployment.folder / ".local/state/hlaunch/nodes").glob("*"))
    assert KEY not in deployment.said
