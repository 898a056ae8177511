"""What nodes wrote is still there once they are gone: after a start that failed, and after `down`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_fabric_transports import StandIns

from launcher.errors import HlaunchError
from launcher.supervise.cluster_run import stop
from launcher.supervise.instance import InstanceFolder, state_root
from launcher.supervise.kept_logs import KEPT_LINES, kept_file, kept_lines

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def stand_ins(tmp_path: Path) -> StandIns:
    for name in ("one", "two"):
        lines = [f"{name} says {number}" for number in range(3)]
        (tmp_path / f"{name}.log").write_text("\n".join([*lines, f"{name} has {TOKEN} \x1b]0;x\x07"]) + "\n")
    return StandIns(tmp_path)


def test_a_start_that_fails_keeps_the_logs_of_its_nodes(stand_ins: StandIns) -> None:
    report = {"state": "failed", "cause": "no memory", "exit_code": 6, "hint": "hlaunch logs tiny-oss"}
    (stand_ins.folder / "two.json").write_text(json.dumps(report))
    with pytest.raises(HlaunchError, match="worker two: no memory"):
        stand_ins.start()
    assert stand_ins.cli("ps", "--json").json == []
    done = stand_ins.cli("logs", "tiny-oss", "-n", "2")
    assert (done.code, done.out.splitlines()) == (
        0,
        ["one | one says 2", "one | one has <hidden> ?]0;x?", "two | two says 2", "two | two has <hidden> ?]0;x?"],
    )
    told = [json.loads(line) for line in stand_ins.cli("logs", "tiny-oss", "--json", "-n", "1").out.splitlines()]
    assert [line["node"] for line in told] == ["one", "two"]


def test_after_down_the_log_is_there_until_the_next_start(stand_ins: StandIns) -> None:
    (stand_ins.folder / "one.log").write_text("".join(f"line {number}\n" for number in range(2000)))
    folder = InstanceFolder(state_root(stand_ins.environ), "tiny-oss")
    assert stop(stand_ins.start(), folder, stand_ins.environ) == []
    kept = kept_file(folder)
    assert kept.stat().st_mode & 0o777 == 0o600
    assert TOKEN not in kept.read_text()
    said = kept_lines(folder, 1000)
    assert len(said) == KEPT_LINES + 4
    assert said[KEPT_LINES - 1] == ("one", "line 1999")
    # A later run on this host is the last one of that name.
    folder.log_file.write_text("on this host\n")
    assert stand_ins.cli("logs", "tiny-oss").out == "on this host\n"
    run = stand_ins.start()
    assert not kept.exists()
    assert stop(run, folder, stand_ins.environ) == []
    # A node that is gone already has nothing more to say, and takes nothing away.
    assert stop(run, folder, stand_ins.environ) == []
    assert len(kept_lines(folder)) == KEPT_LINES + 4
