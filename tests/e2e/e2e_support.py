"""The running server as a value, and how its tests call `hlaunch`."""

from __future__ import annotations

import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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


def is_running(pid: int) -> bool:
    """Whether a process still runs; one that only waits for its new parent to read its status does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
