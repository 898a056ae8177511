"""Which words a start is recorded with, and which words a shell is offered."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from launcher_support import Launcher, alive
from screens_support import ROOT, prepare

from launcher.cli import COMMANDS, _build, run
from launcher.commands import Invocation
from launcher.commands.completion import SCRIPTS, candidates
from launcher.commands.launch_view import LaunchView
from launcher.commands.replacing import inventory_without
from launcher.commands.restart import Words, recorded_words
from launcher.console import Console
from launcher.plan import Gpu, Inventory, LaunchPlan
from launcher.plan.inventory.values import GpuProcess
from launcher.supervise.instance import InstanceFolder, state_root
from launcher.supervise.status import Ready
from launcher.supervise.timeline import Timeline

REGISTRY = """\
profiles:
  small: {max-model-len: 256}
models:
  tiny: {model: tiny-oss, aliases: [small], device: cpu}
  other: {model: tiny-oss}
"""
CLUSTER = """\
  far: {model: tiny-oss, cluster: pair, device: cpu, host: 10.9.0.1, insecure-no-auth: true}
clusters:
  pair:
    nodes:
      - {name: one, role: head, ip: 10.9.0.1, ssh: one}
      - {name: two, role: worker, ip: 10.9.0.2, ssh: two}
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
    front = ["--file", str(folder / "model_registry.yml")]
    # The same file is meant whether it was named, or found where `up` was typed.
    for named in (["-f", "model_registry.yml"], []):
        assert run([*named, "up", "small", "--set", "max-num-seqs=2", "--port", "8123"]) == 0
        options = ["--set", "max-num-seqs=2", "--port", "8123", "--detach", "--nnodes", "1"]
        assert recorded_words(kept) == Words(front, [*options, "--", "tiny"], [])
    monkeypatch.setenv("A_KEY", "canary-canary")
    assert run(["up", "tiny", "--set", "api-key=${A_KEY}"]) == 0
    assert "api-key=${A_KEY}" in (recorded_words(kept) or Words([], [], [])).rest
    assert run(["up", "tiny", "--set", "api-key=canary-canary"]) == 0
    assert recorded_words(kept) is None
    # What the environment has set belongs to the start too; of a secret the name is enough.
    monkeypatch.setenv("HLAUNCH_API_KEY", "canary-canary")
    monkeypatch.setenv("HLAUNCH_MAX_NUM_SEQS", "3")
    monkeypatch.setenv("HLAUNCH_PROFILE", "small")
    monkeypatch.setenv("HLAUNCH_PORT", "8123")
    assert run(["up", "tiny", "--set", "port=8124"]) == 0
    options = ["--set", "port=8124", "--port", "8124", "--detach", "--nnodes", "1", "--set", "max-num-seqs=3"]
    words = Words([*front, "--profile", "small"], [*options, "--", "tiny"], ["HLAUNCH_API_KEY"])
    assert recorded_words(kept) == words
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
        # What an option takes is no NAME, wherever the option stands, and however a shell parts it.
        (["up", "--set", "port=1", "sm"], ["small"]),
        (["up", "--set", "port", "=", "1", "sm"], ["small"]),
        (["up", "--set", ""], []),
        (["up", "-d", "--port", "80", "ti"], ["tiny"]),
        (["serve", "--port", "80", "ti"], ["tiny"]),
        (["--file=mine.yml", "show", ""], ["mine"]),
        (["--file", "=", "mine.yml", "show", ""], ["mine"]),
        (["show", "--file", "mine.yml", ""], ["mine"]),
        (["logs", "-f", "-n", "5", "ot"], ["other"]),
        (["up", "--", "ti"], ["tiny"]),
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


def test_what_cannot_start_again_is_not_stopped(hlaunch: Launcher) -> None:
    """The launcher is real and stays the same process; in its engine's place is a stand-in."""
    process = hlaunch.up("ok", "--detach")
    assert process.wait(timeout=20) == 0
    pid = hlaunch.ready()["launcher"]["pid"]
    record = hlaunch.state / "instances" / "tiny-oss" / "up.json"
    rest = ["--detach", "--", "tiny-oss"]
    record.write_text(json.dumps({"front": ["--file", str(hlaunch.registry)], "rest": rest, "variables": []}))
    text = hlaunch.registry.read_text()
    entry = "tiny-oss: {model: tiny-oss,"
    for broken, code, cause in (
        ("models: [", 3, "error: "),
        (text.replace(entry, f"{entry} max-model-len: 9m,"), 6, "max-model-len"),
        (text.replace(entry, f"{entry} api-key: '${{NOT_SET}}',"), 5, "NOT_SET"),
    ):
        hlaunch.registry.write_text(broken)
        done = hlaunch.cli("restart", "tiny-oss")
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert cause in done.stderr
        assert hlaunch.ready()["launcher"]["pid"] == pid
        assert alive(pid)
    # So does what was started with a key that is not at hand now.
    hlaunch.registry.write_text(text)
    record.write_text(json.dumps({"front": [], "rest": rest, "variables": ["HLAUNCH_API_KEY"]}))
    done = hlaunch.cli("restart", "tiny-oss")
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr == (
        "error: tiny-oss was started with $HLAUNCH_API_KEY, which is not set here; it runs on\n"
        "hint: export HLAUNCH_API_KEY=…, then: hlaunch restart tiny-oss\n"
    )
    assert alive(pid)


