"""Ranks of one engine on both nodes of a cluster, as plain processes: the same tokens, a lost node, its return."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_client import NUM_STREAMS, NUM_TOKENS, PROMPT
from test_cluster_processes import Cluster
from two_nodes import HEAD_IP, TwoNodes, wait_for, why_not

from engine.llm import LLM, SamplingParams

REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)
CLIENT = Path(__file__).with_name("rank_client.py")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with TwoNodes(tmp_path).connected() as pair:
        made = Cluster(pair, tmp_path)
        made.environ["OMP_NUM_THREADS"] = "1"
        # A cluster of another name has other run folders: nothing is shared with tests that run beside this one.
        registry = tmp_path / "model_registry.yml"
        registry.write_text(registry.read_text().replace("pair", f"ranks-{pair.tag}"))
        yield made
        if made.cli("ps", "--json").stdout.strip() not in ("", "[]"):
            print(made.cli("logs", "tiny-oss", "-n", "60").stdout[-6000:])
        made.cli("down", "--all")


def client(cluster: Cluster, what: str) -> subprocess.Popen[str]:
    argv = ["ip", "netns", "exec", cluster.nodes.names[0], sys.executable, str(CLIENT), HEAD_IP, what]
    environ = {"PATH": os.environ["PATH"], "KEY": cluster.environ["HLAUNCH_API_KEY"]}
    return subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, text=True)


def completion(cluster: Cluster) -> str:
    said, _ = client(cluster, "one").communicate(timeout=90)
    return said.strip()


def pids_of(cluster: Cluster, number: int, part: bytes) -> list[int]:
    listed = subprocess.run(
        ["ip", "netns", "pids", cluster.nodes.names[number]], capture_output=True, text=True, check=False
    ).stdout
    found = []
    for pid in listed.split():
        with contextlib.suppress(OSError):
            if part in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return found


def expected() -> str:
    """What one rank says, in this process."""
    llm = LLM("tiny-oss", cpu_threads=1, kv_blocks=64, device="cpu")
    try:
        (result,) = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS), use_tqdm=False)
        return f"200 {json.dumps(result.outputs[0].text)}"
    finally:
        llm.close()


def test_an_engine_on_two_nodes_loses_one_and_has_it_back(cluster: Cluster) -> None:
    up = cluster.cli("up", "tiny-oss", "--runtime", "process", "--set", "tp=2", "--set", "max-num-seqs=4")
    assert up.returncode == 0, up.stderr
    assert f"tiny-oss is ready at http://{HEAD_IP}:8000 on 2 nodes" in up.stdout
    assert "transport one - two: TCP (Gloo, 10.77.0.1, 10.77.0.2), ranks 0-1" in up.stdout
    for phase in ("one ray", "one nodes", "one placement", "two ray"):
        assert phase in up.stderr
    assert "Ray: " in up.stderr, "what of the start was Ray's"
    assert [len(pids_of(cluster, node, b"multiproc_rank")) for node in (0, 1)] == [1, 1]
    said = expected()
    assert completion(cluster) == said

    loaded = client(cluster, "many")
    assert loaded.stdout is not None
    assert loaded.stdout.readline() == "streaming\n"
    killed_at = time.time()
    for pid in pids_of(cluster, 1, b""):
        # The whole node but who restarts it, as a container is killed; some die of the others' deaths meanwhile.
        with contextlib.suppress(OSError):
            if b"keep\0" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
    ends = json.loads(loaded.communicate(timeout=60)[0])
    assert len(ends) == NUM_STREAMS
    for at, last in ends:
        assert at - killed_at < 5
        assert "error" in last, ends
    named = "node two (rank 1, cpu:0) is lost: "
    wait_for(lambda: named in cluster.cli("status", "tiny-oss").stdout, 30)

    wait_for(lambda: completion(cluster) == said, 90)
    wait_for(lambda: json.loads(cluster.cli("ps", "--json").stdout)[0]["state"] == "ready", 60)
    status = cluster.cli("status", "tiny-oss").stdout
    assert "worker two (10.77.0.2) was restarted and joined again" in status
    assert "engine: serves again" in status

    down = cluster.cli("down", "tiny-oss")
    assert (down.returncode, down.stdout) == (0, "tiny-oss: stopped on 2 nodes, nothing is left\n"), down.stderr
    assert cluster.nodes.pids() == []
