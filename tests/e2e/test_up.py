"""`hlaunch up` with the true engine: ready, served, ended, and what is left of it when something is killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_support import HLAUNCH, ROOT, free_port, is_running

from engine.config import BUNDLED_MODELS


class Up:
    """One foreground `hlaunch up tiny-oss` with a state folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.environ = {**os.environ, "HLAUNCH_STATE_DIR": str(self.state), "NO_COLOR": "1"}
        self.environ.pop("MODEL_NAME", None)
        self.began = time.monotonic()
        self.port = free_port()
        self.errors = folder / "stderr"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [*HLAUNCH, "up", "tiny-oss", "--port", str(self.port)],
                cwd=ROOT,
                env=self.environ,
                text=True,
                stdout=subprocess.PIPE,
                stderr=errors,
            )

    def record(self) -> dict[str, Any]:
        path = self.state / "instances/tiny-oss/state.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return found

    def ready(self) -> dict[str, Any]:
        wait_for(lambda: self.record().get("state") == "ready" or self.process.poll() is not None, 30)
        assert self.process.poll() is None, self.errors.read_text()
        return self.record()

    def ended(self, seconds: float = 15) -> tuple[int, str, list[str]]:
        out, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, self.errors.read_text().splitlines()


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    started = Up(tmp_path)
    yield started
    if started.process.poll() is None:
        started.process.kill()
    started.process.communicate()


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def session(pid: int) -> list[int]:
    """Living processes of the engine's session: the API process and its core."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == pid and fields[0] not in ("Z", "X"):
                found.append(int(entry.name))
    return found


def test_the_printed_curl_line_works_and_ctrl_c_exits_0(up: Up) -> None:
    record = up.ready()
    # How long it may take is bench/startup.py's business.
    assert record["ready_seconds"] > 0
    with urllib.request.urlopen(f"{record['url']}/health") as answer:
        assert answer.status == 200
    assert len(session(record["engine"]["pid"])) >= 2
    lines: list[str] = []
    assert up.process.stdout is not None
    while not any(line.startswith("curl ") for line in lines):
        lines.append(up.process.stdout.readline())
    command = lines[-1]
    body = json.loads(re.search(r"-d '(.*)'", command)[1])  # type: ignore[index]
    request = urllib.request.Request(
        f"{record['url']}/v1/chat/completions",
        json.dumps(body | {"max_tokens": 64, "temperature": 0}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["choices"][0]["message"]["content"]
    phases = [line.split()[0] for line in lines[1:] if line.strip()]
    assert phases[:1] == ["launch"]
    assert {"import", "load", "kv", "warmup", "ready"} <= set(phases)
    up.process.send_signal(signal.SIGINT)
    code, _, errors = up.ended()
    assert code == 0, errors
    assert errors[-1] == "stopped"
    assert not session(record["engine"]["pid"])


def test_kill_of_the_engine_ends_up_with_its_cause(up: Up) -> None:
    record = up.ready()
    began = time.monotonic()
    os.kill(record["engine"]["pid"], signal.SIGKILL)
    code, _, errors = up.ended()
    assert time.monotonic() - began < 5
    assert (code, errors[-1]) == (1, "error: the engine was killed by SIGKILL while serving")
    wait_for(lambda: not session(record["engine"]["pid"]), 5)


def test_an_engine_whose_core_is_killed_is_started_again(up: Up) -> None:
    record = up.ready()
    server = record["engine"]["pid"]
    (core,) = (pid for pid in session(server) if pid != server)
    os.kill(core, signal.SIGKILL)
    wait_for(lambda: any(pid not in (server, core) for pid in session(server)), 10)

    def is_ready() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{up.port}/health") as answer:
            return answer.status == 200
        return False

    wait_for(is_ready, 20)
    up.process.send_signal(signal.SIGINT)
    code, _, errors = up.ended()
    assert code == 0, errors
    told = next(line for line in errors if "the engine core was killed by SIGKILL" in line)
    assert ", and rank 0 (node localhost, cpu) with it; phase serve" in told
    assert "started again in 1 s" in told
    wait_for(lambda: not session(server), 5)


def test_kill_of_the_launcher_leaves_no_process(up: Up) -> None:
    record = up.ready()
    members = session(record["engine"]["pid"])
    assert len(members) >= 2
    up.process.kill()
    wait_for(lambda: not any(is_running(pid) for pid in members), 5)


def test_kill_of_the_launcher_during_the_start_leaves_no_process(up: Up) -> None:
    wait_for(lambda: len(session((up.record().get("engine") or {"pid": -1})["pid"])) >= 2, 10)
    members = session(up.record()["engine"]["pid"])
    up.process.kill()
    wait_for(lambda: not any(is_running(pid) for pid in members), 5)


def test_a_port_in_use_is_one_line_and_5(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = subprocess.run(
            [*HLAUNCH, "up", "tiny-oss", "--port", str(port)],
            cwd=ROOT,
            env={**os.environ, "HLAUNCH_STATE_DIR": str(tmp_path)},
            text=True,
            capture_output=True,
            check=False,
        )
    assert result.returncode == 5
    error, hint = result.stderr.splitlines()[-2:]
    assert error.startswith(f"error: port {port} on 127.0.0.1 is in use by pid {os.getpid()}")
    assert hint.startswith("hint: ")


def test_the_fit_preview_agrees_with_what_was_allocated(up: Up) -> None:
    record = up.ready()
    result = subprocess.run(
        [*HLAUNCH, "up", "tiny-oss", "--dry-run", "--json"], cwd=ROOT, env=up.environ, capture_output=True, check=True
    )
    fit = json.loads(result.stdout)["fit"]
    assert up.process.stdout is not None
    details = ""
    while "ready at" not in details:
        details += up.process.stdout.readline()
    load = re.search(r"load .* ([0-9.]+) MiB of weights", details)
    blocks = re.search(r"kv .* ([0-9]+) blocks", details)
    assert load is not None
    assert blocks is not None
    assert float(load[1]) * 2**20 == pytest.approx(fit["weight_bytes"], rel=0.03)
    assert int(blocks[1]) == fit["kv_blocks"]
    assert record["state"] == "ready"


@pytest.mark.parametrize(
    ("file", "keep", "code", "cause"),
    [
        ("model.safetensors", 5_000_000, 5, "is cut short: 5000000 of"),
        ("model.safetensors", 100, 5, "header of "),
        ("tokenizer.json", 100, 1, "tokenizer.json"),
        ("config.json", 100, 5, "config.json: not valid JSON"),
    ],
)
@pytest.mark.parametrize("options", [(), ("--detach",)])
def test_a_damaged_file_is_the_cause_in_the_last_line(
    tmp_path: Path, file: str, keep: int, code: int, cause: str, options: tuple[str, ...]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED_MODELS["tiny-oss"], folder)
    os.truncate(folder / file, keep)
    (tmp_path / "model_registry.yml").write_text("models: {m: {model: ./model}}\n")
    began = time.monotonic()
    result = subprocess.run(
        [*HLAUNCH, "up", "m", "--port", "0", *options],
        cwd=tmp_path,
        env={**os.environ, "HLAUNCH_STATE_DIR": str(tmp_path / "state"), "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        check=False,
    )
    assert time.monotonic() - began < 15
    errors = [line for line in result.stderr.splitlines() if not line.startswith(("hint: ", "  looked in"))]
    assert result.returncode == code, result.stderr
    assert errors[-1].startswith("error: ")
    assert cause in errors[-1]
