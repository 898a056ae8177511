"""Starts, failures and ends with real processes: the stand-in engine under the product's own supervision."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request

import pytest
from launcher_support import Launcher, alive, session, wait_for


def test_up_serves_until_sigterm_and_exits_0(hlaunch: Launcher) -> None:
    process = hlaunch.up("ok")
    record = hlaunch.ready()
    with urllib.request.urlopen(record["url"]) as answer:
        assert answer.status == 200
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=10)
    assert process.returncode == 0, errors
    assert f"ready at {record['url']}" in out
    assert f"curl {record['url']}/v1/chat/completions" in out
    assert "PHASE" in out
    assert "load" in out
    assert "stopped" in errors.splitlines()[-1]
    assert hlaunch.record() is None
    assert not session(record["engine"]["pid"])


def test_ctrl_c_drains_and_exits_0(hlaunch: Launcher) -> None:
    process = hlaunch.up("ok")
    hlaunch.ready()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 0
    assert "stand-in: drained" in errors


def test_second_ctrl_c_aborts_with_130(hlaunch: Launcher) -> None:
    process = hlaunch.up("stubborn")
    hlaunch.ready()
    process.send_signal(signal.SIGINT)
    wait_for(lambda: (hlaunch.record() or {}).get("state") == "stopping")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130


def test_an_engine_that_does_not_drain_is_killed_after_drain_plus_5_seconds(hlaunch: Launcher) -> None:
    process = hlaunch.up("stubborn", "--set", "drain-timeout=500ms")
    record = hlaunch.ready()
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=15)
    assert process.returncode == 1
    assert "did not stop" in errors.splitlines()[-1]
    assert 5 <= time.monotonic() - began < 8
    assert not alive(record["engine"]["pid"])


def test_ctrl_c_during_the_start_exits_130_and_leaves_nothing(hlaunch: Launcher) -> None:
    process = hlaunch.up("hang", "--grandchild")
    record = wait_for(hlaunch.record)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
    assert not session(record["engine"]["pid"])


def test_the_cause_of_a_fatal_record_is_the_last_line(hlaunch: Launcher) -> None:
    code, lines = hlaunch.fail_up("fatal")
    assert code == 6
    assert lines[-1] == (
        "error: engine failed: phase load: model.safetensors: lm_head.weight: expected [4, 4], found [4, 3]"
    )
    assert "hint: download it again" in lines
    assert any("Traceback: something long" in line for line in lines)


def test_an_engine_that_dies_at_start_passes_its_code_on(hlaunch: Launcher) -> None:
    code, lines = hlaunch.fail_up("die")
    assert code == 3
    assert lines[-1] == "error: the engine exited with status 3 in phase load"


def test_an_engine_that_is_killed_at_start_is_named_so(hlaunch: Launcher) -> None:
    code, lines = hlaunch.fail_up("kill")
    assert code == 1
    assert lines[-1] == "error: the engine was killed by SIGKILL in phase load"


def test_death_while_serving_ends_with_cause_and_code_1(hlaunch: Launcher) -> None:
    code, lines = hlaunch.fail_up("late-death", "--grandchild")
    assert code == 1
    assert lines[-1] == "error: the engine was killed by SIGSEGV while serving"
    assert any("the core is gone" in line for line in lines)


@pytest.mark.parametrize(("mode", "where"), [("hang", "phase load for"), ("silent", "before its first phase")])
def test_a_silent_start_ends_at_its_deadline_with_8(hlaunch: Launcher, mode: str, where: str) -> None:
    began = time.monotonic()
    code, lines = hlaunch.fail_up(mode, "--set", "ready.timeout=1s", "--grandchild")
    assert code == 8
    assert lines[-1].startswith(f"error: the engine was not ready after 1 s: {where}")
    assert time.monotonic() - began < 8
    log = (hlaunch.state / "instances/tiny-oss/engine.log").read_text()
    assert "stand_in_engine.py" in log, "the stacks of the hung engine are in the log"


def test_kill_9_of_the_launcher_leaves_no_child(hlaunch: Launcher) -> None:
    process = hlaunch.up("ok")
    record = hlaunch.ready()
    process.kill()
    wait_for(lambda: not alive(record["engine"]["pid"]), 5)
    listed = hlaunch.cli("ps", "--json")
    assert json.loads(listed.stdout) == []
    assert "is gone; record removed" in listed.stderr
    assert hlaunch.record() is None


def test_a_dead_launchers_remains_are_cleared_by_the_next_up(hlaunch: Launcher) -> None:
    first = hlaunch.up("ok", "--grandchild")
    record = hlaunch.ready()
    first.kill()
    first.wait()
    wait_for(lambda: not alive(record["engine"]["pid"]), 5)
    assert session(record["engine"]["pid"]), "the grandchild outlives an engine that was killed"
    hlaunch.up("ok")
    wait_for(lambda: (hlaunch.record() or record)["launcher"]["pid"] != record["launcher"]["pid"])
    assert not session(record["engine"]["pid"])


def test_a_port_in_use_names_its_owner_and_exits_5(hlaunch: Launcher) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, lines = hlaunch.fail_up("ok", "--port", str(port))
    assert code == 5
    assert lines[-2].startswith(f"error: port {port} on 127.0.0.1 is in use by pid {os.getpid()} (")
    assert lines[-2].endswith(")")
    assert not lines[-2].endswith(" )")
    assert lines[-1] == "hint: stop that, or choose another with --port"


def test_two_of_one_name_are_refused_and_replace_takes_over(hlaunch: Launcher) -> None:
    first = hlaunch.up("ok")
    hlaunch.ready()
    code, lines = hlaunch.fail_up("ok")
    assert code == 5
    assert "tiny-oss is already running (pid" in lines[-2]
    second = hlaunch.up("ok", "--replace")
    wait_for(lambda: (hlaunch.record() or {}).get("launcher", {}).get("pid") == second.pid)
    hlaunch.ready()
    assert first.wait(timeout=5) == 0


def test_detached_round_trip(hlaunch: Launcher) -> None:
    process = hlaunch.up("slow", "--detach")
    out, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert "hlaunch down tiny-oss" in errors
    record = hlaunch.ready()
    assert record["is_detached"]
    assert record["launcher"]["pid"] != process.pid
    assert f"ready at {record['url']}" in out

    (fact,) = json.loads(hlaunch.cli("ps", "--json").stdout)
    assert (fact["name"], fact["state"], fact["url"]) == ("tiny-oss", "ready", record["url"])
    assert fact["memory_bytes"] > 1 << 20
    assert (fact["pid"], fact["num_nodes"], fact["context_tokens"]) == (record["launcher"]["pid"], 1, 2048)
    assert (fact["cpu_share"], fact["rank_memory_bytes"]) == (1.0, None)
    table = hlaunch.cli("ps").stdout.splitlines()
    assert table[0].split() == ["NAME", "MODEL", "STATE", "ENDPOINT", "UPTIME"]
    assert table[1].split()[:4] == ["tiny-oss", fact["model"], "ready", record["url"]]
    assert table[3].split() == ["NAME", "NODES", "PROCESSOR", "MEM", "CONTEXT"]
    told = table[4].split()
    assert (told[:4], told[-1]) == (["tiny-oss", "1", "100%", "CPU"], "2048")
    assert str(record["launcher"]["pid"]) in hlaunch.cli("status", "tiny-oss").stdout
    assert "stand-in: hello" in hlaunch.cli("logs", "tiny").stdout, "an alias works"

    down = hlaunch.cli("down", "tiny-oss")
    assert (down.returncode, down.stdout) == (0, "tiny-oss: stopped\n")
    assert not alive(record["launcher"]["pid"])
    assert not session(record["engine"]["pid"])
    again = hlaunch.cli("down", "tiny-oss")
    assert (again.returncode, again.stdout) == (0, "tiny-oss: not running\n")
    assert "stand-in: drained" in hlaunch.cli("logs", "tiny-oss", "-n", "1").stdout


def test_an_engine_that_is_started_again_is_not_called_ready(hlaunch: Launcher) -> None:
    hlaunch.up("ok", "--detach").communicate(timeout=20)
    engine = hlaunch.ready()["engine"]["pid"]
    assert json.loads(hlaunch.cli("status", "tiny-oss", "--json").stdout)["events"] == []
    os.kill(engine, signal.SIGUSR2)
    wait_for(lambda: (hlaunch.record() or {})["is_restarting"])
    assert json.loads(hlaunch.cli("ps", "--json").stdout)[0]["state"] == "restarting"
    os.kill(engine, signal.SIGUSR2)
    wait_for(lambda: not (hlaunch.record() or {})["is_restarting"])
    lines = hlaunch.cli("status", "tiny-oss").stdout.splitlines()
    assert lines[1].split()[2] == "ready"
    assert lines[3].split() == ["AGO", "EVENT"]
    assert lines[4].endswith("the core was killed by SIGKILL; it is started again in 1 s")
    assert lines[5].endswith("serves again")
    # A server that listens and says nothing does not serve either.
    os.kill(engine, signal.SIGSTOP)
    try:
        assert json.loads(hlaunch.cli("status", "tiny-oss", "--json").stdout)["state"] == "no answer"
    finally:
        os.kill(engine, signal.SIGCONT)


def test_a_detached_failure_is_told_in_the_foreground(hlaunch: Launcher) -> None:
    code, lines = hlaunch.fail_up("fatal", "--detach")
    assert code == 6
    assert "lm_head.weight" in lines[-1]
    assert hlaunch.record() is None


def test_ctrl_c_while_a_detached_start_is_waited_for_ends_it(hlaunch: Launcher) -> None:
    process = hlaunch.up("hang", "--detach")
    record = wait_for(hlaunch.record)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
    wait_for(lambda: not session(record["engine"]["pid"]))


def test_kill_9_of_a_detached_supervisor_leaves_no_child(hlaunch: Launcher) -> None:
    hlaunch.up("ok", "--detach").communicate(timeout=20)
    record = hlaunch.ready()
    os.kill(record["launcher"]["pid"], signal.SIGKILL)
    wait_for(lambda: not alive(record["engine"]["pid"]), 5)
    assert hlaunch.cli("down", "tiny-oss").stdout == "tiny-oss: was gone already\n"


def test_down_of_an_unknown_name_lists_what_runs_and_exits_4(hlaunch: Launcher) -> None:
    hlaunch.up("ok")
    hlaunch.ready()
    result = hlaunch.cli("down", "nobody")
    assert result.returncode == 4
    assert "available: tiny-oss" in result.stderr
    assert hlaunch.cli("down", "other").stdout == "other: not running\n"
    assert hlaunch.cli("down").returncode == 2


def test_down_all_stops_everything(hlaunch: Launcher) -> None:
    first, second = hlaunch.up("ok"), hlaunch.up("ok", "--name", "other")
    hlaunch.ready()
    hlaunch.ready("other")
    assert hlaunch.cli("down", "--all").stdout.splitlines() == ["other: stopped", "tiny-oss: stopped"]
    assert (first.wait(5), second.wait(5)) == (0, 0)


def test_a_terminal_that_nobody_reads_does_not_stop_the_engine(hlaunch: Launcher) -> None:
    process = hlaunch.up("noisy")
    record = hlaunch.ready()
    wait_for(lambda: "escape" in hlaunch.cli("logs", "tiny-oss", "-n", "1").stdout)
    assert hlaunch.cli("down", "tiny-oss").stdout == "tiny-oss: stopped\n", "although its stderr is full"
    assert not session(record["engine"]["pid"])
    process.communicate(timeout=5)
    assert process.returncode == 0


def test_logs_follow_to_the_end_without_terminal_escapes(hlaunch: Launcher) -> None:
    hlaunch.up("noisy")
    hlaunch.ready()
    wait_for(lambda: "escape" in hlaunch.cli("logs", "tiny-oss", "-n", "1").stdout)
    follower = subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", "logs", "tiny-oss", "-f", "-n", "3"],
        cwd=hlaunch.folder,
        env=hlaunch.environ,
        text=True,
        stdout=subprocess.PIPE,
    )
    hlaunch.started.append(follower)
    time.sleep(1.0)
    hlaunch.cli("down", "tiny-oss")
    out, _ = follower.communicate(timeout=10)
    lines = out.splitlines()
    assert [line[:10] for line in lines[:2]] == ["line 01998", "line 01999"]
    assert lines[-1] == "stand-in: drained"
    assert "\x1b" not in out
    assert "\x07" not in out


def test_files_are_private_and_hold_no_environment(hlaunch: Launcher) -> None:
    hlaunch.environ["TEST_API_KEY"] = "canary-7f3a"
    hlaunch.up("ok", "--name", "keyed", "--detach").communicate(timeout=20)
    hlaunch.ready("keyed")
    for path in [hlaunch.state, *hlaunch.state.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        if path == hlaunch.state / "instances":
            continue
        assert mode == (0o700 if path.is_dir() else 0o600), (path, oct(mode))
        if path.is_file():
            assert b"canary" not in path.read_bytes()
    config = json.loads((hlaunch.state / "instances/keyed/engine.json").read_text())
    assert len(config["server"]["api_key_sha256"][0]) == 64


def test_a_state_folder_that_cannot_be_made_is_one_line(hlaunch: Launcher) -> None:
    hlaunch.environ["HLAUNCH_STATE_DIR"] = "/proc/nothing"
    code, lines = hlaunch.fail_up("ok")
    assert code == 5
    assert lines[0].startswith("error: the state folder /proc/nothing/instances/tiny-oss cannot be made")


def test_a_failures_tail_holds_no_line_of_an_earlier_run(hlaunch: Launcher) -> None:
    hlaunch.fail_up("fatal")
    _, lines = hlaunch.fail_up("die")
    assert any("about to die" in line for line in lines)
    assert not any("something long" in line for line in lines)
    assert hlaunch.cli("logs", "tiny-oss").stdout.count("=== tiny-oss: ") == 2
