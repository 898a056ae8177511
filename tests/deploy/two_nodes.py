"""Two network namespaces joined by a cable of the kernel: two nodes with their own addresses on one machine."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HEAD_IP, WORKER_IP = "10.77.0.1", "10.77.0.2"


def why_not() -> str:
    """Say why namespaces cannot be made here; empty when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "no `ip` (iproute2) here"
    probe = f"hlp{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"no network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=False)
    return ""


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s")
        time.sleep(0.1)
    return value


@dataclass
class TwoNodes:
    """The pair; `run` executes a command on one of them."""

    folder: Path
    tag: str = field(default_factory=lambda: secrets.token_hex(2))

    @property
    def names(self) -> tuple[str, str]:
        return f"hlh{self.tag}", f"hlw{self.tag}"

    @contextlib.contextmanager
    def connected(self) -> Iterator[TwoNodes]:
        head, worker = self.names
        try:
            for name in self.names:
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
            cable = (f"vh{self.tag}", f"vw{self.tag}")
            _ip("link", "add", cable[0], "netns", head, "type", "veth", "peer", "name", cable[1], "netns", worker)
            for name, device, address in ((head, cable[0], HEAD_IP), (worker, cable[1], WORKER_IP)):
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
                _ip("-n", name, "link", "set", device, "up")
            yield self
        finally:
            for name in self.names:
                pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
                for pid in pids.split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), 9)
                subprocess.run(["ip", "netns", "del", name], check=False)

    def run(self, role: str, *argv: str, seconds: float = 30) -> subprocess.CompletedProcess[str]:
        """Run a command of this checkout inside a node."""
        name = self.names[0] if role == "head" else self.names[1]
        return subprocess.run(
            ["ip", "netns", "exec", name, *argv],
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], "HOME": str(self.folder), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def pids(self) -> list[int]:
        """Every process that runs in one of the two."""
        found = []
        for name in self.names:
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
            found += [int(pid) for pid in listed.split()]
        return found


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)


@dataclass
class RunningNode:
    """One node, started by `launcher.node start`."""

    nodes: TwoNodes
    role: str
    plan: Path
    run_folder: Path
    log: Path

    def start(self) -> None:
        done = self.nodes.run(
            self.role, sys.executable, "-m", "launcher.node", "start", "--plan", str(self.plan), "--log", str(self.log)
        )
        assert done.returncode == 0, done.stderr

    def probe(self, question: str) -> subprocess.CompletedProcess[str]:
        return self.nodes.run(
            self.role, sys.executable, "-m", "launcher.probe", question, "--folder", str(self.run_folder)
        )

    def status(self) -> dict[str, Any]:
        """The report, empty while nobody answers."""
        answer = self.probe("status")
        loaded: dict[str, Any] = json.loads(answer.stdout) if answer.returncode == 0 else {}
        return loaded

    def stop(self) -> dict[str, Any]:
        done = self.nodes.run(
            self.role, sys.executable, "-m", "launcher.node", "stop", "--folder", str(self.run_folder), seconds=60
        )
        assert done.returncode == 0, done.stderr
        loaded: dict[str, Any] = json.loads(done.stdout)
        return loaded

    def text(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""
