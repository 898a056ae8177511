"""What people see of a model that runs, as reviewed snapshots over a real tiny-oss server and a real terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from launcher_support import Launcher
from metrics_text import ranks, vllm
from screens_support import (
    ROOT,
    SCREENS,
    Pipe,
    Screens,
    Terminal,
    column,
    last_picture,
    masked,
    prepare,
    reviewed_names,
    same_width,
)
from stub_server import Stub, serving

from engine.config import BUNDLED_MODELS

REVIEWED = SCREENS / "running"

REGISTRY = """\
models:
  tiny: {model: tiny-oss, device: cpu, drain-timeout: 2s, ready: {timeout: 60s}}
  damaged: {model: ./damaged, device: cpu}
  cut: {model: ./cut, device: cpu}
  absent: {model: somebody/some-model}
"""
PORT = same_width(r"127\.0\.0\.1:\d{5}\b", "127.0.0.1:NNNNN")
PID = masked(r"\(pid \d+", "(pid N")
HOST = masked(
    r"^  \S+: \d+ cores? \(.*\), [\d.]+ [MG]iB of [\d.]+ [MG]iB free, GPUs: .*",
    "  HOST: N cores (CPU), N GiB of N GiB free, GPUs: any",
)
RANK = masked(r"^  rank 0: \S+ ", "  rank 0: HOST ")
MEMORY = masked(r"[\d.]+ GiB available", "N GiB available")
LINES = masked(
    r"^(  (?:\w+|\d in flight)) +\d+\.\d\d s(  [\d,]+ tokens/s)?",
    lambda found: f"{found[1]:<12}  N.NN s" + ("  N tokens/s" if found[2] else ""),
)
PHASE = masked(
    r"^(PHASE|launch|spawn|import|load|kv|warmup|ready) +(TIME|\d+\.\d\d s)",
    lambda found: f"{found[1]:<6}  {found[2] if found[2] == 'TIME' else 'N.NN s':>7}",
)
BAR = same_width(r"[█▏·]{24}", "█" * 24)
# Said every five seconds where a phase takes so long.
PROGRESS = masked(r"^  (spawn|import|load|kv|warmup|weights|\d in flight)\b(?! *\d+\.\d\d s| *failed).*\n", "")
UP = (PROGRESS, PORT, HOST, RANK, MEMORY, PHASE, BAR)


@dataclass(frozen=True)
class Here:
    """A folder with a server that runs, and what its start said."""

    folder: Path
    environ: dict[str, str]
    said: subprocess.CompletedProcess[str]


def argv(*args: str) -> list[str]:
    return [sys.executable, "-m", "launcher.cli", *args]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    folder = tmp_path_factory.mktemp("running")
    (folder / "model_registry.yml").write_text(REGISTRY)
    for name in ("damaged", "cut"):
        shutil.copytree(BUNDLED_MODELS["tiny-oss"], folder / name)
    weights = folder / "damaged/model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"lm_head.weight", b"lm_hair.weight", 1))
    os.truncate(folder / "cut/model.safetensors", 5_000_000)
    environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8"}

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(argv(*args), cwd=folder, env=environ, capture_output=True, text=True, check=False)

    said = run("up", "tiny", "-d", "--port", "0")
    try:
        yield Here(folder, environ, said)
    finally:
        run("down", "--all")


@pytest.fixture
def screens(here: Here, monkeypatch: pytest.MonkeyPatch) -> Screens:
    prepare(here.folder, monkeypatch, PYTHONPATH=str(ROOT))
    return Screens(here.folder, REVIEWED, monkeypatch)


def test_up(here: Here, screens: Screens) -> None:
    args = ["up", "tiny", "-d", "--port", "0"]
    text = screens.screen(args, here.said.stdout, here.said.stderr, here.said.returncode, (*UP, LINES))
    screens.compare("up", text)


def test_up_at_a_terminal(here: Here, screens: Screens) -> None:
    """The last picture of a terminal: bars gone, the table there; Ctrl-C ends it with a word."""
    outside, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    environ = {**here.environ, "TERM": "xterm-256color", "HLAUNCH_STATE_DIR": str(here.folder / "other")}
    process = subprocess.Popen(
        argv("up", "tiny", "--port", "0"), cwd=here.folder, env=environ, stdin=inside, stdout=inside, stderr=inside
    )
    os.close(inside)
    said, is_told = b"", False
    deadline = time.monotonic() + 60
    with contextlib.suppress(OSError):
        while time.monotonic() < deadline:
            if not select.select([outside], [], [], 1.0)[0]:
                continue
            said += os.read(outside, 65536)
            if b"Ctrl-C stops" in said and not is_told:
                process.send_signal(signal.SIGINT)
                is_told = True
    os.close(outside)
    code = process.wait(timeout=30)
    assert b"\x1b[" in said
    picture = last_picture(said.decode())
    screens.compare("up-terminal", screens.screen(["up", "tiny", "--port", "0"], picture, "", code, UP))


def test_up_fails(here: Here, screens: Screens) -> None:
    args = ["up", "damaged", "--port", "0"]
    done = subprocess.run(argv(*args), cwd=here.folder, env=here.environ, capture_output=True, text=True, check=False)
    text = screens.screen(args, done.stdout, done.stderr, done.returncode, (*UP, LINES))
    screens.compare("up-fails", text, 1)


SIMPLE = {
    "up-again": (["up", "tiny"], 5),
    "up-without-files": (["up", "absent"], 5),
    "up-cut-short": (["up", "cut"], 5),
    "ps": (["ps"], 0),
    "status": (["status", "tiny"], 0),
    "status-unknown": (["status", "tyni"], 4),
    "connect-env": (["connect", "env"], 0),
    "connect-claude": (["connect", "claude"], 0),
    "connect-codex": (["connect", "codex"], 0),
    "connect-opencode": (["connect", "opencode"], 0),
    "connect-openwebui": (["connect", "openwebui"], 0),
    "plan-diff": (["plan", "tiny", "--diff", "--set", "port=8001"], 0),
    "chat": (["chat", "tiny", "-m", "Hello!", "--temperature", "0", "--max-tokens", "16"], 0),
    "chat-no-server": (["chat", "tiny", "--url", "http://127.0.0.1:1", "-m", "Hello!"], 1),
}
TABLE = (column("PID", "N", 7), column("MEM", "N MiB", 9), column("UPTIME", "N s", 6))
DIFF = masked(r'"port": \d{5}', '"port": NNNNN')
FIGURES = [
    column(name, "N", max(6, len(name)))
    for name in ("TOK/S", "DECODE/S", "TTFT p50", "TTFT p99", "TPOT p50", "ITL p99")
]


@pytest.mark.parametrize("name", SIMPLE)
def test_screen_is_as_reviewed(name: str, screens: Screens) -> None:
    args, code = SIMPLE[name]
    screens.check(name, args, code, PORT, PID, DIFF, *TABLE)


def test_bench(screens: Screens) -> None:
    args = ["bench", "tiny", "-c", "1,2", "--runs", "1", "--input", "8", "--output", "4"]
    screens.check("bench", args, 0, PROGRESS, PORT, LINES, *FIGURES, drawn=r"  \d in flight")


def test_top(screens: Screens) -> None:
    stub = Stub({"/metrics": (200, (vllm(values={"num_requests_running": 3.0}) + ranks(10.0)).encode())})
    with serving(stub):
        screens.check("top", ["top", "--url", stub.url, "--once", "--interval", "0.1"], 0, PORT)


def test_synth(screens: Screens) -> None:
    rate = masked(r"\d+\.\d\d s  ([\d.]+ MB written, )[\d.]+ [MG]B/s", r"N.NN s  \1N MB/s")
    args = ["synth", "tiny", "random", "--layers", "1"]
    screens.compare("synth", screens.shown(args, Pipe, [PROGRESS, rate]))
    screens.compare("synth-again", screens.shown(args, Terminal, [PROGRESS, rate]))


def test_down(hlaunch: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(hlaunch.folder, monkeypatch, HLAUNCH_STATE_DIR=str(hlaunch.state))
    screens = Screens(hlaunch.folder, REVIEWED, monkeypatch)
    for name in ("down", "down-all"):
        hlaunch.up("ok", "--detach").communicate()
        args = ["down", "tiny-oss"] if name == "down" else ["down", "--all"]
        screens.compare(name, screens.shown(args, Terminal))
    screens.check("down-again", ["down", "tiny-oss"])
    screens.check("down-nothing", ["down", "--all"])
    screens.check("down-unknown", ["down", "tyni"], 4)
    screens.check("ps-nothing", ["ps"])
    hlaunch.fail_up("die")
    screens.check("logs", ["logs", "tiny-oss"], 0, masked(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "YYYY-MM-DD hh:mm:ss"))


def test_every_reviewed_screen_is_of_a_case() -> None:
    started = {"up", "up-terminal", "up-fails", "bench", "top", "synth", "synth-again"}
    ended = {"down", "down-all", "down-again", "down-nothing", "down-unknown", "ps-nothing", "logs"}
    assert reviewed_names(REVIEWED) == {*SIMPLE, *started, *ended}
