"""The transport in use per pair of ranks: from the logs of nodes to the exit code of `up` and the table of `status`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fabric_support import spark_pair
from hosts import ROOT, Result
from trees import healthy

from engine.config import load_model_config, resolve_model_folder
from engine.placement import Device, HostSpec, ParallelSizes, Placement, place
from launcher.fabric.collector.main import collect
from launcher.fabric.transports import (
    NOT_TOLD,
    PairTransport,
    TransportWrong,
    check,
    connected_pairs,
    read_pairs,
    silence,
    summary,
    transports_of,
)
from launcher.plan.cluster_plan import make_cluster_plan
from launcher.registry import load_registry, resolve, resolve_cluster
from launcher.supervise.cluster_logs import last_run
from launcher.supervise.cluster_run import ClusterRun, start
from launcher.supervise.instance import InstanceFolder, state_root
from launcher.supervise.runtimes import RUNTIMES

N = "host:{pid}:7 [0] NCCL INFO Channel 00/0 : "
NAMES = ("spark-01", "spark-02")


def placement(tensor: int = 1, pipeline: int = 2, gpus: int = 1, device: str = "cuda") -> Placement:
    folder = resolve_model_folder("tiny-oss")
    assert folder is not None
    hosts = [HostSpec(name, tuple(Device(f"{device}:{index}") for index in range(gpus))) for name in NAMES]
    return place(load_model_config(folder), ParallelSizes(pipeline=pipeline, tensor=tensor), hosts)


def nccl(text: str, pid: int = 4) -> str:
    return N.format(pid=pid) + text


def pair(transport: str, *ways: str, addresses: tuple[str, ...] = (), nodes: tuple[str, str] = NAMES) -> PairTransport:
    return PairTransport((0, 1), nodes, transport, ways, addresses)


def test_pairs_of_a_placement() -> None:
    assert connected_pairs(placement(tensor=2, pipeline=2, gpus=2)) == [(0, 1), (0, 2), (1, 3), (2, 3)]
    assert connected_pairs(placement(1, 1)) == []


def test_each_pair_gets_its_nodes_and_the_slowest_of_its_ways() -> None:
    plan = placement(tensor=2, pipeline=2, gpus=2)
    head = [
        "host:4: NCCL's ranks are 0 1",
        nccl("0[0] -> 1[1] via P2P/CUMEM"),
        nccl("2[0] -> 0[0] [receive] via NET/Socket/0", 5),
        "2[0] -> 0[0] via NET/Gloo/10.0.0.1",
        nccl("0[0] -> 1[1] via SHM/direct/direct"),
    ]
    worker = ["host:4: NCCL's ranks are 2 3", nccl("0[0] -> 1[1] [send] via NET/IB/0/GDRDMA")]
    found = transports_of(plan, [head, worker])
    assert [(item.ranks, item.transport) for item in found] == [
        ((0, 1), "shared memory"),
        ((0, 2), "TCP"),
        ((1, 3), NOT_TOLD),
        ((2, 3), "RDMA with GPUDirect"),
    ]
    assert found[1].addresses == (), "by Gloo GPU ranks find each other, no more"
    assert [item.crosses_nodes for item in found] == [False, True, True, False]
    assert read_pairs(json.loads(json.dumps([item.to_data() for item in found]))) == found
    assert summary(found) == [
        "spark-01: shared memory (P2P/CUMEM, SHM/direct), ranks 0-1",
        "spark-01 - spark-02: TCP (Socket), ranks 0-2",
        "spark-01 - spark-02: not told, ranks 1-3",
        "spark-02: RDMA with GPUDirect (IB), ranks 2-3",
    ]


def test_cpu_ranks_talk_by_gloo_and_shared_memory() -> None:
    plan = placement(tensor=2, pipeline=2, gpus=2, device="cpu")
    logs = [
        ["0[0] -> 1[1] via SHM/group", "0[0] -> 2[0] via NET/Gloo/10.0.0.1"],
        ["2[0] -> 0[0] via NET/Gloo/10.0.0.2"],
    ]
    assert summary(transports_of(plan, logs))[:2] == [
        "spark-01: shared memory (SHM/group), ranks 0-1",
        "spark-01 - spark-02: TCP (Gloo, 10.0.0.1, 10.0.0.2), ranks 0-2",
    ]


def test_a_ring_has_lines_for_neighbours_only() -> None:
    plan = placement(tensor=4, pipeline=1, gpus=4)
    ring = [nccl(f"{rank}[{rank}] -> {(rank + 1) % 4}[{(rank + 1) % 4}] via P2P/CUMEM") for rank in range(4)]
    assert [item.ranks for item in transports_of(plan, [ring])] == [(0, 1), (0, 3), (1, 2), (2, 3)]
    # A rank that says nothing at all is missed.
    missed = {item.ranks for item in transports_of(plan, [ring[:1]]) if item.transport == NOT_TOLD}
    assert missed == {(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}


@pytest.mark.parametrize(
    ("rdma", "used", "problem"),
    [
        ("required", pair("TCP", "NET/Socket/0"), "use TCP (NET/Socket/0), and the fabric says rdma: required"),
        ("required", pair("unknown", "NET/AWS Libfabric/0"), "the fabric says rdma: required"),
        ("required", pair("RDMA", "NET/IB/0"), ""),
        ("required", pair("TCP", "NET/Socket/0", nodes=("a", "a")), ""),
        ("required", pair(NOT_TOLD), ""),
        ("preferred", pair("TCP", "NET/Socket/0"), ""),
        ("off", pair("RDMA", "NET/IB/0"), "the fabric says rdma: off"),
        ("off", pair("TCP", "NET/Socket/0"), ""),
        ("required", pair("RDMA with GPUDirect", "NET/IB/0/GDRDMA"), "which does not work on GB10"),
        # What CPU ranks exchange is TCP by nature; it must keep to the fabric all the same.
        ("required", pair("TCP", "NET/Gloo/x", addresses=("192.168.100.1",)), ""),
        ("required", pair("TCP", "NET/Gloo/x", addresses=("127.0.0.1",)), "talk over 127.0.0.1, and the fabric is"),
        ("required", pair("TCP", "NET/Gloo/x", addresses=("127.0.0.1",), nodes=("a", "a")), ""),
    ],
)  # fmt: skip
def test_what_is_in_use_against_what_is_declared(rdma: str, used: PairTransport, problem: str) -> None:
    cluster = spark_pair(fabric={"rdma": rdma})
    if not problem:
        check([used], cluster)
        return
    with pytest.raises(TransportWrong) as caught:
        check([used], cluster)
    assert caught.value.exit_code == 9
    assert problem in caught.value.message
    assert "ranks 0 (" in caught.value.message
    assert caught.value.hint


def test_silence_is_said_where_rdma_is_required() -> None:
    assert "NCCL_DEBUG=INFO" in silence([pair(NOT_TOLD)], spark_pair())
    assert silence([pair(NOT_TOLD)], spark_pair(fabric={"rdma": "preferred"})) == ""
    assert silence([pair("RDMA", "NET/IB/0")], spark_pair()) == ""


def test_a_restarted_node_is_read_from_its_restart_on() -> None:
    lines = [
        "a",
        "keeper: ended with 1; restart 1 of 3",
        "b",
        "node: /usr/bin/python -m ray.scripts.scripts start",
        "c",
    ]
    assert last_run(lines)[-1] == "c"
    assert last_run(lines)[0].startswith("node: ")
    assert last_run(["a"]) == ["a"]


REGISTRY = """\
version: 1
clusters:
  pair:
    platform: hopper
    fabric: {rdma: required, subnet: 10.9.0.0/24}
    nodes:
      - {name: one, role: head, ip: 10.9.0.1, ssh: one, gpus: 1, gpu-memory: 80GiB, ifname: eth0, hcas: [mlx5_0]}
      - {name: two, role: worker, ip: 10.9.0.2, ssh: two, gpus: 1, gpu-memory: 80GiB, ifname: eth0, hcas: [mlx5_0]}