def test_a_successor_counts_on_the_memory_of_what_it_replaces(hlaunch: Launcher) -> None:
    process = hlaunch.up("ok", "--detach")
    assert process.wait(timeout=20) == 0
    pid = hlaunch.ready()["launcher"]["pid"]
    folder = InstanceFolder(hlaunch.state, "tiny-oss")
    other = GpuProcess(1, "other", 8)
    gpu = Gpu(0, "one", memory_bytes=80, free_bytes=2, processes=(GpuProcess(pid, "ours", 70), other))
    host = Inventory("here", "", 2, 1, memory_total_bytes=1 << 40, memory_available_bytes=1 << 20, gpus=(gpu,))
    freed = inventory_without(host, folder)
    assert freed.memory_available_bytes > 1 << 20
    assert freed.gpus == (replace(gpu, free_bytes=72, processes=(other,)),)
    # In a container the driver tells other numbers: nothing is known then of a GPU that is in use.
    strange = replace(host, gpus=(replace(gpu, processes=(other,)),))
    assert inventory_without(strange, folder).gpus[0].free_bytes == 2, "it runs on the CPU"
    folder.config_file.write_text('{"device": "cuda:0"}')
    assert inventory_without(strange, folder).gpus[0].free_bytes == 0
    assert inventory_without(host, InstanceFolder(hlaunch.state, "nobody")) == host


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["up", "tiny", "--runtime", "process"], "--runtime is for a cluster, and tiny has none"),
        (["up", "far", "--port", "0"], "far runs on a cluster, where nobody looks for a free port"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], args: list[str], problem: str
) -> None:
    (folder / "model_registry.yml").write_text(REGISTRY + CLUSTER)
    assert run(args) == 2
    assert problem in capsys.readouterr().err


def test_a_cluster_serves_at_the_port_that_was_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model_registry.yml").write_text(REGISTRY + CLUSTER)
    assert run(["up", "far", "--port", "8765", "--dry-run", "--json"]) == 0
    assert "8765" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "x" * 300, "é" * 100])
@pytest.mark.parametrize("command", [["status"], ["restart"], ["connect", "env"], ["down"], ["logs"]])
def test_a_name_that_no_file_can_have_is_unknown(
    folder: Path, capsys: pytest.CaptureFixture[str], command: list[str], name: str
) -> None:
    (state_root(os.environ) / "instances").mkdir(parents=True)
    assert run([*command, name]) == 4
    assert capsys.readouterr().err.startswith("error: ")


def test_a_registry_that_cannot_be_read_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model_registry.yml").write_text("models: [")
    assert run(["status", "small"]) == 4
    said = capsys.readouterr().err
    assert said.startswith("error: nothing runs under the name 'small'\n  the registry cannot be read: ")
    assert "model_registry.yml:1:" in said


def test_hints_say_what_a_person_would_type(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model_registry.yml").write_text(REGISTRY + CLUSTER)
    for name, line in (("far", "hlaunch up far"), ("tiny", "hlaunch up tiny -d")):
        assert run(["status", name]) == 1
        assert capsys.readouterr().err.endswith(f"hint: start it: {line}\n")
    for word in ("serve", "run"):
        assert run([word, "--help"]) == 0
        assert "hlaunch up tiny-oss --dry-run" in capsys.readouterr().out


def test_an_entry_that_has_moved_does_not_run_twice(hlaunch: Launcher) -> None:
    """On this host while the registry now names a cluster, and the other way round; no node of it can be reached."""
    process = hlaunch.up("ok", "--detach")
    assert process.wait(timeout=20) == 0
    pid = hlaunch.ready()["launcher"]["pid"]
    hlaunch.environ["HLAUNCH_SSH"] = shutil.which("false") or "false"
    text = hlaunch.registry.read_text()
    far = "tiny-oss: {model: tiny-oss, cluster: pair, device: cpu, host: 10.9.0.1, insecure-no-auth: true,"
    hlaunch.registry.write_text(text.replace("tiny-oss: {model: tiny-oss,", far) + CLUSTER)
    refused = hlaunch.cli("up", "tiny-oss")
    assert (refused.returncode, refused.stdout) == (5, "")
    assert "error: tiny-oss is running on this host\n" in refused.stderr
    assert alive(pid)
    moved = hlaunch.cli("up", "tiny-oss", "--replace", "--yes")
    assert moved.returncode != 0
    assert moved.stdout == "tiny-oss: stopped\n"
    assert not alive(pid)
    hlaunch.registry.write_text(text)
