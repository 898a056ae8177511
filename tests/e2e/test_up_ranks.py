"""`hlaunch up` with several ranks on the CPUs of this host: the same words, and nothing left when anything ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from e2e_support import HLAUNCH, ROOT, Running, free_port, is_running

PROMPT = {"model": "tiny-oss", "prompt": "The weather in", "max_tokens": 24, "temperature": 0}


def complete(url: str) -> str:
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(PROMPT).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        text: str = json.load(answer)["choices"][0]["text"]
    return text


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def session(pid: int) -> dict[int, str]:
    """Living processes of the engine's session with their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == pid and is_running(int(entry.name)):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def count(members: dict[int, str], module: str) -> int:
    return sum(f"-m {module} " in line for line in members.values())


def launch(folder: Path, *options: str) -> tuple[Running, subprocess.CompletedProcess[str]]:
    url = f"http://127.0.0.1:{(port := free_port())}"
    environ = {**os.environ, "HLAUNCH_STATE_DIR": str(folder), "NO_COLOR": "1"}
    environ.pop("MODEL_NAME", None)
    server = Running(url, environ)
    chosen = [part for option in (f"port={port}", "device=cpu", *options) for part in ("--set", option)]
    return server, server.hlaunch("up", "tiny-oss", "--detach", *chosen, check=False)


def state(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "instances/tiny-oss/state.json").read_text())
    return found


def test_two_engines_of_one_rank_each(running: Running, tmp_path: Path) -> None:
    server, up = launch(tmp_path, "dp=2")
    try:
        assert up.returncode == 0, up.stderr
        assert "rank 1: " in up.stderr
        members = session(state(tmp_path)["engine"]["pid"])
        assert count(members, "engine.core_process") == 2
        expected = complete(running.url)
        assert [complete(server.url) for _ in range(3)] == [expected] * 3
        (listed,) = json.loads(server.hlaunch("ps", "--json").stdout)
        assert listed["state"] == "ready"
        assert server.hlaunch("logs", "tiny-oss").returncode == 0
    finally:
        down = server.hlaunch("down", "tiny-oss", check=False)
    assert down.returncode == 0, down.stderr
    assert not any(is_running(pid) for pid in members)


def test_two_tensor_ranks_with_whole_experts(running: Running, tmp_path: Path) -> None:
    server, up = launch(tmp_path, "tp=2", "ep=true")
    try:
        assert up.returncode == 0, up.stderr
        record = state(tmp_path)
        members = session(record["engine"]["pid"])
        assert count(members, "engine.executor.multiproc_rank") == 2
        assert complete(server.url) == complete(running.url)
        shown = server.hlaunch("up", "tiny-oss", "--dry-run", "--json", "--set", "tp=2", "--set", "ep=true")
        blocks = json.loads(shown.stdout)["memory"][0]["num_blocks"]
        assert f"{blocks} blocks" in up.stdout
        assert ": shared memory (SHM/group), ranks 0-1" in up.stderr
        (pair,) = json.loads(server.hlaunch("status", "tiny-oss", "--json").stdout)["transports"]
        assert (pair["ranks"], pair["transport"]) == ([0, 1], "shared memory")
        # Without its launcher nothing of the engine goes on.
        os.kill(record["launcher"]["pid"], signal.SIGKILL)
        wait_for(lambda: not any(is_running(pid) for pid in members), 5)
    finally:
        down = server.hlaunch("down", "tiny-oss", check=False)
    assert down.returncode == 0, down.stderr


def test_sizes_that_cannot_be_placed_start_nothing(tmp_path: Path) -> None:
    result = subprocess.run(
        [*HLAUNCH, "up", "tiny-oss", "--port", "0", "--set", "tp=3", "--set", "device=cpu"],
        cwd=ROOT,
        env={**os.environ, "HLAUNCH_STATE_DIR": str(tmp_path)},
        text=True,
        capture_output=True,
        check=False,
    )
    assert result.returncode == 6
    assert "error: no placement: tp 3: 16 attention heads do not divide by it" in result.stderr.splitlines()
    (hint,) = (line for line in result.stderr.splitlines() if line.startswith("hint: possible: "))
    assert "--set tp=2" in hint.removeprefix("hint: possible: ").split("  or  ")
    assert not (tmp_path / "instances").exists()
