"""The node's parts: causes of Ray's end, host facts, who is in the cluster, probe verdicts, quoting for ssh."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import PreflightError
from launcher.node import stop
from launcher.probe import judge
from launcher.registry.cluster import RaySettings
from launcher.supervise.cluster_run import ClusterRun
from launcher.supervise.cluster_view import parse_view
from launcher.supervise.docker import parse_host_facts
from launcher.supervise.instance import InstanceFolder
from launcher.supervise.node_spec import NodeSpec, Peer
from launcher.supervise.ray_process import ray_argv, ray_cause, ray_environment
from launcher.supervise.runtimes import ComposeRuntime, NodeHandle
from launcher.supervise.shell import RemoteFailed, Shell, Unreachable

ROOT = Path(__file__).parents[2]
PEERS = (Peer("one", "10.0.0.1", "head"), Peer("two", "10.0.0.2", "worker", gpus=1))
SPEC = NodeSpec(
    launch="m", cluster="c", node="two", role="worker", ip="10.0.0.2", plan="p", peers=PEERS, model="tiny-oss",
    revision=None, run_folder="/tmp/x", engine_config="", ray=RaySettings(), token_file="/t",
)  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "text", "is_permanent"),
    [
        (["x", "  raylet [exit code=-9 (signal 9)]", "tail"], "Ray's raylet died (exit code -9 (signal 9))", False),
        (["ray.exceptions.AuthenticationError: RPC error"], "the head refused this node's Ray token", True),
        (
            ["RuntimeError: Version mismatch: The cluster was started with:"],
            "Ray or Python differs from the head's",
            True,
        ),
        (["/usr/bin/python: No module named 'ray'"], "Ray is not installed in this environment", True),
        ([], "Ray exited with status 1", False),
    ],
)
def test_the_cause_of_rays_end(lines: list[str], text: str, is_permanent: bool) -> None:
    cause = ray_cause(lines, "exited with status 1")
    assert (cause.text, cause.is_permanent) == (text, is_permanent)


def test_ray_gets_pinned_ports_and_no_token_in_its_environment() -> None:
    argv = ray_argv(SPEC)
    assert "--address=10.0.0.1:6379" in argv
    assert "--head" not in argv
    assert "--node-manager-port=6380" in argv
    head = replace(SPEC, role="head", ip="10.0.0.1", node="one")
    assert {"--head", "--port=6379", "--include-dashboard=false"} <= set(ray_argv(head))
    environment = ray_environment(SPEC, {"RAY_ADDRESS": "elsewhere", "RAY_AUTH_TOKEN": "canary", "A": "1"})
    assert environment["RAY_AUTH_MODE"] == "token"
    assert "canary" not in environment.values()
    assert "RAY_ADDRESS" not in environment


def test_a_view_names_who_is_missing_and_why() -> None:
    view = parse_view(
        b'{"nodes": [{"id": "a", "ip": "10.0.0.1", "is_alive": true, "gpus": 0}, '
        b'{"id": "b", "ip": "10.0.0.2", "is_alive": false, "reason": "SIGTERM"}, '
        b'{"id": "c", "ip": "10.0.0.9", "is_alive": true}]}'
    )
    assert view is not None
    assert [peer.name for peer in view.missing(PEERS)] == ["two"]
    assert view.last_words("10.0.0.2") == "SIGTERM"
    assert view.strangers(PEERS) == ("10.0.0.9",)
    assert parse_view(b"noise") is None
    assert parse_view(b'{"error": "refused", "message": "no"}').error == "refused"  # type: ignore[union-attr]


def test_a_spec_of_another_version_is_refused() -> None:
    assert NodeSpec.from_json(SPEC.to_json(), "f") == SPEC
    for text in (
        "{",
        "[]",
        SPEC.to_json().replace('"cpus"', '"cpu_count"'),
        SPEC.to_json().replace('"head"', '"worker"'),
    ):
        with pytest.raises(PreflightError, match="not a node plan"):
            NodeSpec.from_json(text, "f")


def test_host_facts_of_a_virtual_machine() -> None:
    facts = parse_host_facts(
        "CapEff:\t000001fffeffffff\nMax open files            1024     20000    files\nengine 20.10.24\n"
    )
    assert (facts.can_raise_limits, facts.nofile_hard, facts.engine_major, facts.has_rdma) == (False, 20000, 20, False)
    assert parse_host_facts("CapEff:\t000001ffffffffff\n").can_raise_limits
    # What Docker's command prints while its daemon does not run.
    assert parse_host_facts("engine \n").engine_major == 0
    assert parse_host_facts("engine\nengine \u00b2.1\n").engine_major == 0


DOCKER_DOWN = "echo Cannot connect to the Docker daemon >&2; exit 1"
DOCKER_ALONE = '[ "$1" = version ] && echo 29.0.0'


@pytest.mark.parametrize(
    ("script", "message", "hint"),
    [
        (DOCKER_DOWN, "one: Docker failed: Cannot connect to the Docker daemon", "--runtime process"),
        (DOCKER_ALONE, "one: Docker Compose failed", "docker-compose-plugin"),
        ("", "one: docker: No such file", "--runtime process"),
    ],
)
def test_up_by_compose_leaves_no_record_where_docker_is_not(
    tmp_path: Path, script: str, message: str, hint: str
) -> None:
    up = _hlaunch(tmp_path, script, "up", "m")
    assert up.returncode == 7, up.stderr
    assert message in up.stderr
    assert hint in up.stderr.splitlines()[-1]
    assert json.loads(_hlaunch(tmp_path, script, "ps", "--json").stdout) == []


def test_replacing_begins_when_nothing_of_the_old_is_left(tmp_path: Path) -> None:
    node = NodeHandle("gone", "head", "10.0.0.9", None, ".local/state/x", "/tmp/hl-x", "hl-m", "host", 1.0)
    folder = tmp_path / ".local/state/hlaunch/instances/m"
    folder.mkdir(parents=True)
    record = ClusterRun("m", "tiny-oss", "old", "compose", "p", (node,), 1.0).to_json()
    (folder / "cluster.json").write_text(record)
    up = _hlaunch(tmp_path, DOCKER_DOWN, "up", "m", "--replace")
    assert up.returncode == 1, up.stderr
    assert "error: m: not everything is gone\n  gone: " in up.stderr
    assert (folder / "cluster.json").read_text() == record


def test_two_starts_of_one_name_do_not_meet(tmp_path: Path) -> None:
    folder = InstanceFolder(tmp_path / ".local/state/hlaunch", "m")
    folder.create()
    lock = folder.try_lock()
    assert lock is not None
    try:
        up = _hlaunch(tmp_path, DOCKER_DOWN, "up", "m")
    finally:
        os.close(lock)
    assert up.returncode == 5, up.stderr
    assert "another `hlaunch up` is starting m" in up.stderr


def _hlaunch(home: Path, docker: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command with a cluster of one node and no programs but a shell and what `docker` is scripted to do."""
    (commands := home / "bin").mkdir(exist_ok=True)
    if not (commands / "sh").exists():
        (commands / "sh").symlink_to("/bin/sh")
    if docker:
        (commands / "docker").write_text(f"#!/bin/sh\n{docker}\n")
        (commands / "docker").chmod(0o755)
    (home / "r.yml").write_text(
        "version: 1\n"
        "clusters: {c: {nodes: [{name: one, role: head, ip: 10.0.0.1}]}}\n"
        "models: {m: {model: tiny-oss, cluster: c}}\n"
    )
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", "--file", str(home / "r.yml"), *command],
        env={"PATH": str(commands), "HOME": str(home), "PYTHONPATH": str(ROOT)}, cwd=home, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("report", "question", "problem"),
    [
        ({"role": "head", "nodes": [{"name": "two", "is_alive": False}]}, "head", "not in the cluster: two"),
        ({"role": "head", "state": "ready", "nodes": [{"name": "two", "is_alive": True}]}, "head", ""),
        ({"role": "head", "state": "degraded", "nodes": [{"name": "two", "is_alive": True}]}, "head", ""),
        ({"role": "head", "state": "degraded", "nodes": [{"name": "two", "is_alive": False}]}, "head",
         "not in the cluster: two"),
        ({"role": "head", "state": "restarting", "nodes": []}, "ready", "head: restarting"),
        ({"role": "worker", "state": "ready"}, "worker", ""),
        ({"role": "worker", "state": "ready"}, "ready", "this node is a worker"),
        ({"role": "worker", "state": "failed", "cause": "boom"}, "worker", "boom"),
    ],
)  # fmt: skip
def test_probe_verdicts(report: dict[str, object], question: str, problem: str) -> None:
    assert judge(report, question) == problem


