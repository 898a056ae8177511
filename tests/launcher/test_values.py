"""The small values of supervision: records, lines, timeline, identities, folders, logs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.addresses import host_and_port, is_loopback
from launcher.errors import PreflightError
from launcher.sizes import counted
from launcher.supervise import ports, procfs
from launcher.supervise.instance import InstanceFolder, InstanceState, instance_folders, parse_state, state_root
from launcher.supervise.logfile import BoundedLog, tail
from launcher.supervise.procfs import ProcessIdentity
from launcher.supervise.spec import LaunchSpec
from launcher.supervise.status import MAX_LINE_BYTES, Fatal, LineSplitter, Phase, Ready, parse_record
from launcher.supervise.timeline import Timeline


def test_records_survive_the_relay() -> None:
    import json

    records = (
        Phase("load", "progress", 0.25, "shard 1", 12.5),
        Ready("http://127.0.0.1:1", "m", 13.0, {"kv_blocks": 7}),
        Fatal("load", "CheckpointError", "bad", "fix", 6),
    )
    for record in records:
        assert parse_record(json.dumps(record.to_json()).encode(), 0.0) == record


@given(st.binary(max_size=300))
def test_no_line_breaks_the_reader(line: bytes) -> None:
    parse_record(line, 0.0)


def test_odd_records_become_harmless_ones() -> None:
    fatal = parse_record(b'{"kind":"fatal","message":"a\\nb\\u001b[31m","exit_code":"x"}', 0.0)
    assert fatal == Fatal("", "", "a b?[31m", "", 1)
    assert parse_record(b'{"kind":"phase","phase":"load","fraction":7}', 3.0) == Phase("load", "", 1.0, "", 3.0)
    assert parse_record(b'{"kind":"news"}', 0.0) is None


@given(st.lists(st.binary(max_size=40)), st.integers(1, 9))
def test_lines_come_out_whole_however_they_are_cut(lines: list[bytes], step: int) -> None:
    clean = [line.replace(b"\n", b"").replace(b"\r", b"") for line in lines]
    stream = b"".join(line + b"\n" for line in clean)
    splitter = LineSplitter()
    found = [line for i in range(0, len(stream), step) for line in splitter.feed(stream[i : i + step])]
    assert found == clean


def test_a_line_without_end_is_dropped_not_held() -> None:
    splitter = LineSplitter()
    assert list(splitter.feed(b"x" * (MAX_LINE_BYTES + 1))) == []
    assert list(splitter.feed(b"y" * MAX_LINE_BYTES)) == []
    assert list(splitter.feed(b"z\nnext\n")) == [b"next"]


def test_timeline_with_overlapping_and_open_phases() -> None:
    timeline = Timeline(10.0)
    timeline.mark("launch", 10.0, 10.2)
    timeline.add(Phase("import", "begin", None, "", 10.2))
    timeline.add(Phase("load", "begin", 0.0, "", 11.0))
    timeline.add(Phase("import", "end", None, "torch", 11.5))
    assert timeline.current(12.0) == ("load", 1.0)
    timeline.finish(12.0)
    rows = [(row.name, round(row.began_seconds, 3), round(row.seconds, 3)) for row in timeline.rows()]
    assert rows == [("launch", 0.0, 0.2), ("import", 0.2, 1.3), ("load", 1.0, 1.0)]
    assert timeline.total_seconds == 2.0


def test_an_identity_is_not_fooled_by_a_reused_number() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = ProcessIdentity.of(process.pid)
    assert identity is not None
    alive = [identity.is_alive]
    other = ProcessIdentity(process.pid, identity.start_ticks + 1, identity.boot_id)
    assert not other.is_alive
    assert not other.send(signal.SIGKILL)
    assert process.poll() is None
    assert not ProcessIdentity(process.pid, identity.start_ticks, "another boot").is_alive
    assert identity.send(signal.SIGKILL)
    process.communicate()
    alive.append(identity.is_alive)
    assert alive == [True, False]
    assert not identity.send(signal.SIGKILL)


def test_age_and_memory_of_this_process() -> None:
    own = ProcessIdentity.of(os.getpid())
    assert own is not None
    assert 0 < procfs.age_seconds(own) < 36000
    assert procfs.memory_bytes([os.getpid()]) > 1 << 20


STATE = InstanceState(
    "a/b", "m", "ready", "http://x", ProcessIdentity(1, 2, "b"), None, 1.5, 30.0, is_detached=True, ready_seconds=2.0
)


@pytest.mark.parametrize("name", ["a/b", "..", ".", "../x", "a:b", ".hidden", "x y"])
def test_a_name_stays_inside_the_root_and_comes_back(tmp_path: Path, name: str) -> None:
    folder = InstanceFolder(tmp_path / "root", name)
    folder.create()
    assert folder.path.parent == tmp_path / "root" / "instances"
    assert folder.path.resolve() == folder.path
    assert [found.name for found in instance_folders(tmp_path / "root")] == [name]


def test_state_survives_the_disk_and_a_damaged_one_reads_as_none(tmp_path: Path) -> None:
    folder = InstanceFolder(tmp_path, "x")
    folder.create()
    folder.write(STATE)
    assert folder.read() == STATE
    for damage in ("", "{}", "[]", "null", '{"launcher": 3, "engine": null}', "[" * 100000):
        folder.state_file.write_text(damage)
        assert folder.read() is None
    assert parse_state(STATE.to_json()) == STATE


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    folder = InstanceFolder(tmp_path, "x")
    folder.create()
    first = folder.try_lock()
    assert first is not None
    assert folder.try_lock() is None
    os.close(first)
    second = folder.try_lock()
    assert second is not None
    os.close(second)


def test_where_state_lives() -> None:
    assert state_root({"HLAUNCH_STATE_DIR": "/s", "XDG_STATE_HOME": "/x"}) == Path("/s")
    assert state_root({"XDG_STATE_HOME": "/x", "HOME": "/h"}) == Path("/x/hlaunch")
    assert state_root({"HOME": "/h"}) == Path("/h/.local/state/hlaunch")
    assert state_root({}).name == "hlaunch", "no HOME is no crash"


def test_a_log_is_bounded_and_its_tail_reaches_into_the_old_half(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "engine.log", max_bytes=1000)
    for number in range(200):
        log.write(f"line {number:03}\n".encode())
    log.close()
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert sum(sizes) <= 2000
    assert tail(tmp_path / "engine.log", 3) == ["line 197", "line 198", "line 199"]
    lines = tail(tmp_path / "engine.log", 150)
    assert lines == [f"line {number:03}" for number in range(200 - len(lines), 200)]
    assert len(lines) == 150
    assert tail(tmp_path / "none.log", 5) == []
    assert tail(tmp_path / "engine.log", 0) == []


def test_a_spec_travels_without_its_environment() -> None:
    spec = LaunchSpec("n", "m", "u", ("a", "b"), "/", "{}", 1.0, 2.0, {"TOKEN": "canary"})
    assert "canary" not in spec.to_json() + repr(spec)
    assert LaunchSpec.from_json(spec.to_json(), {"TOKEN": "canary"}) == spec


def test_ports_name_what_is_wrong() -> None:
    with pytest.raises(PreflightError, match="is not an address of this machine"):
        ports.check_port("192.0.2.1", 8000)
    ports.check_port("127.0.0.1", ports.free_port("127.0.0.1"))


def test_addresses_are_written_one_way() -> None:
    written = [host_and_port(host, 80) for host in ("10.0.0.1", "fd00::1", "[fd00::1]", "head.local")]
    assert written == ["10.0.0.1:80", "[fd00::1]:80", "[fd00::1]:80", "head.local:80"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "[::1]", "localhost"])
def test_only_this_machine_reaches_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "fd00::1", "127.example.org", ""])
def test_the_rest_is_public(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(("number", "said"), [(0, "0 ranks"), (1, "1 rank"), (2, "2 ranks")])
def test_things_are_counted_in_words(number: int, said: str) -> None:
    assert counted(number, "rank") == said
