"""A launch on nodes is started again as it was, and what replaces it is shown before; behind ssh are stand-ins."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_fabric_transports import REGISTRY, StandIns

from launcher.supervise.instance import InstanceFolder, state_root
from launcher.supervise.running_files import files_folder

SAID = "engine: host:4:7 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] via NET/IB/0\n"
UP = ("up", "tiny-oss", "--runtime", "process", "--port", "8123")


@pytest.fixture
def stand_ins(tmp_path: Path) -> Iterator[StandIns]:
    made = StandIns(tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.log").write_text(SAID)
    (tmp_path / "model_registry.yml").write_text(REGISTRY.replace("    nodes:", "    ray: {}\n    nodes:"))
    yield made
    assert made.cli("down", "--all").code == 0


def test_a_launch_is_started_again_as_it_was(stand_ins: StandIns) -> None:
    up = stand_ins.cli(*UP)
    assert up.code == 0, up.err
    folder = InstanceFolder(state_root(stand_ins.environ), "tiny-oss")
    again = stand_ins.cli("restart", "tiny-oss")
    assert again.code == 0, again.err
    assert again.out.startswith("tiny-oss: stopped on 2 nodes, nothing is left\ntiny-oss is ready at ")
    assert (stand_ins.folder / "stopped").read_text().split() == ["one", "two"]
    assert '"port": 8123' in (files_folder(folder) / "head/docker-compose.yml").read_text()
    # At a terminal a running launch is replaced when somebody agrees.
    inside, outside = pty.openpty()
    os.write(inside, b"n\n")
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "up", "tiny-oss", "--runtime", "process", "--replace"],
        cwd=stand_ins.folder, env=stand_ins.environ, stdin=outside, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    os.close(inside)
    os.close(outside)
    assert (done.returncode, done.stdout) == (130, "")
    assert "recreate  head/docker-compose.yml  (" in done.stderr
    assert done.stderr.endswith("go on? [y/N]\nnothing was changed\n")
    assert stand_ins.cli("status", "tiny-oss", "--json").json["state"] == "ready"
    record = folder.path / "up.json"
    assert record.stat().st_mode & 0o777 == 0o600
    assert json.loads(record.read_text()) == {
        "front": ["--file", str(stand_ins.folder / "model_registry.yml")],
        "rest": ["--set", "port=8123", "--runtime", "process", "--yes", "--", "tiny-oss"],
        "variables": [],
    }
    record.unlink()
    unknown = stand_ins.cli("restart", "tiny-oss")
    assert unknown.code == 5
    assert "is not recorded, or holds a secret" in unknown.err


def test_a_restart_means_the_file_of_the_start(stand_ins: StandIns, tmp_path: Path) -> None:
    """It is typed in another folder, in which another file lies, and without what the start had around it."""
    registry = stand_ins.folder / "model_registry.yml"
    stand_ins.environ |= {"HLAUNCH_API_KEY": "canary-canary", "HLAUNCH_PORT": "8123"}
    assert stand_ins.cli("up", "tiny-oss", "--runtime", "process").code == 0
    folder = InstanceFolder(state_root(stand_ins.environ), "tiny-oss")
    compose = files_folder(folder) / "head/docker-compose.yml"
    del stand_ins.environ["HLAUNCH_PORT"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "model_registry.yml").write_text("models: {other: {model: tiny-oss}}\n")
    stand_ins.folder = elsewhere
    again = stand_ins.cli("restart", "tiny-oss")
    assert again.code == 0, again.err
    assert again.out.startswith("tiny-oss: stopped on 2 nodes, nothing is left\ntiny-oss is ready at ")
    assert '"port": 8123' in compose.read_text()
    assert "canary" not in (folder.path / "up.json").read_text()
    # What cannot start again is not stopped: without its key, and with a file that cannot be read.
    stopped = (tmp_path / "stopped").read_text()
    key = stand_ins.environ.pop("HLAUNCH_API_KEY")
    refused = stand_ins.cli("restart", "tiny-oss")
    assert (refused.code, refused.out) == (5, "")
    assert "was started with $HLAUNCH_API_KEY, which is not set here" in refused.err
    stand_ins.environ["HLAUNCH_API_KEY"] = key
    text = registry.read_text()
    registry.write_text("models: [")
    assert stand_ins.cli("restart", "tiny-oss").code == 3
    # Nor is it started here as well, once the file names no cluster.
    registry.write_text("models: {tiny-oss: {model: tiny-oss}}\n")
    twice = stand_ins.cli("up", "tiny-oss", "--file", str(registry), "--port", "0")
    assert twice.code == 5, twice.err
    assert "tiny-oss is running on cluster pair" in twice.err
    registry.write_text(text)
    assert (tmp_path / "stopped").read_text() == stopped
    assert stand_ins.cli("status", "tiny-oss", "--json").json["state"] == "ready"
