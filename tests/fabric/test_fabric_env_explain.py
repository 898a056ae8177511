"""`hlaunch env --explain` and `--rank`: all that a node gets, what its start fills in, which cluster is meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hosts import Result

from launcher.cli import run

ROOT = Path(__file__).parents[2]
TWO = (ROOT / "examples" / "two-nodes.yml").read_text()
MORE = """
  other:
    nodes:
      - {name: spark-02, role: head, ip: 10.0.0.1}
      - {name: alone, role: worker, ip: 10.0.0.2}
"""
Cli = Callable[..., Result]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    (tmp_path / "model_registry.yml").write_text(TWO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HLAUNCH_CLUSTER", raising=False)
    monkeypatch.setenv("HLAUNCH_API_KEY", "canary")

    def call(*args: str) -> Result:
        code = run(list(args))
        captured = capsys.readouterr()
        assert "canary" not in captured.out + captured.err
        return Result(int(code), captured.out, captured.err)

    return call


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_HOME", "/models, from the container"),
        ("NVIDIA_DRIVER_CAPABILITIES", "compute,utility, from the container"),
        ("RAY_AUTH_TOKEN_PATH", "/run/secrets/ray_token, from the container"),
        ("TOKENIZERS_PARALLELISM", "false, from built-in"),
        ("NCCL_NET", "IB, from fabric rdma"),
        ("OMP_NUM_THREADS", "unset"),
    ],
)
def test_what_a_rendered_file_holds_is_explained(cli: Cli, name: str, value: str) -> None:
    result = cli("env", "gpt-oss-20b", "--explain", name)
    assert result.code == 0, result.err
    assert result.out.count(value) == 2


def test_a_value_carried_from_here_says_so_once(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    told = cli("env", "gpt-oss-20b", "--explain", "NCCL_ALGO", "--node", "spark-01").out
    assert "Ring, carried from the launching environment" in told


def test_what_the_start_fills_in_is_not_called_unset(cli: Cli, tmp_path: Path) -> None:
    text = "\n".join(line for line in TWO.splitlines() if "ifname:" not in line and "hcas: [" not in line)
    (tmp_path / "model_registry.yml").write_text(text)
    for name in ("NCCL_IB_HCA", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        assert cli("env", "gpt-oss-20b", "--explain", name).out.count("filled in on the node at start") == 2
    assert "filled in" not in cli("env", "gpt-oss-20b", "--explain", "NCCL_IB_GID_INDEX").out
    assert cli("env", "gpt-oss-20b", "--explain", "NCCL_IB_HCA", "--json").json["filled_at_start"] == [
        "spark-01",
        "spark-02",
    ]


def test_a_node_alone_names_its_cluster(cli: Cli, tmp_path: Path) -> None:
    result = cli("env", "--explain", "NCCL_IB_HCA", "--node", "spark-02")
    assert result.code == 0, result.err
    assert "=rocep1s0f0,roceP2p1s0f0, from fabric hcas" in result.out
    assert "spark-01" not in result.out
    missing = cli("env", "--node", "spark-03")
    assert missing.code == 4
    assert "did you mean" in missing.err
    text = TWO.replace("clusters:\n", f"clusters:{MORE}", 1)
    (tmp_path / "model_registry.yml").write_text(text)
    assert cli("env", "--node", "spark-02", "--json").json["cluster"] == "pair", "the defaults name it"
    assert cli("env", "--node", "alone", "--json").json["cluster"] == "other"
    (tmp_path / "model_registry.yml").write_text(text.replace("  cluster: pair\n", "", 1))
    both = cli("env", "--node", "spark-02")
    assert both.code == 2
    assert "--cluster" in both.err


def test_a_rank_has_its_nodes_whole_environment(cli: Cli) -> None:
    result = cli("env", "gpt-oss-20b", "--rank", "1")
    assert result.code == 0, result.err
    assert "rank 1: spark-02, cuda:0, dp 0 pp 0 tp 1" in result.err
    found = cli("env", "gpt-oss-20b", "--rank", "1", "--json").json
    values = {item["name"]: item["value"] for item in found["variables"]}
    assert (found["node"], values["HLAUNCH_NODE_IP"], values["HF_HOME"]) == ("spark-02", "192.168.100.2", "/models")
    assert cli("env", "gpt-oss-20b", "--rank", "2").code == 2
    assert cli("env", "--rank", "0").code == 2


def test_a_rank_of_this_host(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "model_registry.yml").write_text(
        "models: {m: {model: tiny-oss, device: cpu, env: {OMP_NUM_THREADS: '2'}}}"
    )
    found = json.loads(cli("env", "m", "--rank", "0", "--json").out)
    assert {item["name"]: item["value"] for item in found["variables"]}["OMP_NUM_THREADS"] == "2"
    assert "2, from model" in cli("env", "m", "--explain", "OMP_NUM_THREADS").out


def test_thread_counts_of_the_launching_machine_stay_there(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    names = {item["name"] for item in cli("env", "--cluster", "pair", "--json").json["nodes"]["spark-01"]}
    assert "OMP_NUM_THREADS" not in names
