"""Ranks in both containers of the rendered deployment: TP2 and PP2, the worker killed under load, and its return.

By hand: `.venv/bin/pytest -m slow -s tests/deploy/test_cluster_ranks_docker.py`; prints how long each step took.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from docker_engine import IMAGE, DockerEngine
from rank_client import NUM_STREAMS
from test_cluster_docker import KEY, REGISTRY, Deployment, Stopwatch, wait_for
from test_cluster_ranks import CLIENT, expected

# Other addresses and names than the deployment of one rank has: both may run on one machine.
HEAD_IP, WORKER_IP = "172.30.78.11", "172.30.78.12"
HEAD, WORKER = "hl-tiny-oss-one-node-1", "hl-tiny-oss-two-node-1"
# Written so that the counting process does not count itself.
RANKS = """\
import os
found = 0
for entry in filter(str.isdigit, os.listdir("/proc")):
    try:
        found += b"multiproc" + b"_rank" in open(f"/proc/{entry}/cmdline", "rb").read()
    except OSError:
        continue
print(found)
"""


class RankDeployment(Deployment):
    """The deployment, with clients that ask its head."""

    def __init__(self, folder: Path, engine: DockerEngine) -> None:
        super().__init__(folder, engine)
        text = REGISTRY.replace("172.30.77.", "172.30.78.").replace("hl-proof", "hl-ranks").replace("pair", "ranks")
        text = text.replace("tensor-parallel-size: 2, ", "")
        (folder / "model_registry.yml").write_text(text.replace("max-num-seqs: 2", "max-num-seqs: 4"))

    def client(self, what: str) -> subprocess.Popen[str]:
        argv = [sys.executable, str(CLIENT), HEAD_IP, what]
        return subprocess.Popen(argv, env={**self.environ, "KEY": KEY}, stdout=subprocess.PIPE, text=True)

    def completion(self) -> str:
        return self.client("one").communicate(timeout=90)[0].strip()

    def num_ranks(self, container: str) -> int:
        return int(self.engine.docker("exec", container, "python", "-c", RANKS).stdout or 0)


@pytest.fixture
def deployment(tmp_path: Path, docker_engine: DockerEngine, engine_image: str) -> Iterator[RankDeployment]:
    assert engine_image == IMAGE
    made = RankDeployment(tmp_path, docker_engine)
    yield made
    if made.cli("ps", "--json").stdout.strip() not in ("", "[]"):
        print(made.cli("logs", "tiny-oss", "-n", "80").stdout[-8000:])
    made.cli("down", "--all")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("split", ["tp=2", "pp=2"])
def test_ranks_in_both_containers(deployment: RankDeployment, split: str) -> None:
    docker, watch = deployment.engine.docker, Stopwatch()
    up = deployment.cli("up", "tiny-oss", "--set", split)
    assert up.returncode == 0, up.stderr
    watch.lap(f"{split}: up")
    assert f"tiny-oss is ready at http://{HEAD_IP}:8000 on 2 nodes" in up.stdout
    assert f"transport one - two: TCP (Gloo, {HEAD_IP}, {WORKER_IP}), ranks 0-1" in up.stdout
    assert (deployment.num_ranks(HEAD), deployment.num_ranks(WORKER)) == (1, 1)
    said = expected()
    assert deployment.completion() == said
    watch.lap("the same tokens as one rank")

    loaded = deployment.client("many")
    assert loaded.stdout is not None
    assert loaded.stdout.readline() == "streaming\n"
    killed_at = time.time()
    assert docker("kill", WORKER).returncode == 0
    ends = json.loads(loaded.communicate(timeout=60)[0])
    assert len(ends) == NUM_STREAMS
    for at, last in ends:
        assert at - killed_at < 5, ends
        assert "error" in last, ends
    print(f"streams ended {max(at for at, _ in ends) - killed_at:.1f} s after the kill")
    named = "node two (rank 1, cpu:0) is lost: "
    wait_for(lambda: named in deployment.cli("status", "tiny-oss").stdout, 30)
    assert deployment.completion().startswith("503 ")
    watch.lap("worker's container killed under load, failure named")

    assert docker("start", WORKER).returncode == 0
    wait_for(lambda: deployment.completion() == said, 120)
    watch.lap("container started again, the same tokens again")
    wait_for(lambda: deployment.states() == ["ready", "ready"], 60)
    assert (deployment.num_ranks(HEAD), deployment.num_ranks(WORKER)) == (1, 1)

    down = deployment.cli("down", "tiny-oss")
    watch.lap("down")
    assert (down.returncode, down.stdout) == (0, "tiny-oss: stopped on 2 nodes, nothing is left\n"), down.stderr
    assert docker("ps", "-aq", "--filter", "label=dev.hlaunch.model=tiny-oss").stdout == ""
    assert KEY not in deployment.said
    print("\n" + "\n".join(watch.steps))
