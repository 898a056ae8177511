"""`hlaunch up --nnodes 2` on two nodes that a cable joins: one pipeline over both, and whatever happens to one of them.

A client asks all the time. What fails is named in time, its requests end with an error, and the engine serves again by
itself when the node is back; nothing is left on either node at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from two_nodes import HEAD_IP, ROOT, TwoNodes, wait_for, why_not

REASON = why_not()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)
PROMPT = {"model": "tiny-oss", "prompt": "The weather in", "max_tokens": 24, "temperature": 0}
CLIENT = """
import json, sys, time, urllib.error, urllib.request
while True:
    began = time.monotonic()
    try:
        request = urllib.request.Request(sys.argv[1] + "/v1/completions", sys.argv[2].encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            status, text = answer.status, json.load(answer)["choices"][0]["text"]
    except urllib.error.HTTPError as error:
        status, text = error.code, json.load(error)["error"]["code"]
    except OSError as error:
        status, text = 0, str(error)
    print(json.dumps({"status": status, "text": text, "began": began, "seconds": time.monotonic() - began}), flush=True)
    if status != 200:
        time.sleep(0.1)
"""  # noqa: E501


class Pair:
    """The head's and the other node's `hlaunch up`, and a client on the head's node."""

    def __init__(self, nodes: TwoNodes) -> None:
        self.nodes = nodes
        self.folder = nodes.folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.secret = self.folder / "node.secret"
        self.secret.write_text("a secret of the test, long enough\n")
        self.secret.chmod(0o600)

    def start(self, role: str, *options: str) -> subprocess.Popen[bytes]:
        rank = "0" if role == "head" else "1"
        argv = [sys.executable, "-m", "launcher.cli", "up", "tiny-oss", "--nnodes", "2", "--node-rank", rank]
        argv += ["--head-addr", HEAD_IP, "--set", "device=cpu", "--set", "drain-timeout=2s", *options]
        self.running[role] = process = self._spawn(role, argv)
        return process

    def ask(self) -> None:
        """Have a client ask from now on."""
        argv = [sys.executable, "-c", CLIENT, "http://127.0.0.1:8000", json.dumps(PROMPT)]
        self.running["client"] = self._spawn("head", argv, "client")

    def _spawn(self, role: str, argv: list[str], log: str = "") -> subprocess.Popen[bytes]:
        name = self.nodes.names[0 if role == "head" else 1]
        environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "PYTHONPATH": str(ROOT),
            "NO_COLOR": "1",
            "OMP_NUM_THREADS": "1",
            "HLAUNCH_STATE_DIR": str(self.folder / role),
            "HLAUNCH_NODE_SECRET_FILE": str(self.secret),
        }
        with (self.folder / f"{log or role}.log").open("wb") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", name, *argv], cwd=self.folder, env=environ, stdout=file, stderr=file
            )

    def text(self, role: str) -> str:
        return (self.folder / f"{role}.log").read_text()

    def answers(self) -> list[dict[str, Any]]:
        path = self.folder / "client.log"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def wait_until_served(self, after: float, seconds: float = 60) -> str:
        """Wait for an answer to a request that began after a moment; returns its text."""
        found = wait_for(
            lambda: [one for one in self.answers() if one["status"] == 200 and one["began"] > after], seconds
        )
        return str(found[0]["text"])

    def wait_until_named(self, pattern: str, seconds: float) -> None:
        wait_for(lambda: re.search(pattern, self.text("head")), seconds)

    def pids(self, role: str, module: str = "") -> list[int]:
        name = self.nodes.names[0 if role == "head" else 1]
        listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
        found = []
        for pid in map(int, listed.split()):
            with contextlib.suppress(OSError):
                if module in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode():
                    found.append(pid)
        return found

    def cable(self, state: str) -> None:
        head, tag = self.nodes.names[0], self.nodes.tag
        subprocess.run(["ip", "-n", head, "link", "set", f"vh{tag}", state], check=True)

    def end_client(self) -> None:
        client = self.running.pop("client")
        client.kill()
        client.wait()

    def stop_head(self) -> None:
        """Stop the head as a user does; the other node follows by itself."""
        self.end_client()
        self.running["head"].send_signal(signal.SIGINT)
        assert self.running["head"].wait(15) == 0, self.text("head")
        assert self.running["worker"].wait(15) == 0, self.text("worker")
        assert self.text("worker").rstrip().endswith("stopped")
        assert self.nodes.pids() == []


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with TwoNodes(tmp_path).connected() as nodes:
        made = Pair(nodes)
        yield made
        for process in made.running.values():
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def expected() -> str:
    from engine.core.sampling_params import SamplingParams
    from engine.llm import LLM

    llm = LLM("tiny-oss", device="cpu", cpu_threads=1, kv_blocks=64, max_model_len=256)
    (answer,) = llm.generate([PROMPT["prompt"]], SamplingParams(temperature=0.0, max_tokens=24))  # type: ignore[list-item]
    llm.close()
    return answer.outputs[0].text


