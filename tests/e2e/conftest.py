"""A real `hlaunch up tiny-oss`, detached, shared by the tests of one run: real processes, real sockets."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HLAUNCH = (sys.executable, "-m", "launcher.cli")


@dataclass(frozen=True)
class Running:
    """A served tiny-oss and the environment in which `hlaunch` finds it."""

    url: str
    environ: dict[str, str]

    def hlaunch(self, *args: str, stdin: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*HLAUNCH, *args], env=self.environ, cwd=ROOT, input=stdin, capture_output=True, text=True, check=check
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("hlaunch")
    port = free_port()
    environ = {**os.environ, "HLAUNCH_STATE_DIR": str(folder), "NO_COLOR": "1"}
    environ.pop("MODEL_NAME", None)
    server = Running(f"http://127.0.0.1:{port}", environ)
    up = server.hlaunch("up", "tiny-oss", "--detach", "--set", f"port={port}", check=False)
    assert up.returncode == 0, up.stderr
    listed = json.loads(server.hlaunch("ps", "--json").stdout)
    yield server
    down = server.hlaunch("down", "tiny-oss", check=False)
    assert down.returncode == 0, down.stderr
    pids = [entry["launcher"]["pid"] for entry in (listed if isinstance(listed, list) else listed["instances"])]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
