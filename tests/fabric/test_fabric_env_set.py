"""`hlaunch env --set`: the right block, every other byte as it was, nothing written that lint calls an error."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest
from hosts import Hosts

REGISTRY = """\
# ours
version: 1
clusters:
  pair:   # two of them
    platform: gb10
    fabric: {rdma: required, subnet: 192.168.100.0/24}
    env:
      NCCL_DEBUG: WARN   # quiet
    nodes:
      - {name: one, role: head, ip: 192.168.100.1, gpus: 1, ifname: eth0, hcas: [mlx5_0]}
      - name: two        # the other
        role: worker
        ip: 192.168.100.2
        gpus: 1
        ifname: eth1
        hcas: [mlx5_1]
models:
  big: {model: tiny-oss, cluster: pair}
  small: {model: tiny-oss}
"""


@pytest.fixture
def hosts(tmp_path: Path) -> Hosts:
    made = Hosts(tmp_path)
    made.registry(REGISTRY)
    return made


def changed(hosts: Hosts) -> list[str]:
    """The lines that were taken out and put in."""
    after = (hosts.folder / "model_registry.yml").read_text()
    lines = difflib.unified_diff(REGISTRY.splitlines(), after.splitlines(), lineterm="", n=0)
    return [line for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---")]


def test_a_value_of_the_cluster_is_replaced_and_its_comment_stays(hosts: Hosts) -> None:
    done = hosts.cli("env", "big", "--set", "NCCL_DEBUG=INFO")
    assert done.code == 0, done.err
    assert done.out == "model_registry.yml:8: set pair env.NCCL_DEBUG = INFO (was WARN)\n"
    assert changed(hosts) == ["-      NCCL_DEBUG: WARN   # quiet", "+      NCCL_DEBUG: INFO   # quiet"]
    shown = hosts.cli("env", "big", "--json").json["nodes"]["two"]
    assert next(item["value"] for item in shown if item["name"] == "NCCL_DEBUG") == "INFO"


def test_a_new_value_of_the_cluster_and_of_each_style_of_node(hosts: Hosts) -> None:
    assert hosts.cli("env", "--cluster", "pair", "--set", "NCCL_IB_QPS_PER_CONNECTION=2").code == 0
    assert changed(hosts) == ['+      NCCL_IB_QPS_PER_CONNECTION: "2"']
    hosts.registry(REGISTRY)
    one = hosts.cli("env", "big", "--node", "one", "--set", "NCCL_RAS_ADDR=localhost:28030", "--json")
    assert one.code == 0, one.err
    assert one.json["entry"] == "pair/one"
    assert changed(hosts)[1].endswith("hcas: [mlx5_0], env: {NCCL_RAS_ADDR: localhost:28030}}")
    hosts.registry(REGISTRY)
    assert hosts.cli("env", "big", "--node", "two", "--set", "NCCL_RAS_ADDR=localhost:28029").code == 0
    assert changed(hosts) == ["+        env: {NCCL_RAS_ADDR: localhost:28029}"]


def test_a_model_without_a_cluster_has_its_own_env(hosts: Hosts) -> None:
    done = hosts.cli("env", "small", "--set", "GLOO_LOG_LEVEL=INFO", "--set", "OMP_NUM_THREADS=2")
    assert done.code == 0, done.err
    assert changed(hosts)[1] == '+  small: {model: tiny-oss, env: {GLOO_LOG_LEVEL: INFO, OMP_NUM_THREADS: "2"}}'


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("NCCL_IB_DISABLE=true", "bool-word"),
        ("NCCL_IB_TIMEOUT=99", "out-of-range"),
        ("NCCL_SOCKET_IFNAME==eth0", "gid-on-cluster"),
        ("NCCL_NVLS_ENABLE=2", "nvls-on"),
        ("RAY_AUTH_TOKEN=canary-token", "token-in-env"),
        ("CUDA_VISIBLE_DEVICES=0", "rank-env-leak"),
    ],
)
def test_what_lint_calls_an_error_is_not_written(hosts: Hosts, setting: str, words: str) -> None:
    done = hosts.cli("env", "big", "--set", setting)
    assert done.code == 5, done.out + done.err
    assert words in done.err
    assert "nothing was written" in done.err
    assert changed(hosts) == []
    assert "canary" not in done.out + done.err


def test_what_contradicts_the_registry_is_not_written(hosts: Hosts) -> None:
    done = hosts.cli("env", "big", "--set", "NCCL_IB_DISABLE=1")
    assert done.code == 3, done.out + done.err
    assert "contradicts rdma: required" in done.err
    assert "nothing was written" in done.err
    assert changed(hosts) == []


def test_a_warning_is_said_and_written(hosts: Hosts) -> None:
    done = hosts.cli("env", "big", "--set", "NCCL_IB_TIMEOUT=23")
    assert done.code == 0
    assert done.out == 'model_registry.yml:9: set pair env.NCCL_IB_TIMEOUT = "23"\n'
    assert done.err.startswith("warning[timeout-silence] ")
    asked = hosts.cli("env", "big", "--set", "NCCL_IB_TIMEOUT=24", "--json")
    assert (asked.json["written"], asked.err.partition(" ")[0]) == (True, "warning[timeout-silence]")
    hosts.registry(REGISTRY)
    assert hosts.cli("env", "big", "--set", "NCCL_IB_TIMEOUT=23").code == 0
    assert changed(hosts) == ['+      NCCL_IB_TIMEOUT: "23"']


def test_a_rehearsal_and_what_cannot_be_meant(hosts: Hosts) -> None:
    rehearsed = hosts.cli("env", "big", "--set", "NCCL_DEBUG=INFO", "--dry-run")
    assert rehearsed.code == 0
    assert "+      NCCL_DEBUG: INFO   # quiet" in rehearsed.out
    assert changed(hosts) == []
    nowhere = hosts.cli("env", "--set", "NCCL_DEBUG=INFO")
    assert (nowhere.code, nowhere.err.splitlines()[-1]) == (2, "hint: hlaunch env MODEL --set NAME=VALUE")
    assert "--dry-run goes with --set" in hosts.cli("env", "big", "--dry-run").err
    assert hosts.cli("env", "big", "--set", "NCCL_DEBUG").code == 2
    assert hosts.cli("env", "big", "--set", "9 lives=x").code == 2
    assert hosts.cli("env", "big", "--node", "three", "--set", "NCCL_DEBUG=INFO").code == 4