def test_ssh_gets_every_word_quoted() -> None:
    argv = Shell("n", "host", {}).argv(["sh", "-c", "echo $1", "sh", "a b; rm -rf /"])
    assert argv[:1] == ["ssh"]
    assert argv[-2] == "host"
    assert shlex.split(argv[-1]) == ["sh", "-c", "echo $1", "sh", "a b; rm -rf /"]


def test_a_host_that_ssh_does_not_reach_is_no_fault_of_docker(tmp_path: Path) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\necho 'ssh: Could not resolve hostname n1' >&2; exit 255\n")
    ssh.chmod(0o755)
    shell = Shell("one", "me@n1", {"PATH": os.environ["PATH"], "HLAUNCH_SSH": str(ssh)})
    with pytest.raises(Unreachable) as caught:
        ComposeRuntime().check(shell)
    assert caught.value.message == "one: cannot reach me@n1 over ssh: Could not resolve hostname n1"
    assert caught.value.exit_code == 7
    assert caught.value.hint.endswith(f"{ssh} -o BatchMode=yes me@n1 true")
    assert "Docker" not in caught.value.hint
    # Another status is the command's own, and so is 255 where there is no ssh.
    ssh.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(RemoteFailed, match="Docker failed"):
        ComposeRuntime().check(shell)
    with pytest.raises(RemoteFailed, match="sh failed: exit status 255"):
        Shell("one", None, dict(os.environ)).run(["sh", "-c", "exit 255"])


def test_a_node_is_cleared_away_and_nobody_who_only_names_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    reader = [sys.executable, "-c", "input()", str(folder)]
    other = subprocess.Popen(reader, stdin=subprocess.PIPE)
    own = subprocess.Popen(reader, stdin=subprocess.PIPE, env={**os.environ, "_HLAUNCH_NODE_FOLDER": str(folder)})
    try:
        _wait_until_executed(own)
        assert stop(folder) == 0
        assert own.wait(10) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        own.kill()
        own.communicate()
        other.communicate(b"\n")
    assert other.returncode == 0
    assert not folder.exists()


def _wait_until_executed(process: subprocess.Popen[bytes]) -> None:
    """Wait until a process has its own environment: until then it is a copy of this one."""
    deadline = time.monotonic() + 10
    while b"input()" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.01)