def lost(why: str) -> str:
    return rf"node node1 \(rank 1, cpu:0\) is lost: {why}; phase serve, \d+\.\d s in it"


def test_one_pipeline_over_two_nodes_outlives_a_killed_host_and_a_cut_cable(pair: Pair, expected: str) -> None:
    pair.start("worker")
    pair.start("head", "--set", "pp=2", "--set", "max-model-len=512")
    pair.ask()
    assert pair.wait_until_served(0.0) == expected
    wait_for(lambda: "node1 serves with the head at 10.77.0.1" in pair.text("worker"), 10)
    for phase in ("join", "import", "serve"):  # others may be over between two looks
        assert re.search(rf"^  {phase} ", pair.text("worker"), re.M), pair.text("worker")

    (host,) = pair.pids("worker", "engine.executor.node_host")
    struck = time.monotonic()
    os.kill(host, signal.SIGKILL)
    pair.wait_until_named(lost(r"its node host was killed by SIGKILL \(out of memory\?\)"), 3)
    assert pair.wait_until_served(struck) == expected
    failed = [one for one in pair.answers() if one["status"] == 500]
    assert [one["text"] for one in failed] == ["engine_dead"]
    assert failed[0]["seconds"] < 5

    struck = time.monotonic()
    pair.cable("down")
    pair.wait_until_named(lost(r".*(cut off|timed out|No route|unreachable|said nothing).*"), 6)
    wait_for(lambda: not pair.pids("worker", "multiproc_rank"), 8)  # whoever cannot be reached does not go on
    assert all(one["seconds"] < 6 for one in pair.answers())
    pair.cable("up")
    assert pair.wait_until_served(struck) == expected
    pair.stop_head()


@pytest.mark.slow
def test_a_node_that_is_stopped_and_goes_on(pair: Pair, expected: str) -> None:
    """Every process of the other node stands still, as in a paused machine: named, and back when it goes on."""
    pair.start("worker")
    pair.start("head", "--set", "pp=2", "--set", "max-model-len=512")
    pair.ask()
    pair.wait_until_served(0.0)
    struck = time.monotonic()
    stopped = pair.pids("worker")
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    pair.wait_until_named(lost(r"10.77.0.2 has said nothing for \d\.\d s"), 8)
    failed = wait_for(lambda: [one for one in pair.answers() if one["status"] == 500], 5)
    assert failed[0]["seconds"] < 7
    for pid in stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    assert pair.wait_until_served(struck + 5) == expected
    pair.stop_head()


@pytest.mark.slow
def test_a_head_that_is_started_again_finds_its_node(pair: Pair, expected: str) -> None:
    pair.start("worker")
    head = pair.start("head", "--set", "pp=2", "--set", "max-model-len=512")
    pair.ask()
    assert pair.wait_until_served(0.0) == expected
    for pid in pair.pids("head"):
        os.kill(pid, signal.SIGKILL)
    head.wait()
    pair.end_client()
    wait_for(lambda: not pair.pids("worker", "multiproc_rank"), 8)
    pair.start("head", "--set", "pp=2", "--set", "max-model-len=512")
    again = time.monotonic()
    pair.ask()
    assert pair.wait_until_served(again) == expected
    pair.stop_head()


@pytest.mark.slow
def test_an_engine_on_the_other_node_dies_and_its_sibling_goes_on(pair: Pair, expected: str) -> None:
    worker = pair.start("worker")
    pair.start("head", "--set", "dp=2", "--set", "max-model-len=512")
    pair.ask()
    assert pair.wait_until_served(0.0) == expected
    wait_for(lambda: "node1 serves with" in pair.text("worker"), 20)
    struck = time.monotonic()
    for pid in pair.pids("worker"):  # the whole node, its launcher included
        os.kill(pid, signal.SIGKILL)
    worker.wait()
    pair.wait_until_named("engine 1: " + lost(".*(closed the connection|reset by peer)"), 3)
    pair.wait_until_served(struck + 1, 3)
    assert len([one for one in pair.answers() if one["status"] == 500]) <= 1
    pair.start("worker")
    wait_for(lambda: "node1 serves with" in pair.text("worker"), 30)
    assert pair.wait_until_served(time.monotonic()) == expected
    pair.stop_head()
