"""Two hosts on one machine: network namespaces joined by a veth pair, and an `ssh` that enters them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

_SSH = """\
#!/bin/sh
# Stands in for ssh: the destination names a network namespace, the rest is a command for a shell there.
while [ "$1" != "--" ]; do shift; done
destination=$2
shift 2
case "$destination" in
  refused) echo "ssh: connect to host refused port 22: Connection refused" >&2; exit 255 ;;
  stranger) echo "geo@stranger: Permission denied (publickey)." >&2; exit 255 ;;
  silent*) exec sleep 60 ;;
  bare) echo "sh: 1: python3: not found" >&2; exit 127 ;;
  chatty) yes; exit 0 ;;
  here) exec sh -c "$*" ;;
esac
exec ip netns exec "$destination" sh -c "$*"
"""


@dataclass(frozen=True, slots=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def codes(self, *severities: str) -> set[str]:
        found = self.json["findings"]
        return {item["code"] for item in found if not severities or item["severity"] in severities}

    def finding(self, code: str) -> dict[str, str]:
        found = [item for item in self.json["findings"] if item["code"] == code]
        assert found, self.out
        first: dict[str, str] = found[0]
        return first


class Hosts:
    """A folder with a registry, programs that stand in for ssh and python3, and the command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = folder / "bin"
        self.programs.mkdir()
        self._program("ssh", _SSH)
        self._program("python3", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')

    def _program(self, name: str, text: str) -> None:
        path = self.programs / name
        path.write_text(text)
        path.chmod(0o755)

    def registry(self, text: str) -> None:
        (self.folder / "model_registry.yml").write_text(text)

    def cli(self, *args: str, seconds: float = 150, **environ: str) -> Result:
        """Run a command of the product to its end, in a process of its own."""
        done = subprocess.run(
            [sys.executable, "-m", "launcher.cli", *args],
            cwd=self.folder,
            env={
                "PATH": f"{self.programs}:{os.environ['PATH']}:/usr/sbin:/sbin",
                "HOME": str(self.folder),
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                **environ,
            },
            text=True,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True, timeout=10)


class Namespaces:
    """Two namespaces `a` and `b`, joined by `veth-a` and `veth-b` with 10.77.0.1 and 10.77.0.2."""

    def __init__(self) -> None:
        self.names = {side: f"hl{os.getpid()}{side}" for side in "ab"}

    def __getitem__(self, side: str) -> str:
        return self.names[side]

    def make(self) -> None:
        for name in self.names.values():
            ip("netns", "add", name)
        ip("link", "add", "veth-a", "netns", self["a"], "type", "veth", "peer", "name", "veth-b", "netns", self["b"])
        for number, side in enumerate("ab", start=1):
            ip("-n", self[side], "addr", "add", f"10.77.0.{number}/24", "dev", f"veth-{side}")
            ip("-n", self[side], "link", "set", f"veth-{side}", "up")
            ip("-n", self[side], "link", "set", "lo", "up")

    def remove(self) -> None:
        for name in self.names.values():
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=10)
