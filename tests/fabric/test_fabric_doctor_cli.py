"""`doctor` and `env` as commands: exit codes, nodes that cannot be read, deadlines, secrets, JSON."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hosts import Hosts
from trees import healthy

CANARY = "canary-5f1d0c7e"

REGISTRY = """\
version: 1
clusters:
  spark-pair:
    platform: gb10
    fabric: {rdma: required, subnet: 192.168.100.0/24, mtu: 9000, tc: 106}
    ray: {port: 6379}
    env: {NCCL_DEBUG: WARN}
    nodes:
      - {name: spark-01, role: head, ip: 192.168.100.1, ssh: silent-1, gpus: 1, ifname: enP2p1s0f0np0, hcas: [rocep1s0f0, roceP2p1s0f0]}
      - {name: spark-02, role: worker, ip: 192.168.100.2, ssh: silent-2, gpus: 1, ifname: enP2p1s0f0np0, hcas: [rocep1s0f0, roceP2p1s0f0]}
  mixed:
    platform: cpu
    nodes:
      - {name: one, role: head, ip: 10.0.0.1, ssh: refused}
      - {name: two, role: worker, ip: 10.0.0.2, ssh: stranger}
      - {name: three, role: worker, ip: 10.0.0.3, ssh: bare}
      - {name: four, role: worker, ip: 10.0.0.4, ssh: chatty}
      - {name: five, role: worker, ip: 10.0.0.5, ssh: here}
models:
  tiny-oss: {model: tiny-oss}
  gpt-oss-20b: {model: openai/gpt-oss-20b, cluster: spark-pair, env: {NCCL_IB_QPS_PER_CONNECTION: "4"}}
