"""`hlaunch up --nnodes`: what the options mean, what is refused before anything starts, and what the plan shows."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from e2e_support import HLAUNCH, ROOT, Running, free_port

from engine.config import EngineConfig, NodesConfig
from launcher.errors import UsageError
from launcher.plan.joined_nodes import DEFAULT_HEAD_PORT, parse_nodes, secret_blockers, secret_variables

NAMES = ("node0", "node1")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((1, None, None, None), None),
        ((1, 0, None, None), None),
        ((2, 1, "10.0.0.1", None), NodesConfig(NAMES, 1, (), "10.0.0.1", DEFAULT_HEAD_PORT)),
        ((2, 0, "head.local:700", None), NodesConfig(NAMES, 0, (), "head.local", 700)),
        ((2, 1, "[fd00::1]:700", None), NodesConfig(NAMES, 1, (), "fd00::1", 700)),
        ((2, 1, "fd00::1", None), NodesConfig(NAMES, 1, (), "fd00::1", DEFAULT_HEAD_PORT)),
        ((2, 1, "10.0.0.1", "10.0.0.2"), NodesConfig(NAMES, 1, ("", "10.0.0.2"), "10.0.0.1", DEFAULT_HEAD_PORT)),
    ],
)
def test_options_become_nodes(
    asked: tuple[int, int | None, str | None, str | None], expected: NodesConfig | None
) -> None:
    assert parse_nodes(*asked) == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((0, 0, "10.0.0.1", None), "--nnodes 0"),
        ((2, None, "10.0.0.1", None), "several nodes need --nnodes, --node-rank and --head-addr"),
        ((2, 0, None, None), "several nodes need"),
        ((2, 2, "10.0.0.1", None), "--node-rank 2: the nodes of --nnodes 2 are 0 to 1"),
        ((2, 0, "10.0.0.1:port", None), "is not HOST"),
        ((2, 0, "10.0.0.1:70000", None), "is not HOST"),
        ((2, 0, ":700", None), "is not HOST"),
        ((2, 0, "10.0.0.1:²", None), "is not HOST"),
        ((2, 0, "[::1", None), "is not HOST"),
        ((2, 0, "[::1]700", None), "is not HOST"),
        ((2, 0, "0.0.0.0", None), "--head-addr 0.0.0.0 is no address of one node"),
        ((2, 1, "[::]:700", None), "--head-addr :: is no address of one node"),
        ((2, 1, "10.0.0.1", "0.0.0.0"), "--node-addr 0.0.0.0 is no address of one node"),
        ((2, 0, "10.0.0.1", "1.2.3.4"), "--node-addr 1.2.3.4: the head's own address is that of --head-addr"),
        ((1, None, None, "10.0.0.2"), "--nnodes 1: 2 to 64 nodes"),
    ],
)
def test_options_that_make_no_nodes_are_named(
    asked: tuple[int, int | None, str | None, str | None], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        parse_nodes(*asked)


def up(folder: Path, *options: str, secret: str = "") -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "HLAUNCH_STATE_DIR": str(folder), "NO_COLOR": "1"}
    for name in ("MODEL_NAME", "HLAUNCH_NODE_SECRET", "HLAUNCH_NODE_SECRET_FILE"):
        environ.pop(name, None)
    if secret:
        environ["HLAUNCH_NODE_SECRET"] = secret
    argv = [*HLAUNCH, "up", "tiny-oss", "--nnodes", "2", "--head-addr", "127.0.0.1", "--set", "device=cpu", *options]
    return subprocess.run(argv, cwd=ROOT, env=environ, text=True, capture_output=True, check=False)


def test_without_a_secret_nothing_starts(tmp_path: Path) -> None:
    done = up(tmp_path, "--node-rank", "0", "--set", "pp=2")
    assert done.returncode == 5
    assert done.stderr.splitlines()[0] == "error: nodes need a secret that they share, and none is set"
    assert "export HLAUNCH_NODE_SECRET_FILE=node.secret" in done.stderr
    assert not (tmp_path / "instances").exists()


def test_a_secret_that_the_engine_would_refuse_is_refused_before_anything_starts(tmp_path: Path) -> None:
    assert (secret_blockers({"HLAUNCH_NODE_SECRET": "x" * 16}), len(secret_variables({}))) == ([], 0)
    file = tmp_path / "node.secret"
    file.write_text("x" * 64)
    file.chmod(0o644)
    for environ, words, fix in (
        ({"HLAUNCH_NODE_SECRET_FILE": str(file)}, "can be read by others (mode 0644)", f"run: chmod 600 {file}"),
        ({"HLAUNCH_NODE_SECRET_FILE": str(tmp_path / "none")}, "No such file", "every node needs the file"),
        ({"HLAUNCH_NODE_SECRET": "short"}, "has 5 bytes, not 16 to 4096", "make one: openssl rand -hex 32"),
        ({"HLAUNCH_NODE_SECRET": "x" * 16, "HLAUNCH_NODE_SECRET_FILE": "f"}, "are both set", "unset one of them"),
    ):
        (error,) = secret_blockers(environ)
        assert words in error.message
        assert (error.hint, error.exit_code) == (fix, 5)
    done = up(tmp_path, "--node-rank", "1", secret="short")
    assert (done.returncode, "has 5 bytes, not 16" in done.stderr) == (5, True)


def test_one_rank_is_nothing_for_two_nodes(tmp_path: Path) -> None:
    done = up(tmp_path, "--node-rank", "0", secret="x" * 32)
    assert done.returncode == 6
    assert "error: tp 1 pp 1 dp 1: 1 rank for 2 nodes" in done.stderr
    assert "hint: add --set pp=2, or --set dp=2" in done.stderr


def test_the_dry_run_shows_both_nodes_and_hides_the_secret(tmp_path: Path) -> None:
    secret = "canary secret of the test, long enough"
    done = up(tmp_path, "--node-rank", "0", "--set", "tp=2", "--set", "pp=2", "--dry-run", "--json", secret=secret)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert [(rank["rank"], rank["node"]) for rank in plan["placement"]] == [
        (0, "node0"), (1, "node0"), (2, "node1"), (3, "node1"),
    ]  # fmt: skip
    config = EngineConfig.from_json(json.dumps(plan["engine_config"]))
    assert config.nodes == NodesConfig(NAMES, 0, (), "127.0.0.1", DEFAULT_HEAD_PORT)
    assert "engine.server" in plan["argv"]
    assert secret not in done.stdout + done.stderr
    assert "HLAUNCH_NODE_SECRET" not in done.stderr  # it is no unknown option
    assert (plan["url"], plan["head_addr"]) == ("http://127.0.0.1:8000", None)
    other = up(tmp_path, "--node-rank", "1", "--dry-run", "--json", secret=secret)
    assert other.returncode == 0, other.stderr
    plan = json.loads(other.stdout)
    assert "engine.executor.node_agent" in plan["argv"]
    assert (plan["url"], plan["head_addr"]) == ("", f"127.0.0.1:{DEFAULT_HEAD_PORT}")
    lines = up(tmp_path, "--node-rank", "1", "--dry-run", secret=secret).stdout.splitlines()
    assert lines[-1] == f"joins: head 127.0.0.1:{DEFAULT_HEAD_PORT}, as node1; the head has the address"
    assert "unknown: the head places the ranks, and its dry run shows them" in lines


def test_a_node_that_joins_is_no_server_of_its_own(tmp_path: Path) -> None:
    head, port = f"127.0.0.1:{free_port()}", free_port()
    environ = {**os.environ, "NO_COLOR": "1", "HLAUNCH_NODE_SECRET": "a secret of the test, long enough"}
    for name in ("MODEL_NAME", "HLAUNCH_NODE_SECRET_FILE"):
        environ.pop(name, None)
    first, second = (Running("", {**environ, "HLAUNCH_STATE_DIR": str(tmp_path / name)}) for name in ("head", "node"))

    def start(server: Running, rank: int) -> subprocess.Popen[bytes]:
        # The node's own port is where the head answers: it must not be taken for this node's.
        options = ["--node-rank", str(rank), "--head-addr", head, "--port", str(port), "--set", "pp=2"]
        argv = [*HLAUNCH, "up", "tiny-oss", "--nnodes", "2", "--set", "device=cpu", *options]
        return subprocess.Popen(
            argv, cwd=ROOT, env=server.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def state() -> str:
        done = second.hlaunch("status", "tiny-oss", "--json", check=False)
        return str(json.loads(done.stdout)["state"]) if done.returncode == 0 else ""

    def wait_for(word: str) -> None:
        deadline = time.monotonic() + 60
        while state() != word:
            assert time.monotonic() < deadline, f"{state()!r} is not {word!r}"

    started = [start(second, 1)]
    try:
        wait_for("waiting")
        started.append(start(first, 0))
        wait_for("serving")
        (fact,) = json.loads(second.hlaunch("ps", "--json").stdout)
        assert (fact["state"], fact["url"], fact["head_addr"]) == ("serving", "", head)
        (own,) = json.loads(first.hlaunch("ps", "--json").stdout)
        assert (own["url"], own["head_addr"]) == (f"http://127.0.0.1:{port}", None)
        row = second.hlaunch("status", "tiny-oss").stdout.splitlines()[1].split()
        assert (row[2], row[4:6]) == ("serving", ["head", head])
        error = f"error: tiny-oss here is a node of the head at {head}, which serves it"
        for words in (("top", "--once"), ("connect", "env"), ("chat", "tiny-oss", "-m", "hi"), ("bench", "tiny-oss")):
            refused = second.hlaunch(*words, check=False)
            assert (refused.returncode, refused.stderr.splitlines()[0]) == (1, error), words
        again = second.hlaunch("up", "tiny-oss", check=False).stderr
        assert f"is already running (pid {fact['pid']}, head {head})" in again
        started[1].kill()
        wait_for("waiting")
    finally:
        for server in (first, second):
            server.hlaunch("down", "--all", check=False)
        for process in started:
            process.kill()
            process.wait()