models:
  tiny-oss: {model: tiny-oss, cluster: pair, pipeline-parallel-size: 2, host: 10.9.0.1, insecure-no-auth: true,
    ready: {timeout: 30s}}
"""


class StandIns:
    """A launch of which everything is real but what is behind ssh."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []
        (folder / "model_registry.yml").write_text(REGISTRY)
        ssh = folder / "ssh"
        program = Path(__file__).with_name("stand_in_node.py")
        ssh.write_text(f'#!/bin/sh\nexec {sys.executable} {program} {folder} "$@"\n')
        ssh.chmod(0o755)
        self.environ = {
            "PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT), "HLAUNCH_SSH": str(ssh),
        }  # fmt: skip

    def start(self) -> ClusterRun:
        """Do what `up` does once it has a plan."""
        registry = load_registry(self.folder / "model_registry.yml")
        entry = resolve(registry, "tiny-oss", {}, [])
        plan = make_cluster_plan(entry, resolve_cluster(registry, "pair", {}, entry), {})
        assert plan.placement is not None
        folder = InstanceFolder(state_root(self.environ), "tiny-oss")
        folder.create()
        return start(plan, RUNTIMES["process"], folder, self.environ, lambda _: None, self.notes.append)

    def cli(self, *args: str) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", "launcher.cli", *args],
            cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr)


