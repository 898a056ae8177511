"""The two-rank check: real ranks over real sockets, ranks that fail, ranks that lie, ranks that never end."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from fabric_support import codes, only, spark_pair
from trees import healthy

from launcher.fabric import active
from launcher.fabric.active import all_reduce_check
from launcher.fabric.doctor import diagnose
from launcher.fabric.facts import NodeFacts, PathProbe
from launcher.fabric.remote import Reach, read_tree
from launcher.registry.cluster import Cluster, Node


def lonely(ifname: str = "lo") -> Cluster:
    return Cluster("alone", (Node("alone", "head", "127.0.0.1", ifname=ifname),), platform="cpu")


def stand_in(folder: Path, text: str) -> Reach:
    """A program in the place of Python: it may say what it likes."""
    path = folder / "rank"
    path.write_text(f"#!{sys.executable}\nimport json, sys, time\nprogram = sys.stdin.read()\n{text}\n")
    path.chmod(0o755)
    return Reach(local_python=str(path))


SAY = "say = lambda **facts: print(json.dumps(facts), flush=True)\n"


def test_the_sum_is_right_and_timed() -> None:
    found = all_reduce_check(lonely(), {}, Reach(local_python=sys.executable), seconds=20, size_bytes=4096)
    assert codes(found) == ["all-reduce-ok"]
    assert "4,096 bytes" in found[0].evidence
    assert "over gloo" in found[0].evidence


def test_an_interface_that_is_not_there_ends_with_its_name() -> None:
    found = all_reduce_check(lonely("nosuch0"), {}, Reach(local_python=sys.executable), seconds=20)
    failed = only(found, "all-reduce-failed")
    assert "nosuch0" in failed.evidence


def test_a_python_without_torch_says_so(tmp_path: Path) -> None:
    path = tmp_path / "bare"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -I "$@"\n')
    path.chmod(0o755)
    found = all_reduce_check(lonely(), {}, Reach(local_python=str(path)), seconds=5)
    assert only(found, "probe-missing").evidence == "No module named 'torch'"


def test_a_wrong_sum_is_an_error(tmp_path: Path) -> None:
    reach = stand_in(
        tmp_path, SAY + "say(event='listening', port=9)\nsay(event='done', is_right=False, seconds=1, bytes=4)"
    )
    assert codes(all_reduce_check(lonely(), {}, reach, seconds=5)) == ["all-reduce-wrong"]


@pytest.mark.parametrize(
    ("way", "rdma", "code"),
    [
        ("NET/Socket/0", "required", "transport-fallback"),
        ("NET/IB/0", "required", "all-reduce-ok"),
        ("NET/Socket/0", "preferred", "all-reduce-ok"),
    ],
)
def test_the_log_of_nccl_decides_what_was_used(tmp_path: Path, way: str, rdma: str, code: str) -> None:
    line = f"host:1:2 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via {way}"
    body = (
        f"say(event='listening', port=9)\nsay(event='done', is_right=True, seconds=0.5, bytes=1048576, nccl=[{line!r}])"
    )
    cluster = spark_pair(fabric={"rdma": rdma}, first={"ssh": None}, second={"ssh": None})
    found = all_reduce_check(cluster, {}, stand_in(tmp_path, SAY + body), seconds=5)
    assert codes(found) == [code]
    assert ("TCP" if "Socket" in way else "RDMA") in found[0].evidence


def test_ranks_that_never_end_are_ended_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active, "IMPORT_SECONDS", 3.0)
    monkeypatch.setattr(active, "GRACE_SECONDS", 0.2)
    marker = f"hang-{time.time_ns()}"
    body = f"say(event='listening', port=9)\nsay(event='all-reduce')\nmarker = {marker!r}\ntime.sleep(600)"
    began = time.monotonic()
    found = all_reduce_check(lonely(), {}, stand_in(tmp_path, SAY + body), seconds=1)
    assert time.monotonic() - began < 30
    hang = only(found, "all-reduce-hang")
    assert (
        "rank 0 on alone (127.0.0.1, lo) in 'all-reduce'; rank 1 on alone (127.0.0.1, lo) in 'all-reduce'"
        in hang.evidence
    )
    assert [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(tmp_path) in " ".join(process.info["cmdline"] or [])
    ] == []


def test_the_reason_in_the_log_of_nccl_is_told(tmp_path: Path) -> None:
    """PyTorch's own message is only "invalid usage"."""
    line = "host:1:2 [0] bootstrap.cc:45 NCCL WARN Bootstrap : no socket interface found"
    body = (
        "say(event='listening', port=9)\nsay(event='all-reduce')\n"
        f"say(event='failed', message='NCCL error: invalid usage', nccl=[{line!r}])"
    )
    failed = only(all_reduce_check(lonely(), {}, stand_in(tmp_path, SAY + body), seconds=5), "all-reduce-failed")
    assert "NCCL_SOCKET_IFNAME matches no running interface" in failed.evidence
    assert failed.fix == "hlaunch env --explain NCCL_SOCKET_IFNAME"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "print('no json')",
        "print('[1, 2]')",
        "print(json.dumps({'event': 'listening', 'port': 'x'}))",
        "sys.exit('boom')",
        '[print(\'{"event": "import"}\') for _ in range(5000)]',
    ],
)
def test_odd_ranks_are_a_finding_never_an_exception(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active, "IMPORT_SECONDS", 10.0)
    found = all_reduce_check(lonely(), {}, stand_in(tmp_path, text), seconds=1)
    assert codes(found) in (["all-reduce-failed"], ["all-reduce-hang"])
    if "boom" in text:
        assert found[0].evidence.endswith("boom")


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    found = all_reduce_check(lonely(), {}, Reach(local_python=str(tmp_path / "nothing")), seconds=1)
    assert codes(found) == ["all-reduce-failed"]


def test_a_process_that_may_not_ping_says_so(tmp_path: Path) -> None:
    read: dict[str, Any] = {}
    for number in (1, 2):
        facts = read_tree(healthy(tmp_path / f"spark-0{number}", number).root)
        assert isinstance(facts, NodeFacts)
        read[f"spark-0{number}"] = replace(facts, paths=(PathProbe("192.168.100.9", 56, "unknown", "not permitted"),))
    found = diagnose(spark_pair(), read)
    assert {item.where for item in found if item.code == "path-untested"} == {"spark-01", "spark-02"}
    assert json.dumps([item.as_dict() for item in found])
