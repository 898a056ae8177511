"""Which words a start is recorded with, and which words a shell is offered."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from screens_support import ROOT, prepare

from launcher.cli import COMMANDS, _build, run
from launcher.commands import Invocation
from launcher.commands.completion import SCRIPTS, candidates
from launcher.commands.launch_view import LaunchView
from launcher.commands.restart import _words
from launcher.console import Console
from launcher.plan import LaunchPlan
from launcher.supervise.instance import InstanceFolder, state_root
from launcher.supervise.status import Ready
from launcher.supervise.timeline import Timeline

REGISTRY = """\
models:
  tiny: {model: tiny-oss, aliases: [small], device: cpu}
  other: {model: tiny-oss}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    prepare(tmp_path, monkeypatch)
    (tmp_path / "model_registry.yml").write_text(REGISTRY)
    return tmp_path


def test_a_start_on_this_host_is_recorded_without_secrets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start itself is left out: only that it takes place, and with which words it could be repeated."""
    kept = InstanceFolder(state_root(os.environ), "tiny")

    def launch(*_: object, on_lock: object, **__: object) -> int:
        kept.create()
        assert callable(on_lock)
        on_lock(kept)
        return 0

    monkeypatch.setattr("launcher.commands.up.launch", launch)
    assert run(["-f", "model_registry.yml", "up", "small", "--set", "max-num-seqs=2", "--port", "8123"]) == 0
    assert _words(kept) == [
        "--file", str(folder / "model_registry.yml"),
        "up", "--set", "max-num-seqs=2", "--port", "8123", "--detach", "--nnodes", "1", "--", "tiny",
    ]  # fmt: skip
    monkeypatch.setenv("A_KEY", "canary-canary")
    assert run(["up", "tiny", "--set", "api-key=${A_KEY}"]) == 0
    assert "api-key=${A_KEY}" in (_words(kept) or [])
    assert run(["up", "tiny", "--set", "api-key=canary-canary"]) == 0
    assert _words(kept) is None
    assert "canary" not in "".join(path.read_text() for path in folder.rglob("*") if path.is_file())


def test_what_is_started_for_one_command_is_not_told_how_to_stop(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`chat` and `bench` end what they have started by themselves."""
    views = []

    def launch(console: Console, plan: LaunchPlan, *, is_transient: bool, is_detached: bool, **_: object) -> int:
        views.append(LaunchView(console, plan, is_detached, is_transient=is_transient))
        views[-1].ready(Ready("http://127.0.0.1:1", "m", 0.0), Timeline(0.0))
        return 0

    monkeypatch.setattr("launcher.commands.up.launch", launch)
    assert run(["up", "tiny", "-d", "--transient"]) == 0
    said = capsys.readouterr().err
    assert "stop with" not in said
    assert "it is stopped after this command" in said
    assert run(["up", "tiny", "-d"]) == 0
    assert "stop with: hlaunch down tiny" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["re"], ["render", "restart", "registry"]),
        (["plan", ""], ["tiny", "small", "other"]),
        (["plan", "sm"], ["small"]),
        (["-f", "mine.yml", "show", ""], ["mine"]),
        (["plan", "tiny", ""], []),
        (["plan", "--ag"], ["--against"]),
        (["registry", "s"], ["set"]),
        (["registry", "set", "o"], ["other"]),
        (["connect", "co"], ["codex"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
        (["down", ""], []),
        (["--pl"], ["--plain"]),
    ],
)
def test_a_shell_is_offered_what_fits(folder: Path, typed: list[str], words: list[str]) -> None:
    (folder / "mine.yml").write_text("models: {mine: {model: tiny-oss}}\n")
    root = _build()
    invocation = Invocation(Console(is_plain=True), dict(os.environ), folder)
    assert sorted(candidates(invocation, root, typed)) == sorted(words)
    assert candidates(invocation, root, []) == list(COMMANDS)


def test_bash_completes_a_name(folder: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    (bin_folder := folder / "bin").mkdir()
    (bin_folder / "hlaunch").write_text(f'#!/bin/sh\nexec {sys.executable} -m launcher.cli "$@"\n')
    (bin_folder / "hlaunch").chmod(0o755)
    script = SCRIPTS["bash"] + 'COMP_WORDS=(hlaunch plan ti); COMP_CWORD=2; _hlaunch; echo "${COMPREPLY[@]}"\n'
    environ = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "HOME": str(folder), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [bash, "-c", script], cwd=folder, env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "tiny\n", "")
    # A registry that is broken completes to nothing, without a word.
    (folder / "model_registry.yml").write_text("models: [")
    done = subprocess.run(
        [bash, "-c", script], cwd=folder, env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("\n", "")
