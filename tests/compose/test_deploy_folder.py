"""The repository's deploy/ is what `hlaunch render` makes of the example cluster; the command and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compose_support import compose

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "two-nodes.yml"


# What a developer's shell may hold; each of these changed a rendered file once.
SHELL = {
    "NCCL_IB_TIMEOUT": "22",
    "NCCL_IB_DISABLE": "1",
    "NCCL_DEBUG": "TRACE",
    "NCCL_NET_PLUGIN": "aws-ofi",
    "RAY_worker_niceness": "15",
    "OMP_NUM_THREADS": "3",
    "CUDA_VISIBLE_DEVICES": "1",
}


def hlaunch(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher.cli", *args],
        cwd=cwd,
        env={
            **SHELL,
            "PATH": os.environ["PATH"],
            "HOME": str(cwd),
            "PYTHONPATH": str(ROOT),
            "HLAUNCH_API_KEY": "canary-key",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_deploy_folder_has_not_drifted(tmp_path: Path) -> None:
    done = hlaunch("--file", str(EXAMPLE), "render", "gpt-oss-20b", "-o", str(ROOT / "deploy"), "--check", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), (
        f"{done.stdout}{done.stderr}run: hlaunch --file examples/two-nodes.yml render gpt-oss-20b -o deploy"
    )


@pytest.mark.parametrize("role", ["head", "worker"])
def test_compose_takes_the_deploy_folder(role: str) -> None:
    variables = {"HLAUNCH_MODEL_DIR": "/srv/models", "HLAUNCH_API_KEY": "x"}
    done = compose("config", "-q", cwd=ROOT / "deploy" / role, variables=variables)
    assert (done.returncode, done.stderr) == (0, "")


def test_render_writes_checks_and_keeps_secrets(tmp_path: Path) -> None:
    common = ("--file", str(EXAMPLE), "render", "tiny-oss")
    written = hlaunch(*common, "-o", "out", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    assert written.stdout.splitlines()[0] == "out/head/.env.example"
    assert hlaunch(*common, "-o", "out", "--check", cwd=tmp_path).returncode == 0
    file = tmp_path / "out" / "head" / "docker-compose.yml"
    file.write_text(file.read_text() + "# edited\n")
    drifted = hlaunch(*common, "-o", "out", "--check", cwd=tmp_path)
    assert (drifted.returncode, drifted.stdout) == (10, "out/head/docker-compose.yml: differs\n")
    printed = hlaunch(*common, "--json", cwd=tmp_path)
    assert set(json.loads(printed.stdout)) == {line[4:] for line in written.stdout.splitlines()}
    everything = written.stdout + written.stderr + printed.stdout + printed.stderr
    assert "canary" not in everything + file.read_text()


CLUSTER = """\
clusters:
  c:
    platform: cpu
    nodes:
      - {name: a, role: head, ip: 192.168.100.1}
%s
models:
  m: {model: tiny-oss, cluster: c, device: cpu, pp: %d}
"""


def test_a_folder_of_an_earlier_plan_is_told_from_one_of_a_node_that_left(tmp_path: Path) -> None:
    nodes = [f"      - {{name: {name}, role: worker, ip: 192.168.100.{ip}}}" for name, ip in (("b", 2), ("c", 3))]

    def render(count: int, *options: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "r.yml").write_text(CLUSTER % ("\n".join(nodes[:count]), count + 1))
        return hlaunch("--file", "r.yml", "render", "m", "-o", "out", *options, cwd=tmp_path)

    first = render(2)
    assert first.returncode == 0, first.stderr
    drifted = render(1, "--check").stdout.splitlines()
    assert "out/worker-b: is of an earlier plan" in drifted
    assert "out/worker-c: is of node 'c', which is not in the plan" in drifted
    assert len([line for line in drifted if "worker-" in line]) == 2
    said = [line for line in render(1).stderr.splitlines() if "worker-" in line]
    assert said == [
        "out/worker-b is of an earlier plan: remove it",
        "out/worker-c is of node 'c', which is not in the plan: stop it there, remove it",
    ]


def test_a_difference_shows_what_is_no_secret_of_the_example_files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = hlaunch("--file", str(EXAMPLE), "plan", "gpt-oss-20b", "--diff", "--against", "empty", cwd=tmp_path)
    assert "secret: export it, do not write it here" in done.stdout
    assert "canary" not in done.stdout


def test_the_token_is_made_once_and_copied(tmp_path: Path) -> None:
    """Do what the two pages say, with a stand-in for scp that copies from the other folder."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    scp = bin_folder / "scp"
    scp.write_text(f'#!/bin/sh\ntest "$1" = spark-01:deploy/head/ray_token && cat {tmp_path}/head/ray_token > "$2"\n')
    scp.chmod(0o755)
    for role in ("head", "worker"):
        (folder := tmp_path / role).mkdir()
        page = (ROOT / "deploy" / role / "README.md").read_text()
        (folder / ".env.example").write_text("A=1\n")
        commands = [line for line in page.splitlines() if line.startswith("(umask")]
        assert len(commands) == 2
        for command in commands:
            subprocess.run(
                ["sh", "-e", "-c", command],
                cwd=folder, env={"PATH": f"{bin_folder}:{os.environ['PATH']}"}, check=True, timeout=30,
            )  # fmt: skip
        assert {(folder / name).stat().st_mode & 0o777 for name in ("ray_token", ".env")} == {0o600}
    tokens = [(tmp_path / role / "ray_token").read_text().strip() for role in ("head", "worker")]
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) >= 43


def test_a_model_without_a_cluster_says_so(tmp_path: Path) -> None:
    registry = tmp_path / "model_registry.yml"
    registry.write_text("models: {tiny-oss: {model: tiny-oss}}\n")
    done = hlaunch("render", "tiny-oss", cwd=tmp_path)
    assert done.returncode == 2
    assert "has no cluster" in done.stderr