def test_a_launch_ends_with_nine_where_tcp_took_the_place_of_rdma(tmp_path: Path) -> None:
    stand_ins = StandIns(tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.log").write_text(f"engine: {nccl('0[0] -> 1[0] [send] via NET/Socket/0')}\n")
    with pytest.raises(TransportWrong) as caught:
        stand_ins.start()
    words = "ranks 0 (one) and 1 (two) use TCP (NET/Socket/0), and the fabric says rdma: required"
    assert (caught.value.exit_code, caught.value.message) == (9, words)
    assert caught.value.hint.startswith("hlaunch doctor --cluster pair")
    assert (tmp_path / "stopped").read_text().split() == ["one", "two"], "what was started is ended again"
    assert stand_ins.cli("ps", "--json").json == []


def test_a_launch_and_its_status_show_what_is_in_use(tmp_path: Path) -> None:
    stand_ins = StandIns(tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.log").write_text(f"engine: {nccl('0[0] -> 1[0] [send] via NET/IB/0')}\n")
    assert summary(stand_ins.start().transports) == ["one - two: RDMA (IB), ranks 0-1"]
    pairs = stand_ins.cli("status", "tiny-oss", "--json").json["transports"]
    assert pairs == [
        {"ranks": [0, 1], "nodes": ["one", "two"], "transport": "RDMA", "ways": ["NET/IB/0"], "addresses": []}
    ]
    table = stand_ins.cli("status", "tiny-oss").out.splitlines()
    assert [line.split() for line in table[-2:]] == [
        ["RANKS", "NODES", "TRANSPORT", "EVIDENCE"], ["0-1", "one", "-", "two", "RDMA", "NET/IB/0"],
    ]  # fmt: skip
    # The lines have left the log: the record still knows them.
    for log in (tmp_path / ".local/state/hlaunch/nodes").glob("*/node.log"):
        log.write_text("later\n")
    assert stand_ins.cli("status", "tiny-oss", "--json").json["transports"] == pairs
    assert stand_ins.cli("down", "tiny-oss").code == 0


def with_counters(folder: Path, name: str, *moved: int) -> None:
    """Let a node's HCAs have sent so many bytes more at each look."""
    raw = collect(healthy(folder / f"tree-{name}", 1).root)
    lines = []
    for num_bytes in moved:
        for hca in raw["hcas"]:
            hca["ports"][0]["counters"]["port_xmit_data"] = 1000 + num_bytes // 4
        lines.append(json.dumps(raw))
    (folder / f"{name}.facts").write_text("\n".join(lines) + "\n")


def test_counters_speak_where_the_logs_are_silent(tmp_path: Path) -> None:
    stand_ins = StandIns(tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.log").write_text("nothing of NCCL\n")
        with_counters(tmp_path, name, 0, 8 << 20)
    run = stand_ins.start()
    assert summary(run.transports) == ["one - two: RDMA (by its counters), ranks 0-1"]
    assert stand_ins.notes == [
        f"RDMA {name} {hca}: sent 8.0 MiB, received 0 bytes"
        for name in ("one", "two")
        for hca in ("roceP2p1s0f0", "rocep1s0f0")
    ]
    assert stand_ins.cli("down", "tiny-oss").code == 0


def test_counters_that_stand_still_end_the_launch(tmp_path: Path) -> None:
    stand_ins = StandIns(tmp_path)
    for name, moved in (("one", 8 << 20), ("two", 512)):
        (tmp_path / f"{name}.log").write_text("nothing of NCCL\n")
        with_counters(tmp_path, name, 0, moved)
    with pytest.raises(TransportWrong) as caught:
        stand_ins.start()
    assert "the counters of two did not move (" in caught.value.message
    assert "rocep1s0f0 sent 512 B" in caught.value.message
    assert (tmp_path / "stopped").read_text().split() == ["one", "two"]


def test_without_counters_and_lines_it_is_said(tmp_path: Path) -> None:
    stand_ins = StandIns(tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.log").write_text("nothing of NCCL\n")
    assert summary(stand_ins.start().transports) == ["one - two: not told, ranks 0-1"]
    assert stand_ins.notes == [
        "warning: 1 pair of ranks says nothing of its transport: "
        "NCCL_DEBUG=INFO and NCCL_DEBUG_SUBSYS=INIT let NCCL say it"
    ]
    assert stand_ins.cli("down", "tiny-oss").code == 0
