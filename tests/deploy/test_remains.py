"""What a node leaves when all of it is killed at once: found, ended, removed; what is not surely its own is named."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from two_nodes import wait_for

from launcher.node import stop
from launcher.supervise.node_records import KEEPER_FILE
from launcher.supervise.procfs import ProcessIdentity
from launcher.supervise.remains import processes_of, record_shared_memory
from launcher.supervise.runtimes import Stopped

# As Ray's agents do: nothing of the environment is left, a log in the node's folder is written.
AGENT = """
import mmap, sys, time
log = open(sys.argv[1], sys.argv[2])
if sys.argv[3:]:
    with open(sys.argv[3], "w+b") as file:
        file.truncate(32)
        held = mmap.mmap(file.fileno(), 32)
print("ready", flush=True)
time.sleep(600)
"""
Starter = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Starter]:
    started: list[subprocess.Popen[bytes]] = []

    def begin(log: Path, mode: str, *shared: str) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-c", AGENT, str(log), mode, *shared]
        process = subprocess.Popen(argv, env={}, stdout=subprocess.PIPE, start_new_session=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def shared() -> Iterator[Callable[[str], str]]:
    names: list[str] = []

    def name(begin: str) -> str:
        names.append(f"/dev/shm/{begin}hlaunch-test-{secrets.token_hex(6)}")
        return names[-1]

    yield name
    for path in names:
        Path(path).unlink(missing_ok=True)


def test_what_was_killed_at_once_leaves_nothing(
    tmp_path: Path, start: Starter, shared: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    (folder / "ray").mkdir(parents=True)
    own = ProcessIdentity.of(os.getpid())
    assert own is not None
    keeper = subprocess.Popen([sys.executable, "-c", ""])
    keeper.wait()
    dead = ProcessIdentity(keeper.pid, own.start_ticks, own.boot_id)
    (folder / KEEPER_FILE).write_text(json.dumps({**dead.to_data(), "drain": 0.0}))
    log = folder / "ray" / "agent.log"
    recorded, held, later, foreign = shared("sem."), shared("sem."), shared("sem."), shared("of-nobody-we-know-")
    rank, agent, reader = start(log, "a", recorded), start(log, "a"), start(log, "r")
    holder = start(tmp_path / "elsewhere", "a", held)
    record_shared_memory(folder)
    assert set(processes_of(folder)) == {rank.pid, agent.pid}, "who only reads there is not of the node"
    rank.send_signal(signal.SIGKILL)
    rank.wait()
    for path in (later, foreign):
        Path(path).touch()

    assert stop(folder) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["killed"], told["left"]) == (1, [])
    assert agent.wait(10) == -signal.SIGKILL
    assert not Path(recorded).exists()
    assert later in told["doubtful"]
    assert not {held, foreign, recorded} & set(told["doubtful"])
    assert all(Path(path).exists() for path in (held, later, foreign)), "what is not surely ours stays"
    assert reader.poll() is None
    assert holder.poll() is None
    assert not folder.exists()
    assert Stopped.parse(json.dumps(told)).doubtful == tuple(told["doubtful"])


def test_a_name_that_is_another_file_by_now_stays(
    tmp_path: Path, start: Starter, shared: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    name = shared("sem.")
    rank = start(tmp_path / "log", "a", name)
    record_shared_memory(tmp_path)
    rank.kill()
    rank.wait()
    wait_for(lambda: not processes_of(tmp_path), 10)
    # While it is open its inode is not given to the next file.
    with Path(name).open("rb"):
        Path(name).unlink()
        Path(name).touch()
        assert stop(tmp_path) == 0
    assert Path(name).exists()
    assert json.loads(capsys.readouterr().out)["doubtful"] == [], "without a record of its start nothing is guessed"
    assert Stopped.parse("no JSON") == Stopped()
