"""Doctor finds each planted fault in fixture trees of two hosts, and nothing in the healthy ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fabric_support import codes, spark_pair
from trees import EMPTY_GID, Tree, acs_config, healthy, link, mapped_gid, write

from launcher.fabric.codes import CODES
from launcher.fabric.doctor import Need, diagnose
from launcher.fabric.facts import NodeFacts
from launcher.fabric.finding import Finding
from launcher.fabric.remote import Unreachable, read_tree
from launcher.registry.cluster import Cluster

QUIET = {"tc-decoded"}
"""Said of every cluster with a traffic class: what the number means, no fault."""
IB = "sys/class/infiniband/rocep1s0f0/ports/1"


def plain_pair(**options: Any) -> Cluster:
    return spark_pair(**options)


@pytest.fixture
def pair(tmp_path: Path) -> list[Tree]:
    return [healthy(tmp_path / f"spark-0{number}", number) for number in (1, 2)]


def facts_of(trees: list[Tree]) -> dict[str, NodeFacts | Unreachable]:
    return {f"spark-0{tree.number}": read_tree(tree.root) for tree in trees}


def examine(trees: list[Tree], cluster: Cluster | None = None, need: Need | None = None) -> list[Finding]:
    found = diagnose(cluster or plain_pair(), facts_of(trees), need or Need())
    return [item for item in found if item.code not in QUIET]


def test_nothing_is_found_in_healthy_hosts(pair: list[Tree]) -> None:
    assert [item.headline() for item in examine(pair)] == []
    assert [item.headline() for item in examine(pair, need=Need(0.8, 8000))] == []
    assert [item.headline() for item in examine(pair, plain_pair(fabric={"gid_index": "auto-pin"}))] == []


def test_auto_becomes_names(pair: list[Tree]) -> None:
    """Without `hcas` and `ifname` the facts decide: the ip's interface, the subnet's HCA and its twin."""
    cluster = plain_pair(first={"hcas": (), "ifname": None}, second={"hcas": (), "ifname": None})
    assert [item.headline() for item in examine(pair, cluster)] == []
    from launcher.fabric.environment import as_mapping, node_environment

    facts = facts_of(pair)["spark-01"]
    assert isinstance(facts, NodeFacts)
    values = as_mapping(node_environment(cluster, cluster.head, {}, facts))
    assert values["NCCL_IB_HCA"] == "=roceP2p1s0f0,rocep1s0f0"
    assert values["NCCL_SOCKET_IFNAME"] == "=enP2p1s0f0np0"
    # The twin lives in a subnet of its own, so a range of addresses would leave it without a GID.
    assert "NCCL_IB_ADDR_RANGE" not in values


Fault = tuple[str, Callable[[Tree], None], dict[str, Any], str]


def _same_subnet(tree: Tree) -> None:
    tree.addresses([("enP2p1s0f0np0", "192.168.100.1"), ("enP2p1s0f0np1", "192.168.100.101")])
    for index, kind in ((2, "IB/RoCE v1"), (3, "RoCE v2")):
        tree.gid("roceP2p1s0f0", index, mapped_gid("192.168.100.101"), kind, "enP2p1s0f0np1")


def _no_v2(tree: Tree) -> None:
    tree.gid("rocep1s0f0", 3, EMPTY_GID, "", "")


def _far_numa(tree: Tree) -> None:
    tree.path("sys/devices/system/node/node1").mkdir()
    write(tree.path("sys/bus/pci/devices/000f:01:00.0/numa_node"), "1\n")
    for hca in ("rocep1s0f0", "roceP2p1s0f0"):
        write(tree.path("sys/class/infiniband", hca, "device/numa_node"), "0\n")


def _limit(label: str, value: str) -> Callable[[Tree], None]:
    def change(tree: Tree) -> None:
        lines = tree.path("proc/self/limits").read_text().splitlines()
        kept = [f"{label:<26}{value:<21}{value:<21}" if line.startswith(label) else line for line in lines]
        tree.set("proc/self/limits", "\n".join(kept) + "\n")

    return change


def _locked(tree: Tree) -> None:
    _limit("Max locked memory", "8388608")(tree)
    tree.set(".dockerenv", "")


def _acs(tree: Tree) -> None:
    write(tree.path("sys/bus/pci/devices/0000:00:00.0/config"), acs_config(0x1D))


def _hopper(tree: Tree) -> None:
    """The same host with a discrete GPU, so that GPUDirect is expected."""
    tree.set("proc/driver/nvidia/gpus/000f:01:00.0/information", "Model: NVIDIA H100 80GB HBM3\n")


def _no_gdr(tree: Tree) -> None:
    _hopper(tree)
    tree.set("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Release\n")


def _set(path: str, text: str) -> Callable[[Tree], None]:
    return lambda tree: tree.set(path, text)


def _remove(path: str) -> Callable[[Tree], None]:
    return lambda tree: tree.remove(path)


def _program(name: str, text: str) -> Callable[[Tree], None]:
    return lambda tree: tree.program(name, text)


def _link_down(tree: Tree) -> None:
    tree.set("sys/class/net/enP2p1s0f0np0/operstate", "down\n")
    # The kernel answers EINVAL for the carrier of an interface that nobody switched on.
    tree.remove("sys/class/net/enP2p1s0f0np0/carrier")


def _infiniband(tree: Tree) -> None:
    for hca in ("rocep1s0f0", "roceP2p1s0f0"):
        tree.set(f"sys/class/infiniband/{hca}/ports/1/link_layer", "InfiniBand\n")


def _twin_down(tree: Tree) -> None:
    tree.set("sys/class/infiniband/roceP2p1s0f0/ports/1/state", "1: DOWN\n")


FAULTS: list[Fault] = [
    ("rdma-absent", _remove("sys/class/infiniband"), {}, "spark-01"),
    ("dev-node-missing", _remove("dev/infiniband/uverbs1"), {}, "spark-01"),
    ("verbs-lib-missing", _remove("usr/lib/aarch64-linux-gnu/libibverbs.so.1"), {}, "spark-01"),
    ("port-not-active", _set(f"{IB}/state", "1: DOWN\n"), {}, "spark-01"),
    ("gid-missing", _no_v2, {}, "spark-01"),
    ("gid-linklocal", lambda tree: None, {"first": {"env": {"NCCL_IB_GID_INDEX": "0"}}}, "spark-01"),
    ("gid-index-empty", lambda tree: None, {"first": {"env": {"NCCL_IB_GID_INDEX": "4"}}}, "spark-01"),
    ("twin-port-idle", _twin_down, {}, "spark-01"),
    ("twin-port-idle", lambda tree: None, {"first": {"hcas": ("rocep1s0f0",)}}, "spark-01"),
    ("twin-idle", lambda tree: None, {"first": {"env": {"NCCL_IB_HCA": "=rocep1s0f0"}}}, "node 'spark-01' env"),
    ("hca-absent", lambda tree: None, {"first": {"hcas": ("mlx5_7",)}}, "fabric of 'spark-pair'"),
    ("mtu-small", _set("sys/class/net/enP2p1s0f0np0/mtu", "1500\n"), {}, "spark-01"),
    ("mtu-mismatch", _set("sys/class/net/enP2p1s0f0np0/mtu", "1500\n"), {}, "spark-01, spark-02"),
    ("link-down", _link_down, {}, "spark-01"),
    ("ifname-absent", lambda tree: None, {"first": {"ifname": "eth7"}}, "spark-01"),
    ("node-ip-absent", lambda tree: None, {"first": {"ip": "192.168.100.77"}}, "spark-01"),
    ("same-subnet-rails", _same_subnet, {}, "spark-01"),
    (
        "addr-range-misses-hca",
        lambda tree: None,
        {"env": {"NCCL_IB_ADDR_RANGE": "192.168.100.0/24"}},
        "cluster 'spark-pair' env",
    ),
    ("nccl-conf-file", _set("etc/nccl.conf", "# ours\nNCCL_IB_TC=8\n"), {}, "spark-01"),
    ("image-env", lambda tree: (tree.set(".dockerenv", ""), tree.set("proc/self/environ", "NCCL_ALGO=Ring\0A=1\0")), {},
     "container on spark-01"),
    ("memlock-low", _locked, {}, "spark-01"),
    ("nofile-low", _limit("Max open files", "1024"), {}, "spark-01"),
    ("stack-unlimited", _limit("Max stack size", "unlimited"), {}, "spark-01"),
    ("shm-small", _set("proc/mounts", "shm /dev/shm tmpfs rw,size=65536k 0 0\n"), {}, "spark-01"),
    ("gdr-forbidden", lambda tree: tree.path("sys/module/nvidia_peermem").mkdir(parents=True), {}, "spark-01"),
    ("gdr-on-gb10", lambda tree: None, {"env": {"NCCL_NET_GDR_LEVEL": "SYS"}}, "cluster 'spark-pair' env"),
    ("gdr-none", _no_gdr, {"platform": "hopper"}, "spark-01"),
    ("acs-on", lambda tree: (_hopper(tree), _acs(tree)), {"platform": "hopper"}, "spark-01"),
    ("numa-far", _far_numa, {}, "spark-01"),
    ("pcie-narrow", _set("sys/class/infiniband/rocep1s0f0/device/current_link_width", "1\n"), {}, "spark-01"),
    ("port-busy", lambda tree: tree.listen(6380, 4242, "redis-server *:6380"), {}, "spark-01"),
    ("port-ours", lambda tree: tree.listen(6379, 4243, "/x/ray/core/gcs_server --port=6379"), {}, "spark-01"),
    ("ephemeral-overlap", _set("proc/sys/net/ipv4/ip_local_port_range", "1024\t60999\n"), {}, "spark-01"),
    ("docker-old", _program("docker", "echo 24.0.7"), {}, "spark-01"),
    ("compose-old", _program("docker", 'case "$1" in version) echo 28.1.1;; compose) echo 2.39.4;; esac'), {},
     "spark-01"),
    ("toolkit-old", _program("nvidia-ctk", "echo 'NVIDIA Container Toolkit CLI version 1.17.7'"), {}, "spark-01"),
    ("cdi-stale", _set("etc/cdi/nvidia.yaml", "mounts:\n- hostPath: /usr/lib/libcuda.so.570.1\n"), {}, "spark-01"),
    ("version-skew", lambda tree: (tree.remove("usr/lib/python3/dist-packages/ray-2.60.0.dist-info"),
                                   tree.package("ray", "2.59.1")), {}, "spark-01, spark-02"),
    ("counters", _set(f"{IB}/hw_counters/packet_seq_err", "17\n"), {}, "spark-01"),
    ("rate-differs", _set(f"{IB}/rate", "100 Gb/sec (2X HDR)\n"), {}, "spark-01, spark-02"),
    ("link-layer-differs", _infiniband, {}, "spark-01, spark-02"),
    ("gpu-missing", _remove("proc/driver/nvidia/gpus"), {}, "spark-01"),
    ("oom-kills", _set("sys/fs/cgroup/memory.events", "low 0\noom 1\noom_kill 2\n"), {}, "spark-01"),
    ("c-scope-differs", lambda tree: tree.set("proc/self/environ", "NCCL_BUFFSIZE=8388608\0"), {}, "login on spark-01"),
    ("rank-env-leak", lambda tree: tree.set("proc/self/environ", "RANK=1\0"), {}, "login on spark-01"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "plant", "options", "where"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_planted_fault_is_found(
    pair: list[Tree], code: str, plant: Callable[[Tree], Any], options: dict[str, Any], where: str
) -> None:
    if options.get("platform") == "hopper":
        _hopper(pair[1])
    plant(pair[0])
    found = examine(pair, plain_pair(**options))
    mine = [item for item in found if item.code == code]
    assert mine, [item.headline() for item in found]
    assert {item.where for item in mine} == {where}
    for item in mine:
        assert item.evidence
        assert item.cause == CODES[code].cause or item.cause
        assert item.fix
    # The healthy node stays healthy: nothing is said of it alone.
    assert [item.headline() for item in found if item.where == "spark-02"] == []


def test_at_least_25_different_faults_are_planted() -> None:
    planted = {code for code, *_ in FAULTS}
    assert len(planted) >= 40
    elsewhere = {"clock-skew", "node-unreachable", "hostname-loopback", "uma-memory", "removeipc"}
    needs_two_hosts = {"peer-unreachable", "path-untested"}
    of_hosts = {code for code, row in CODES.items() if row.group in ("host", "cluster")}
    assert of_hosts - planted == elsewhere | needs_two_hosts, "a check without a planted fault"


def test_the_installed_nccl_decides_what_is_too_new(pair: list[Tree]) -> None:
    cluster = plain_pair(env={"NCCL_CHECK_MODE": "DEBUG_LOCAL"})
    assert codes(examine(pair, cluster)) == ["too-new"]
    for tree in pair:
        tree.package("nvidia-nccl-cu13", "2.30.7")
    assert codes(examine(pair, cluster)) == []


def test_hostname_on_loopback_matters_only_without_a_named_interface(pair: list[Tree]) -> None:
    pair[0].set("etc/hosts", "127.0.1.1 spark-01\n")
    assert examine(pair) == []
    pair[0].addresses([])
    nameless = plain_pair(first={"ifname": None})
    assert "hostname-loopback" in codes(examine(pair, nameless))


def test_memory_of_a_unified_host(pair: list[Tree]) -> None:
    pair[0].set("proc/meminfo", "MemTotal: 125500000 kB\nMemAvailable: 40000000 kB\n")
    assert "uma-memory" not in codes(examine(pair))
    found = examine(pair, need=Need(0.5))
    assert [(item.code, item.where) for item in found] == [("uma-memory", "spark-01")]
    assert "38.1 GiB available, 59.8 GiB planned" in found[0].evidence


def test_shared_ipc_and_logind(pair: list[Tree]) -> None:
    for tree in pair:
        tree.set("etc/systemd/logind.conf", "[Login]\n#RemoveIPC=yes\n")
    cluster = plain_pair()
    assert examine(pair, cluster) == []
    shared = replace(cluster, container=replace(cluster.container, ipc="host"))
    assert codes(examine(pair, shared)) == ["removeipc"]
    for tree in pair:
        tree.set("etc/systemd/logind.conf.d/ours.conf", "[Login]\nRemoveIPC=no\n")
    assert examine(pair, shared) == []


def test_memlock_of_a_login_is_a_warning(pair: list[Tree]) -> None:
    _limit("Max locked memory", "8388608")(pair[0])
    found = examine(pair)
    assert [(item.code, item.severity) for item in found] == [("memlock-low", "warning")]


def test_gid_drift_between_nodes_makes_a_shared_index_wrong(pair: list[Tree]) -> None:
    """The same number is RoCE v2 on one node and something else on the other."""
    shared = plain_pair(env={"NCCL_IB_GID_INDEX": "3"})
    assert "gid-on-cluster" not in codes(examine(pair, shared))
    for hca, netdev, subnet in (("rocep1s0f0", "enP2p1s0f0np0", 100), ("roceP2p1s0f0", "enP2p1s0f0np1", 101)):
        pair[1].gid(hca, 3, EMPTY_GID, "", "")
        pair[1].gid(hca, 5, mapped_gid(f"192.168.{subnet}.2"), "RoCE v2", netdev)
    found = examine(pair, shared)
    assert {"gid-on-cluster", "gid-index-empty"} <= set(codes(found))
    empty = next(item for item in found if item.code == "gid-index-empty")
    assert empty.where == "spark-02"
    assert "the right index on this HCA is 5" in empty.fix


def test_clock_and_unreachable_nodes(pair: list[Tree]) -> None:
    read = facts_of(pair)
    first = read["spark-01"]
    assert isinstance(first, NodeFacts)
    read["spark-01"] = replace(first, skew_seconds=-7.5)
    read["spark-02"] = Unreachable("ssh: connect to host spark-02 port 22: Connection refused", "start sshd there")
    found = [item for item in diagnose(plain_pair(), read) if item.code not in QUIET]
    assert codes(found) == ["clock-skew", "node-unreachable"]
    assert "7.5 s behind" in next(item for item in found if item.code == "clock-skew").evidence


def test_a_host_without_rdma_is_right_when_nobody_asks_for_it(pair: list[Tree]) -> None:
    for tree in pair:
        tree.remove("sys/class/infiniband")
        tree.remove("dev/infiniband")
    cluster = plain_pair(fabric={"rdma": "off", "traffic_class": None})
    assert codes(examine(pair, cluster)) == []
    preferred = plain_pair(fabric={"rdma": "preferred", "traffic_class": None}, first={"hcas": ()}, second={"hcas": ()})
    assert [(item.code, item.severity) for item in examine(pair, preferred)] == [("rdma-absent", "warning")] * 2


def test_hostile_facts_raise_nothing(pair: list[Tree]) -> None:
    """Odd texts where numbers belong, links to nowhere, binary files: absent, never a crash."""
    tree = pair[0]
    tree.set(f"{IB}/rate", "fast\n")
    tree.set(f"{IB}/gids/0", b"\xff\xfe\x00")
    tree.set("proc/meminfo", "MemTotal:\n")
    tree.set("proc/self/limits", "Max locked memory\n")
    tree.set("sys/class/net/enP2p1s0f0np0/mtu", "big\n")
    tree.set("proc/net/route", "Iface\nx\ty\n")
    link(tree.path("sys/class/infiniband/ghost"), Path("/nowhere"))
    assert "node-unreachable" not in codes(examine(pair))
