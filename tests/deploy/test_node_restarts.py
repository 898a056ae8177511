"""What a node says while its engine, or the node itself, is being started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.registry.cluster import RaySettings
from launcher.supervise.node_engine import EngineStory
from launcher.supervise.node_records import KEEPER_FILE, LAST_END_FILE, between_runs
from launcher.supervise.node_report import NodeReport
from launcher.supervise.node_spec import NodeSpec, Peer
from launcher.supervise.node_supervisor import NodeSupervisor
from launcher.supervise.procfs import ProcessIdentity
from launcher.supervise.runtimes import ComposeRuntime, NodeHandle
from launcher.supervise.shell import Shell

SPEC = NodeSpec(
    launch="m", cluster="c", node="one", role="head", ip="10.0.0.1", plan="p", peers=(Peer("one", "10.0.0.1", "head"),),
    model="tiny-oss", revision=None, run_folder="/tmp/x", engine_config="", ray=None, token_file="",
)  # fmt: skip


def record(**fields: object) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize(("facts", "state"), [({}, "restarting"), ({"engines": 2}, "degraded")])
@pytest.mark.parametrize("has_ray", [False, True])
def test_a_head_whose_engine_is_started_again_is_not_ready(facts: dict[str, int], state: str, *, has_ray: bool) -> None:
    spec = NodeSpec(**{**{name: getattr(SPEC, name) for name in SPEC.__dataclass_fields__}, "ray": RaySettings()})
    supervisor = NodeSupervisor(spec if has_ray else SPEC, {}, None, lambda _: None)
    take = supervisor._on_engine_record
    take(record(kind="ready", url="http://10.0.0.1:8000", model="m", facts=facts))
    supervisor._serve()
    take(record(kind="phase", phase="restart", state="begin", detail="the core was killed; it is started again in 1 s"))
    supervisor._watch_cluster()
    assert supervisor.report.state == state
    take(record(kind="phase", phase="restart", state="end", detail="serves again"))
    supervisor._watch_cluster()
    assert supervisor.report.state == "ready"
    events = [event["text"] for event in supervisor.report.to_data()["events"]]
    assert events == ["engine: the core was killed; it is started again in 1 s", "engine: serves again"]


def test_between_two_runs_a_node_says_why(tmp_path: Path) -> None:
    def probe() -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "launcher.probe", "status", "--folder", str(tmp_path)]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)

    assert probe().returncode == 1, "nothing was ever started there"
    report = NodeReport(SPEC)
    report.cause, report.exit_code = "the engine was killed by SIGKILL", 1
    report.write_end(tmp_path)
    said = json.loads(probe().stdout)
    assert (said["state"], said["cause"], said["previous"]["restarts"]) == ("restarting", report.cause, 1)
    # Whoever would start it again is gone as well.
    nobody = ProcessIdentity(2**22 + 1, 0, "no boot of this machine")
    (tmp_path / KEEPER_FILE).write_text(json.dumps(nobody.to_data()))
    assert between_runs(tmp_path)["state"] == "failed"
    # The next run tells it, and a later silence is not blamed on it.
    fresh = NodeReport(SPEC)
    fresh.read_previous(tmp_path)
    assert fresh.previous is not None
    assert fresh.to_data()["events"][0]["text"] == f"started again after: {report.cause}"
    assert not (tmp_path / LAST_END_FILE).exists()


@pytest.mark.parametrize(
    ("running", "known", "said"),
    [
        ("c1", "c1", '{"state": "ready"}'),
        ("", "c1", '{"state": "restarting"}'),
        ("", "", ""),
    ],
)
def test_a_container_between_two_runs_is_told_by_docker(running: str, known: str, said: str, tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    docker.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *status=running*) echo "{running}";; "ps -aq"*) echo "{known}";; "ps -q"*) echo "{running}";;\n'
        """exec*) echo '{"state": "ready"}';; *inspect*) echo '{"state": "restarting"}';; esac\n"""
    )
    docker.chmod(0o755)
    node = NodeHandle("one", "head", "10.0.0.1", None, ".local/state/x", "/tmp/hl-x", "hl-m", "host", 1.0)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    shell = Shell("one", None, environ)
    assert shell.run(ComposeRuntime().status_argv(shell, node), is_checked=False).strip() == said


def test_a_story_without_figures_is_of_one_engine() -> None:
    story = EngineStory(NodeReport(SPEC), lambda _: None)
    assert story.restarting_state == "restarting"
