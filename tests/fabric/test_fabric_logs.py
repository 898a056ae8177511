"""`hlaunch logs` hides secrets, names known failures with cause and fix, and a failed launch does so by itself."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hosts import Hosts
from test_fabric_transports import StandIns

from launcher.commands.launch_view import LaunchView
from launcher.commands.log_view import LogView
from launcher.commands.up import _conclude
from launcher.console import Console
from launcher.errors import EngineFailed, HlaunchError, PreflightError
from launcher.fabric.log_lines import classify
from launcher.redaction import Redaction
from launcher.supervise.instance import InstanceFolder
from launcher.supervise.kept_logs import keep
from launcher.supervise.ports import check_port
from launcher.supervise.supervisor import Outcome

CANARY = "canary-3f9a77c1d2"
SECRET_LINES = [
    f"HF_TOKEN={CANARY}",
    f'{{"api_key": "{CANARY}"}}',
    f"Authorization: Bearer {CANARY}",
    f"authorization: bearer {CANARY}==",
    f"password: {CANARY}",
    f"serve --api-key={CANARY} --port 8000",
    f"vllm serve m --api-key {CANARY} --port 8000",
    f"https://geo:{CANARY}@registry.example/v2",
    f"engine: NAME=HF_TOKEN={CANARY}",
    f"export OPENAI_API_KEY='a,b;{CANARY}'",
    f'{{"password": "a, b \\" {CANARY}", "port": 8000}}',
    f'"{{\\"api_key\\": \\"{CANARY}\\"}}"',
    f"PASSWORD=a;b,{CANARY})",
    f"{{token: {CANARY};{CANARY}}}, port: 8000",
    f'HF_TOKEN="{CANARY} without an end',
    f"plain {CANARY} in the middle, known by its variable",
]
PLAIN_LINES = [
    "max_num_tokens=20000000 prompt_tokens: 12345678",
    "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/run/secrets/ray_token",
    "token_file=/run/secrets/ray_token",
    "serve --api-key --port 8000 --token /run/secrets/token --api-key is taken",
    "stop_token: 200002000",
    "Loading weights 40% at http://10.0.0.1:8000",
    "key layers.0.attn.qkv.weight: bfloat16",
]


@pytest.mark.parametrize("line", SECRET_LINES)
def test_a_secret_leaves_whole(line: str) -> None:
    shown = Redaction({"SOME_API_KEY": CANARY}).line(line)
    assert CANARY not in shown
    assert CANARY[:4] not in shown
    assert "<hidden>" in shown
    if "plain" not in line:
        assert CANARY not in Redaction().line(line)


@pytest.mark.parametrize("line", PLAIN_LINES)
def test_what_is_no_secret_stays(line: str) -> None:
    assert Redaction({"RAY_AUTH_MODE": "token", "EMPTY_KEY": "", "SHORT_KEY": "at"}).line(line) == line


def test_what_follows_a_secret_stays() -> None:
    redaction = Redaction()
    assert redaction.line('{"password": "a, b 12345", "port": 1}') == '{"password": "<hidden>", "port": 1}'
    assert redaction.line(r'"{\"api_key\": \"12345abcde\", 1}"') == r'"{\"api_key\": \"<hidden>\", 1}"'
    assert redaction.line("{token: abcdefgh1}, [key=abcdefgh2],") == "{token: <hidden>}, [key=<hidden>],"
    assert redaction.line("PASSWORD=short sorted(key=len)") == "PASSWORD=<hidden> sorted(key=len)"


def test_a_long_line_takes_no_time() -> None:
    began = time.monotonic()
    for line in (
        "a" * 60_000,
        "a=" * 30_000,
        "token: " * 8_000,
        "a:" + " " * 60_000,
        "://" * 20_000,
        "x" * 60_000 + "://",
        "--api-key " * 6_000,
        "--" * 30_000,
        'token: "' * 8_000,
        'token="\\' * 8_000,
    ):
        Redaction({"SOME_KEY": CANARY}).line(line)
    assert time.monotonic() - began < 5


def test_tokens_of_known_shape() -> None:
    line = "using hf_AbCdEfGhIjKlMnOpQrStUv and sk-proj-0123456789abcdef0123"
    assert Redaction().line(line) == "using <hidden> and <hidden>"


@pytest.fixture
def hosts(tmp_path: Path) -> Hosts:
    made = Hosts(tmp_path)
    made.registry("version: 1\nmodels:\n  tiny-oss: {model: tiny-oss}\n")
    folder = InstanceFolder(tmp_path / "state", "tiny-oss")
    folder.create()
    lines = [
        "=== tiny-oss: now ===",
        "begin",
        f"HF_TOKEN={CANARY}",
        "NET/IB : No device found.",
        "a: Too many open files",
    ]
    folder.log_file.write_text("\n".join([*lines, "b: Too many open files", "end"]) + "\n")
    return made


def test_logs_hide_secrets_and_say_what_failed(hosts: Hosts) -> None:
    done = hosts.cli("logs", "tiny-oss", HLAUNCH_STATE_DIR=str(hosts.folder / "state"))
    assert done.code == 0
    assert done.out.splitlines()[1:3] == ["begin", "HF_TOKEN=<hidden>"]
    assert done.err.splitlines() == [
        "error[open-files]: the limit of open files is too low (2 lines)",
        "  fix: ulimit -n 1048576; container: {nofile: 1048576}",
        "warning[rdma-not-found]: NCCL found no RDMA device and goes on with TCP",
        "  fix: hlaunch doctor; NCCL_NET=IB forbids the fallback",
    ]


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_no_line_about_the_fabric_is_said(hosts: Hosts, form: tuple[str, ...]) -> None:
    state = hosts.folder / "state"
    InstanceFolder(state, "tiny-oss").log_file.write_text("begin\nend\n")
    done = hosts.cli("logs", "tiny-oss", "--transport", *form, HLAUNCH_STATE_DIR=str(state))
    assert (done.code, done.out) == (0, "")
    assert done.err == "nothing about the fabric and no known failure in 2 lines; --lines N reads more\n"
    assert hosts.cli("logs", "tiny-oss", *form, HLAUNCH_STATE_DIR=str(state)).err == ""


EARLIER_RUNS = [
    "=== tiny-oss: 09:00 ===",
    "socket.gaierror: [Errno -2] Name or service not known",
    "NCCL INFO Channel 00/0 : 0[0] -> 1[1] via NET/Socket/0",
    "=== tiny-oss: 09:05 ===",
    "a: Too many open files",
    "=== tiny-oss: 09:10 ===",
]
OPEN_FILES = [
    "error[open-files]: the limit of open files is too low",
    "  fix: ulimit -n 1048576; container: {nofile: 1048576}",
]


@pytest.mark.parametrize("form", [(), ("-f",), ("--transport",), ("--transport", "-f")])
def test_only_the_last_run_is_judged(hosts: Hosts, form: tuple[str, ...]) -> None:
    state = hosts.folder / "state"
    log = InstanceFolder(state, "tiny-oss").log_file
    for last, told in (([*EARLIER_RUNS, "ready"], []), ([*EARLIER_RUNS, "b: Too many open files"], OPEN_FILES)):
        log.write_text("\n".join(last) + "\n")
        done = hosts.cli("logs", "tiny-oss", *form, HLAUNCH_STATE_DIR=str(state))
        assert (done.code, done.err.splitlines()) == (0, told)
        shown = [line for line in last if "--transport" not in form or classify(line) is not None]
        assert done.out.splitlines() == shown, "lines of earlier runs stay"


@pytest.mark.parametrize("form", [(), ("-f",)])
def test_only_the_last_run_of_each_kept_node_is_judged(hosts: Hosts, form: tuple[str, ...]) -> None:
    folder = InstanceFolder(hosts.folder / "state", "tiny-oss")
    folder.log_file.unlink()
    keep(folder, {"one": [*EARLIER_RUNS, "b: Too many open files"], "two": [*EARLIER_RUNS, "ready"]}, {})
    done = hosts.cli("logs", "tiny-oss", *form, HLAUNCH_STATE_DIR=str(hosts.folder / "state"))
    assert done.err.splitlines() == ["error[open-files] on one: the limit of open files is too low", OPEN_FILES[1]]
    assert len(done.out.splitlines()) == 2 * len(EARLIER_RUNS) + 2


def test_who_follows_is_told_once_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    view = LogView(Console(is_plain=True), {}, as_json=False)
    for line in EARLIER_RUNS:
        view.show(line)
    view.go_live()
    assert capsys.readouterr().err == ""
    for line in ("a: Too many open files", "b: Too many open files"):
        view.show(line)
    assert capsys.readouterr().err.splitlines() == OPEN_FILES
    for line in ("=== tiny-oss: 09:20 ===", "a: Too many open files"):
        view.show(line)
    assert capsys.readouterr().err.splitlines() == OPEN_FILES
    view.conclude()
    assert capsys.readouterr().err == ""


def test_only_what_concerns_the_fabric(hosts: Hosts) -> None:
    done = hosts.cli("logs", "tiny-oss", "--transport", HLAUNCH_STATE_DIR=str(hosts.folder / "state"))
    assert done.out.splitlines() == [
        "NET/IB : No device found.",
        "a: Too many open files",
        "b: Too many open files",
    ]


def test_logs_as_json_lines(hosts: Hosts) -> None:
    done = hosts.cli("logs", "tiny-oss", "--json", "-n", "3", HLAUNCH_STATE_DIR=str(hosts.folder / "state"))
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["line"] for row in rows] == ["a: Too many open files", "b: Too many open files", "end"]
    assert [row["finding"] and row["finding"]["code"] for row in rows] == ["open-files", "open-files", None]
    assert done.err == ""


def test_a_failed_launch_names_known_failures_of_every_node(tmp_path: Path) -> None:
    stand_ins = StandIns(tmp_path)
    (tmp_path / "one.log").write_text("node: waiting\n")
    (tmp_path / "two.log").write_text("engine: Call to ibv_reg_mr failed with error Cannot allocate memory\n")
    failed = {"state": "failed", "cause": "Ray's raylet died", "exit_code": 5}
    (tmp_path / "two.json").write_text(json.dumps(failed))
    with pytest.raises(HlaunchError, match="worker two: Ray's raylet died") as caught:
        stand_ins.start()
    assert caught.value.details == ("two: memory could not be pinned [memlock]; fix: ulimits: {memlock: -1}",)


def test_logs_of_a_cluster_name_the_node(tmp_path: Path) -> None:
    stand_ins = StandIns(tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.log").write_text(f"engine: HF_TOKEN={CANARY}\n")
    stand_ins.start()
    for log in (tmp_path / ".local/state/hlaunch/nodes").glob("*/node.log"):
        log.write_text(log.read_text() + "engine: No space left on device\n")
    done = stand_ins.cli("logs", "tiny-oss")
    assert done.out.splitlines() == [
        f"{name} | engine: {text}"
        for name in ("one", "two")
        for text in ("HF_TOKEN=<hidden>", "No space left on device")
    ]
    assert done.err.splitlines()[0] == "error[disk-full] on one: a disk, or /dev/shm, is full (2 lines)"
    rows = [json.loads(line) for line in stand_ins.cli("logs", "tiny-oss", "--json").out.splitlines()]
    assert [row["node"] for row in rows] == ["one", "one", "two", "two"]
    assert stand_ins.cli("down", "tiny-oss").code == 0


def test_a_failed_engine_ends_with_what_its_last_lines_mean(capsys: pytest.CaptureFixture[str]) -> None:
    tail = ("import", "OSError: [Errno 98] Address already in use", f"HF_TOKEN={CANARY}")
    view: Any = SimpleNamespace(fail=lambda: None, is_detached=False)
    with pytest.raises(EngineFailed, match="it died: HF_TOKEN=<hidden>"):
        _conclude(Console(is_plain=True), view, Outcome(1, f"it died: HF_TOKEN={CANARY}", log_tail=tail))
    told = capsys.readouterr().err
    assert "error[port-taken]: a port that is needed is in use; fix: hlaunch doctor names who has it\n" in told
    assert "  | HF_TOKEN=<hidden>\n" in told
    assert CANARY not in told


def test_the_lines_of_a_serving_engine_hide_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    view = LaunchView(Console(is_plain=True), cast(Any, None), is_detached=False)
    view._await_end()
    view.output(f"loaded\nHF_TOKEN={CANARY}\n".encode())
    assert view.close()
    assert capsys.readouterr().err.splitlines() == ["Ctrl-C stops", "loaded", "HF_TOKEN=<hidden>"]


def test_who_has_a_port_is_named_without_its_key() -> None:
    listen = "import socket, sys; s = socket.create_server(('', 0)); print(s.getsockname()[1]); sys.stdin.read()"
    argv = [sys.executable, "-X", f"api-key={CANARY}", "-uc", listen]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            port = int(process.stdout.readline())
            with pytest.raises(PreflightError, match=f"in use by pid {process.pid} ") as taken:
                check_port("127.0.0.1", port)
        finally:
            process.stdin.close()
    assert "-X api-key=<hidden> -uc" in taken.value.message
    assert CANARY[:4] not in taken.value.message