"""  # noqa: E501


@pytest.fixture
def hosts(tmp_path: Path) -> Hosts:
    made = Hosts(tmp_path)
    made.registry(REGISTRY)
    return made


def test_this_host_needs_no_registry(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path)
    result = hosts.cli("doctor", "--json")
    assert result.code in (0, 5), result.err
    assert result.json["cluster"] == "this-host"
    assert [node["read"] for node in result.json["nodes"].values()] == [True]


def test_two_ranks_on_this_host_meet_over_real_sockets(tmp_path: Path) -> None:
    hosts = Hosts(tmp_path)
    result = hosts.cli("doctor", "--active", "--json")
    assert "1,048,576 bytes" in result.finding("all-reduce-ok")["evidence"]


def test_each_way_not_to_reach_a_node_has_its_own_fix(hosts: Hosts) -> None:
    began = time.monotonic()
    result = hosts.cli("doctor", "--cluster", "mixed", "--json")
    assert result.code == 5
    found = {item["where"]: item for item in result.json["findings"] if item["code"] == "node-unreachable"}
    assert set(found) == {"one", "two", "three", "four"}
    assert "Connection refused" in found["one"]["evidence"]
    assert "sshd" in found["one"]["fix"]
    assert found["two"]["fix"] == "ssh-copy-id stranger"
    assert "Python" in found["three"]["fix"]
    assert result.json["nodes"]["five"]["read"]
    assert result.finding("node-ip-absent")["where"] == "five"
    # The one that never stops talking is bounded, not believed.
    assert time.monotonic() - began < 120


def test_silent_nodes_are_waited_for_side_by_side(hosts: Hosts) -> None:
    result = hosts.cli("doctor", "--cluster", "spark-pair", "--deadline", "3", "--json")
    assert result.code == 5
    assert [item["where"] for item in result.json["findings"] if item["code"] == "node-unreachable"] == [
        "spark-01",
        "spark-02",
    ]
    assert "no answer within 3 s" in result.finding("node-unreachable")["evidence"]
    # One after the other they would take 6 s.
    assert 3 <= result.json["seconds"] < 5.8


def test_trees_stand_in_for_hosts(hosts: Hosts, tmp_path: Path) -> None:
    for number in (1, 2):
        healthy(tmp_path / f"trees/spark-0{number}", number)
    result = hosts.cli("doctor", "--cluster", "spark-pair", "--root", str(tmp_path / "trees"), "--json")
    assert result.code == 0, result.out
    assert result.codes() == {"tc-decoded"}
    (tmp_path / "trees/spark-02/dev/infiniband/uverbs0").unlink()
    broken = hosts.cli("doctor", "gpt-oss-20b", "--node", "spark-02", "--root", str(tmp_path / "trees"))
    assert broken.code == 5
    assert "error[dev-node-missing] spark-02: rocep1s0f0" in broken.out
    assert "spark-01" not in broken.out
    assert "1 error" in broken.err


def test_unknown_names_are_exit_4_with_a_hint(hosts: Hosts) -> None:
    assert hosts.cli("doctor", "--cluster", "spark-par").code == 4
    result = hosts.cli("env", "--cluster", "spark-pair", "--node", "spark-1")
    assert result.code == 4
    assert "did you mean 'spark-01'" in result.err
    assert hosts.cli("doctor", "no-such-model").code == 4
    assert hosts.cli("doctor", "--active", "--root", ".").code == 2
    assert hosts.cli("doctor", "--cluster", "spark-pair", "--print-firewall", "--firewall", "pf").code == 2


def test_firewall_lines_name_the_other_node_only(hosts: Hosts) -> None:
    result = hosts.cli("doctor", "--cluster", "spark-pair", "--node", "spark-01", "--print-firewall")
    assert result.code == 0
    assert "-s 192.168.100.2 -p tcp --dport 6379:6385 -j ACCEPT" in result.out
    assert "--dport 10002:19999 -j DROP" in result.out
    assert "-s 192.168.100.1 " not in result.out
    assert "-s 192.168.100.2 -p tcp --dport 32768:60999 -j ACCEPT" in result.out
    assert "ports of 32768-60999 that the kernel picks" in result.out
    assert "29540" not in result.out, "with Ray nobody comes to the head's desk"
    data = hosts.cli("doctor", "--cluster", "spark-pair", "--node", "spark-01", "--print-firewall", "--json").json
    assert (data["tool"], data["nodes"]) == ("iptables", {"spark-01": result.out.splitlines()})
    nft = hosts.cli("doctor", "--cluster", "spark-pair", "--print-firewall", "--firewall", "nft")
    assert "ip saddr { 192.168.100.1 } tcp dport" in nft.out
    ufw = hosts.cli("doctor", "--cluster", "spark-pair", "--print-firewall", "--firewall", "ufw")
    assert "sudo ufw allow proto tcp from 192.168.100.1 to any port 6380:6385" in ufw.out


def test_env_shows_each_node_and_each_origin(hosts: Hosts) -> None:
    result = hosts.cli("env", "gpt-oss-20b", "--json", NCCL_BUFFSIZE="8388608")
    assert result.code == 0, result.err
    nodes = result.json["nodes"]
    assert list(nodes) == ["spark-01", "spark-02"]
    first = {item["name"]: item for item in nodes["spark-01"]}
    second = {item["name"]: item for item in nodes["spark-02"]}
    assert (first["HLAUNCH_NODE_IP"]["value"], second["HLAUNCH_NODE_IP"]["value"]) == ("192.168.100.1", "192.168.100.2")
    assert first["NCCL_NET"] == {
        "name": "NCCL_NET",
        "value": "IB",
        "origin": "fabric rdma",
        "effect": "the only net that is tried: no fallback",
        "scope": "C",
        "shadowed": [],
    }
    assert first["NCCL_DEBUG"]["origin"] == "cluster env"
    assert "model_registry.yml:" in first["NCCL_IB_QPS_PER_CONNECTION"]["origin"]
    assert first["NCCL_BUFFSIZE"]["origin"] == "carried from the launching environment"
    table = hosts.cli("env", "gpt-oss-20b")
    assert all(len(line) <= 80 for line in table.out.splitlines())


def test_env_says_what_only_the_hosts_know(hosts: Hosts) -> None:
    nameless = REGISTRY.replace(", ifname: enP2p1s0f0np0, hcas: [rocep1s0f0, roceP2p1s0f0]}", "}", 1)
    assert nameless != REGISTRY
    hosts.registry(nameless)
    result = hosts.cli("env", "--cluster", "spark-pair")
    assert "spark-01: the interface is the one that carries the node's ip" in result.err
    assert "spark-01: the HCAs are the ACTIVE ones" in result.err
    assert "spark-02" not in result.err


def test_explain_gives_value_origin_effect_and_what_is_hidden(hosts: Hosts) -> None:
    result = hosts.cli("env", "gpt-oss-20b", "--explain", "NCCL_IB_TC", "--node", "spark-01", NCCL_IB_TC="8")
    assert result.code == 0, result.err
    for text in ("traffic class", "106, from fabric tc", "over 8, carried from", "an integer 0..255", "equal on every"):
        assert text in result.out
    dead = hosts.cli("env", "--explain", "NCCL_TIMEOUT")
    assert dead.code == 0
    assert "never existed" in dead.out
    unknown = hosts.cli("env", "--explain", "NCCL_IB_TIMOUT")
    assert unknown.code == 2
    assert "NCCL_IB_TIMEOUT" in unknown.err


def test_lint_reads_files_registry_and_process_with_lines(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"# ours\nNCCL_IB_DISABLE=true\nRAY_AUTH_TOKEN={CANARY}\n")
    result = hosts.cli(
        "env",
        "--cluster",
        "spark-pair",
        "--lint",
        "--env-file",
        ".env",
        "--json",
        NCCL_IB_TIMEOUT="23",
        HF_TOKEN=CANARY,
    )
    assert result.code == 5
    assert result.finding("bool-word")["where"] == ".env:2"
    assert result.finding("bool-word")["fix"] == "remove NCCL_IB_DISABLE: the fabric says it"
    assert result.finding("token-in-env")["where"] == ".env:3"
    assert result.finding("timeout-silence")["where"] == "process environment"
    text = hosts.cli("env", "--cluster", "spark-pair", "--lint", "--env-file", ".env", HF_TOKEN=CANARY)
    assert CANARY not in result.out + result.err + text.out + text.err
    assert "error[bool-word] .env:2: NCCL_IB_DISABLE" in text.out
    clean = hosts.cli("env", "--cluster", "spark-pair", "--lint")
    assert clean.code == 0
    assert hosts.cli("env", "--env-file", "nothing.env").code == 2


def test_lines_of_the_registry_are_named(hosts: Hosts) -> None:
    hosts.registry(REGISTRY.replace("NCCL_DEBUG: WARN", "NCCL_DEBUG: TRACE"))
    result = hosts.cli("env", "--cluster", "spark-pair", "--lint", "--json")
    assert result.finding("debug-left-on")["where"] == "model_registry.yml:7"


def test_no_token_of_a_far_host_comes_back(hosts: Hosts) -> None:
    result = hosts.cli(
        "doctor", "--cluster", "mixed", "--node", "five", "--json", RAY_AUTH_TOKEN=CANARY, HF_TOKEN=CANARY
    )
    assert CANARY not in json.dumps(result.json) + result.err
    assert result.finding("token-in-env")["where"] in ("login on five", "container on five")
