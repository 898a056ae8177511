"""A launch on a cluster is found by every command, by its name and its alias; what is behind ssh is a stand-in."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from test_fabric_transports import REGISTRY, StandIns

from launcher.supervise.instance import InstanceFolder, InstanceState, state_root
from launcher.supervise.procfs import ProcessIdentity
from launcher.supervise.running_files import files_folder

NOBODY = "http://127.0.0.1:9"
ENTRY = "tiny-oss: {model: tiny-oss,"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIns]:
    """One launch for all tests, which leave it as it was; the last one ends it."""
    folder = tmp_path_factory.mktemp("launches")
    made = StandIns(folder)
    for name in ("one", "two"):
        (folder / f"{name}.log").write_text(f"{name} says this\n{name} says that\n")
    aliased = REGISTRY.replace(ENTRY, f"{ENTRY} aliases: [tiny],")
    assert aliased != REGISTRY
    (folder / "model_registry.yml").write_text(aliased)
    (folder / "one.json").write_text(json.dumps({"url": NOBODY}))
    made.start()
    yield made
    assert made.cli("down", "--all").code == 0


def commands(stand_ins: StandIns) -> list[str]:
    """What was asked of the nodes since the last look."""
    path = stand_ins.folder / "commands"
    said = path.read_text().splitlines()
    path.write_text("")
    return said


def test_an_alias_names_a_launch_for_every_command(stand_ins: StandIns) -> None:
    assert stand_ins.cli("status", "tiny", "--json").json["name"] == "tiny-oss"
    assert stand_ins.cli("logs", "tiny").out.splitlines() == [
        "one | one says this", "one | one says that", "two | two says this", "two | two says that",
    ]  # fmt: skip
    for command in (("top", "--once"), ("connect", "env"), ("chat", "-m", "hello")):
        done = stand_ins.cli(*command, "tiny")
        assert done.code == 1
        assert NOBODY in done.err, command
    # The name stands in the record even where the registry is gone; an alias then names nothing.
    registry = stand_ins.folder / "model_registry.yml"
    text = registry.read_text()
    registry.unlink()
    assert stand_ins.cli("status", "tiny-oss").code == 0
    done = stand_ins.cli("status", "tiny")
    assert done.code == 4
    assert done.err.startswith("error: nothing runs under the name 'tiny'\n  available: tiny-oss\n")
    registry.write_text(text)


def test_a_model_that_does_not_run_is_told_with_what_does(stand_ins: StandIns) -> None:
    registry = stand_ins.folder / "model_registry.yml"
    text = registry.read_text()
    registry.write_text(text + "  other: {model: tiny-oss}\n  far: {model: tiny-oss, cluster: pair}\n")
    for command in (("status",), ("top", "--once"), ("connect", "env")):
        done = stand_ins.cli(*command, "other")
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith(
            "error: other is not running\n  what runs: tiny-oss\nhint: start it: hlaunch up other"
        )
    done = stand_ins.cli("chat", "-m", "hello", "far")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: far is not running on cluster pair\nhint: start it: hlaunch up far")
    assert "is not in model_registry.yml" in stand_ins.cli("chat", "-m", "hello", "fra").err
    registry.write_text(text)


def test_a_plan_is_compared_with_what_runs(stand_ins: StandIns) -> None:
    same = stand_ins.cli("plan", "tiny", "--diff", "--detailed-exitcode")
    assert same.code == 0, same.out + same.err
    assert "is the same as what runs on cluster pair" in same.err
    other = stand_ins.cli("plan", "tiny", "--set", "port=8765", "--diff", "--detailed-exitcode")
    assert other.code == 10
    assert "is other than what runs on cluster pair" in other.err
    rows = [line.split()[:2] for line in other.out.splitlines()[1:7]]
    assert ["recreate", "head/docker-compose.yml"] in rows
    assert any(line.startswith("+") and line.endswith('"port": 8765,') for line in other.out.splitlines())
    kept = files_folder(InstanceFolder(state_root(stand_ins.environ), "tiny-oss"))
    assert {path.stat().st_mode & 0o777 for path in kept.rglob("*.*")} == {0o600}


def test_what_status_does_not_show_is_not_read(stand_ins: StandIns) -> None:
    commands(stand_ins)
    assert stand_ins.cli("status", "tiny-oss", "--env").code == 0
    asked = commands(stand_ins)
    assert len(asked) == 2
    assert not any("node.log" in command for command in asked)


def test_logs_ask_all_nodes_at_once_and_show_them_in_order(stand_ins: StandIns) -> None:
    (stand_ins.folder / "together").touch()
    (stand_ins.folder / "one.slow").touch()
    done = stand_ins.cli("logs", "tiny-oss")
    assert done.out.splitlines() == [
        "one | one says this", "one | one says that", "two | two says this", "two | two says that",
    ]  # fmt: skip
    assert done.err == ""
    (stand_ins.folder / "one.gone").touch()
    (stand_ins.folder / "together").unlink()
    done = stand_ins.cli("logs", "tiny-oss", "-n", "1")
    assert (done.code, done.out) == (0, "two | two says that\n")
    assert done.err == "warning: the log of one cannot be read\nhint: does it answer? hlaunch status tiny-oss\n"
    (stand_ins.folder / "one.gone").unlink()


def test_what_cannot_be_ended_does_not_keep_the_rest_alive(stand_ins: StandIns) -> None:
    folder = InstanceFolder(state_root(stand_ins.environ), "zz")
    folder.create()
    nobody = ProcessIdentity(2**22 + 1, 0, "no boot of this machine")
    folder.write(InstanceState("zz", "tiny-oss", "ready", NOBODY, nobody, None, 0.0, 1.0, is_detached=True))
    (stand_ins.folder / "one.gone").touch()
    done = stand_ins.cli("down", "--all")
    assert (done.code, done.out) == (1, "zz: was gone already\n")
    assert "error: tiny-oss: not everything is gone" in done.err
    (stand_ins.folder / "one.gone").unlink()
    kept = files_folder(InstanceFolder(state_root(stand_ins.environ), "tiny-oss"))
    assert kept.exists()
    assert stand_ins.cli("down", "tiny").out == "tiny-oss: stopped on 2 nodes, nothing is left\n"
    assert not kept.exists()
