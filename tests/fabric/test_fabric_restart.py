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
UP = ("up", "tiny-oss", "--runtime", "process", "--set", "port=8123")


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
    assert json.loads(record.read_text()) == [
        "up", "--set", "port=8123", "--runtime", "process", "--yes", "--", "tiny-oss",
    ]  # fmt: skip
    record.unlink()
    unknown = stand_ins.cli("restart", "tiny-oss")
    assert unknown.code == 5
    assert "is not recorded, or holds a secret" in unknown.err
