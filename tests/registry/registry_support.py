"""What the registry's tests share: a small registry, the command in this process and in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.cli import run
from launcher.registry import ResolvedEntry, parse_registry, resolve

ROOT = Path(__file__).parents[2]
SEED = Path(__file__).with_name("seed.yml")

REGISTRY = """\
defaults:
  max-num-seqs: 4
  env: {SHARED: low, GONE: x}
models:
  first:
    model: tiny-oss
    aliases: [one]
    description: "[/red] first"
    tags: [cpu]
    max-num-seqs: 8
    ready: {timeout: 20s}
    env: {SHARED: high, GONE: }
  second: {model: org/name}
"""


@dataclass(frozen=True, slots=True)
class Result:
    code: int
    out: str
    err: str


@dataclass(slots=True)
class Here:
    """The command in this process: its boundary catches everything, so this is what a user gets, faster."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capture: pytest.CaptureFixture[str]

    def write(self, text: str | bytes, name: str = "model_registry.yml") -> Path:
        path = self.folder / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def __call__(self, *args: str, **environ: str) -> Result:
        with self.monkeypatch.context() as patch:
            patch.chdir(self.folder)
            for name in [name for name in os.environ if name.startswith("HLAUNCH_") or name == "MODEL_NAME"]:
                patch.delenv(name)
            for name, value in {"HLAUNCH_STATE_DIR": str(self.folder / "state"), **environ}.items():
                patch.setenv(name, value)
            self.capture.readouterr()
            code = run(list(args))
            out, err = self.capture.readouterr()
        return Result(int(code), out, err)


def process(folder: Path, *args: str, **environ: str) -> Result:
    """The command as a shell starts it, with next to nothing in its environment."""
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", *args],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT), **environ},
        text=True,
        capture_output=True,
        timeout=30,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def one(block: str, environ: dict[str, str] | None = None, overrides: tuple[str, ...] = ()) -> ResolvedEntry:
    """Resolve the only entry of a registry, `m`, whose options are `block`."""
    indented = "".join(f"    {line}\n" for line in block.splitlines())
    return resolve(parse_registry(f"models:\n  m:\n    model: tiny-oss\n{indented}"), "m", environ, overrides)
