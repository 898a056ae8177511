"""Real processes for the launcher's tests: start them, wait with a bound, count what is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RUN_UP = Path(__file__).with_name("run_up.py")

REGISTRY = """\
models:
  tiny-oss: {model: tiny-oss, aliases: [tiny], ready: {timeout: 20s}, drain-timeout: 3s}
  other: {model: tiny-oss}
  public: {model: tiny-oss, host: 0.0.0.0}
  keyed: {model: tiny-oss, api-key: "${TEST_API_KEY}"}
  gpt-oss-20b: {model: openai/gpt-oss-20b, max-num-seqs: 8, max-model-len: 4096}
  gpt-oss-120b: {model: openai/gpt-oss-120b}
  parallel: {model: tiny-oss, tp: 2}
"""


def wait_for(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Poll until `condition` is true; fail the test after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s")
        time.sleep(0.02)


def _stat(pid: int | str) -> list[str] | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    fields = _stat(pid)
    return fields is not None and fields[0] not in ("Z", "X")


def session(pid: int) -> list[int]:
    """Living processes of the session that `pid` began."""
    found = [(int(entry), _stat(entry)) for entry in os.listdir("/proc") if entry.isdigit()]
    return [entry for entry, fields in found if fields and int(fields[3]) == pid and fields[0] not in ("Z", "X")]


@dataclass
class Launcher:
    """hlaunch in a state folder and a registry of its own."""

    folder: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.registry = self.folder / "model_registry.yml"
        self.registry.write_text(REGISTRY)
        self.state = self.folder / "state"
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "HLAUNCH_STATE_DIR": str(self.state),
            "PYTHONPATH": str(ROOT),
        }

    def up(self, mode: str, *options: str) -> subprocess.Popen[str]:
        """Start `up` with the stand-in engine, its output captured."""
        process = subprocess.Popen(
            [sys.executable, str(RUN_UP), mode, *options],
            cwd=self.folder,
            env=self.environ,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.started.append(process)
        return process

    def fail_up(self, mode: str, *options: str, seconds: float = 20) -> tuple[int, list[str]]:
        """Run an `up` that ends by itself; return its exit code and the lines of its stderr."""
        process = self.up(mode, *options)
        _, errors = process.communicate(timeout=seconds)
        return process.returncode, errors.splitlines()

    def cli(self, *args: str, seconds: float = 30) -> subprocess.CompletedProcess[str]:
        """Run a command of the product to its end."""
        return subprocess.run(
            [sys.executable, "-m", "launcher.cli", *args],
            cwd=self.folder,
            env=self.environ,
            text=True,
            capture_output=True,
            timeout=seconds,
            check=False,
        )

    def record(self, name: str = "tiny-oss") -> dict[str, Any] | None:
        """The instance's state.json, None while there is none."""
        path = self.state / "instances" / name / "state.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def ready(self, name: str = "tiny-oss") -> dict[str, Any]:
        """Wait until the instance is ready; return its record."""

        def look() -> dict[str, Any] | None:
            found = self.record(name)
            return found if found is not None and found["state"] == "ready" else None

        found: dict[str, Any] = wait_for(look)
        return found

    def close(self) -> None:
        """Leave nothing behind, whatever the test did."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.communicate()
        self.cli("down", "--all")
