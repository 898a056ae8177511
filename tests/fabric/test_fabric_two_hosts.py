"""Doctor on two hosts that are network namespaces: real sockets, real packets, real faults of the link."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Hosts, Namespaces, ip

REGISTRY = """\
version: 1
clusters:
  pair:
    platform: cpu
    fabric: {{rdma: "off", subnet: 10.77.0.0/24, mtu: 1500}}
    nodes:
      - {{name: node-a, role: head, ip: 10.77.0.1, ssh: {a}, ifname: veth-a}}
      - {{name: node-b, role: worker, ip: 10.77.0.2, ssh: {b}, ifname: veth-b}}
models:
  tiny-oss: {{model: tiny-oss}}
"""


@pytest.fixture(scope="module")
def namespaces() -> Iterator[Namespaces]:
    made = Namespaces()
    try:
        made.make()
    except FileNotFoundError:
        pytest.skip("there is no `ip` program here")
    except subprocess.CalledProcessError as error:
        made.remove()
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    yield made
    made.remove()


@pytest.fixture
def hosts(tmp_path: Path, namespaces: Namespaces) -> Hosts:
    made = Hosts(tmp_path)
    made.registry(REGISTRY.format(a=namespaces["a"], b=namespaces["b"]))
    return made


def test_a_sound_pair_is_read_pinged_and_summed(hosts: Hosts) -> None:
    result = hosts.cli("doctor", "--cluster", "pair", "--active", "--json")
    assert result.code == 0, result.out + result.err
    assert result.codes("error") == set()
    done = result.finding("all-reduce-ok")
    assert done["subject"] == "node-a <-> node-b"
    assert "1,048,576 bytes" in done["evidence"]
    assert {name: node["read"] for name, node in result.json["nodes"].items()} == {"node-a": True, "node-b": True}


def test_a_link_that_drops_full_packets_is_named(hosts: Hosts, namespaces: Namespaces) -> None:
    ip("-n", namespaces["b"], "link", "set", "veth-b", "mtu", "1300")
    try:
        result = hosts.cli("doctor", "--cluster", "pair", "--json")
    finally:
        ip("-n", namespaces["b"], "link", "set", "veth-b", "mtu", "1500")
    assert result.code == 5
    assert {"mtu-small", "mtu-mismatch"} <= result.codes("error")
    assert "peer-unreachable" not in result.codes()
    paths = [item for item in result.json["findings"] if item["code"] == "mtu-mismatch" and "->" in item["subject"]]
    by_subject = {item["subject"]: item for item in paths}
    # One side's packets are dropped on the way, the other side's kernel refuses them.
    assert "ping -M do -s 1472 10.77.0.2: lost" in by_subject["node-a -> node-b"]["evidence"]
    assert "too-long" in by_subject["node-b -> node-a"]["evidence"]
    assert "ip link set veth-b mtu 1500" in result.finding("mtu-small")["fix"]


def test_a_downed_link_is_named_and_the_hang_ends_at_the_deadline(hosts: Hosts, namespaces: Namespaces) -> None:
    ip("-n", namespaces["b"], "link", "set", "veth-b", "down")
    try:
        began = time.monotonic()
        result = hosts.cli("doctor", "--cluster", "pair", "--active", "--deadline", "6", "--json")
        seconds = time.monotonic() - began
    finally:
        ip("-n", namespaces["b"], "link", "set", "veth-b", "up")
    assert result.code == 5
    assert {"link-down", "peer-unreachable", "all-reduce-hang"} <= result.codes("error")
    states = {item["where"]: item["evidence"] for item in result.json["findings"] if item["code"] == "link-down"}
    assert sorted(states) == ["node-a", "node-b"]
    assert states["node-a"].endswith("no carrier, so the cable or the other end is down")
    assert states["node-b"] == "veth-b is down"
    hang = result.finding("all-reduce-hang")["evidence"]
    assert "rank 0 on node-a (10.77.0.1, veth-a)" in hang
    assert "rank 1 on node-b (10.77.0.2, veth-b)" in hang
    assert seconds < 90


def test_what_a_person_reads_is_within_80_columns(hosts: Hosts) -> None:
    result = hosts.cli("doctor", "--cluster", "pair", NO_COLOR="1")
    assert result.code == 0, result.out + result.err
    assert "NODE" in result.out
    assert "veth-a" in result.out
    assert "\x1b" not in result.out + result.err
    for line in result.out.splitlines():
        assert len(line) <= 80 or line.startswith("  fix: ")
