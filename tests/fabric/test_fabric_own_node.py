"""A node's own look before it starts: what `auto` becomes there, faults that make a start pointless, versions."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fabric_support import SPARK_HCAS, SPARK_IFNAME, spark_pair
from test_fabric_transports import StandIns
from trees import healthy

from engine.comm.node_messages import check_facts, own_facts
from engine.comm.secure_link import LinkRefused
from engine.model_digest import digest_of
from launcher.errors import PreflightError
from launcher.registry.cluster import Cluster, Fabric
from launcher.supervise.node_fabric import NodeFabric, look, shown_environment
from launcher.supervise.node_spec import NodeSpec, Peer
from launcher.supervise.node_versions import SHOULD, differences

ROOT_ASSETS = Path(__file__).parents[2] / "engine" / "assets" / "tiny_oss"


def own_cluster(declared: Cluster, number: int = 0) -> Cluster:
    """Send a node's part of a cluster to the node and back, as the node plan does."""
    node = declared.nodes[number]
    sent = json.loads(json.dumps(asdict(NodeFabric.of(declared, node))))
    received = NodeFabric.from_data(sent)
    assert received == NodeFabric.of(declared, node)
    return received.cluster(declared.name, node.name, node.role, node.ip, node.gpus)


def undeclared(**fabric: object) -> Cluster:
    """The pair as somebody writes it who knows addresses only."""
    bare = spark_pair(fabric=fabric, first={"ifname": None, "hcas": ()}, second={"ifname": None, "hcas": ()})
    return replace(bare, platform="auto")


def test_auto_becomes_what_the_host_has(tmp_path: Path) -> None:
    tree = healthy(tmp_path / "host", 1).root
    found = look(own_cluster(undeclared()), {}, root=tree)
    assert found.environment["GLOO_SOCKET_IFNAME"] == SPARK_IFNAME
    assert found.environment["NCCL_SOCKET_IFNAME"] == f"={SPARK_IFNAME}"
    assert found.environment["NCCL_IB_HCA"] == "=" + ",".join(sorted(SPARK_HCAS))
    assert found.environment["NCCL_NET_GDR_LEVEL"] == "LOC", "the platform was auto, and the GPU says GB10"
    assert "HLAUNCH_NODE_IP" not in found.environment, "what is declared is in the plan already"
    assert f"GLOO_SOCKET_IFNAME={SPARK_IFNAME}, as measured here" in found.said
    pinned = look(own_cluster(undeclared(gid_index="auto-pin")), {}, root=tree)
    assert pinned.environment["NCCL_IB_GID_INDEX"] == "3"


def test_what_is_set_is_left_alone(tmp_path: Path) -> None:
    tree = healthy(tmp_path / "host", 1).root
    found = look(own_cluster(undeclared()), {"NCCL_IB_HCA": "=mine", "GLOO_SOCKET_IFNAME": "mine"}, root=tree)
    assert not {"NCCL_IB_HCA", "GLOO_SOCKET_IFNAME"} & set(found.environment)
    declared = look(own_cluster(spark_pair()), {}, root=tree)
    assert not {"NCCL_IB_HCA", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} & set(declared.environment)


def test_a_fabric_that_is_not_here_ends_the_start(tmp_path: Path) -> None:
    tree = healthy(tmp_path / "host", 1).root
    shutil.rmtree(tree / "sys/class/infiniband")
    with pytest.raises(PreflightError, match="sys/class/infiniband is empty") as caught:
        look(own_cluster(spark_pair()), {}, root=tree)
    assert "hlaunch doctor" in caught.value.hint
    # Preferred is no promise.
    look(own_cluster(spark_pair(fabric={"rdma": "preferred"})), {}, root=tree)
    wrong = spark_pair(fabric={"rdma": "off"}, first={"ifname": "eth7"})
    with pytest.raises(PreflightError, match="eth7"):
        look(own_cluster(wrong), {}, root=tree)
    with pytest.raises(PreflightError, match=r"192\.168\.100\.2"):
        look(own_cluster(spark_pair(fabric={"rdma": "off"}), 1), {}, root=tree)


def test_addresses_of_both_families_and_every_spelling(tmp_path: Path) -> None:
    tree = healthy(tmp_path / "host", 1)
    rows = (
        ("fd00" + "0" * 27 + "7", "40", "00", SPARK_IFNAME),
        ("fe80" + "0" * 27 + "1", "40", "20", SPARK_IFNAME),
        ("spoilt", "xx", "00", "lo"),
    )
    tree.set("proc/net/if_inet6", "".join(f"{ip} 02 {prefix} {scope} 80 {name}\n" for ip, prefix, scope, name in rows))
    for ip in ("fd00::7", "fd00:0:0:0::0007", "192.168.100.1"):
        one = NodeFabric("cpu").cluster("c", "n", "head", ip, 0)
        assert look(one, {}, root=tree.root).environment == {"GLOO_SOCKET_IFNAME": SPARK_IFNAME}
    for ip in ("fd00::8", "fe80::1"):
        with pytest.raises(PreflightError, match="no interface of this host carries"):
            look(NodeFabric("cpu").cluster("c", "n", "head", ip, 0), {}, root=tree.root)


def test_this_host_without_a_fabric() -> None:
    loopback = NodeFabric("cpu", Fabric()).cluster("one", "here", "head", "127.0.0.1", 0)
    found = look(loopback, {})
    assert found.environment == {"GLOO_SOCKET_IFNAME": "lo"}
    second = NodeFabric("cpu", Fabric()).cluster("one", "here", "head", "127.0.0.2", 0)
    assert look(second, {}).environment == found.environment
    assert {"hlaunch", "torch", "python"} <= set(found.versions)


def test_versions_that_differ_are_named() -> None:
    head = {"hlaunch": "0.1.0", "python": "3.11.7", "torch": "2.11.0", "nvidia-nccl-cu12": "2.28.9", "model": "a" * 64}
    assert differences({"one": head, "two": head}) == []
    assert differences({"one": head, "two": {}}) == [], "who does not say is not compared"
    assert differences({"one": head, "two": {**head, "torch": "2.10.1"}}) == ["torch differs: one 2.11.0, two 2.10.1"]
    assert differences({"one": head, "two": {**head, "nvidia-nccl-cu12": "2.30.7"}}) == [
        "NCCL differs: one 2.28.9, two 2.30.7"
    ]
    assert differences({"one": head, "two": {**head, "model": "b" * 64}}) == [
        "the model's files differ: one aaaaaaaaaaaa, two bbbbbbbbbbbb"
    ]
    assert differences({"one": {"driver": "580"}, "two": {"driver": "570"}}) == []
    assert differences({"one": {"driver": "580"}, "two": {"driver": "570"}}, SHOULD) == [
        "driver differs: one 580, two 570"
    ]


def test_a_joining_node_with_another_nccl_is_refused() -> None:
    head = own_facts()
    check_facts(head, "two", head)
    check_facts(head, "two", msgspec.structs.replace(head, nccl="2.28.9"))
    with pytest.raises(LinkRefused, match=r"two \(.*\) has NCCL 2\.30\.7, the head 2\.28\.9"):
        check_facts(msgspec.structs.replace(head, nccl="2.28.9"), "two", msgspec.structs.replace(head, nccl="2.30.7"))


def test_the_environment_that_nodes_really_have(tmp_path: Path) -> None:
    stand_ins = StandIns(tmp_path)
    common = {"NCCL_NET": "IB", "HF_TOKEN": "canary-token", "EDITOR": "vi"}
    own = {"one": {"NCCL_IB_HCA": "=mlx5_0", "NCCL_IB_TC": "106"}, "two": {"NCCL_IB_HCA": "=mlx5_1"}}
    for name, values in own.items():
        (tmp_path / f"{name}.log").write_text("")
        shown = shown_environment({**common, **values})
        (tmp_path / f"{name}.json").write_text(json.dumps({"environment": shown}))
    stand_ins.start()
    lines = stand_ins.cli("status", "tiny-oss", "--env").out.splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["HF_TOKEN", "all", "<hidden>"],
        ["NCCL_IB_HCA", "one", "=mlx5_0", "by", "node"],
        ["NCCL_IB_HCA", "two", "=mlx5_1", "by", "node"],
        ["NCCL_IB_TC", "one", "106", "DIFFERS"],
        ["NCCL_IB_TC", "two", "-", "DIFFERS"],
        ["NCCL_NET", "all", "IB"],
    ]
    assert stand_ins.cli("down", "tiny-oss").code == 0


def spec_of(model: str, **values: Any) -> NodeSpec:
    peers = (Peer("one", "10.0.0.1", "head"),)
    return NodeSpec("m", "c", "one", "head", "10.0.0.1", "p", peers, model, None, "/tmp/x", "", **values)


def test_a_node_names_its_model_as_its_ranks_do(tmp_path: Path) -> None:
    bundled = spec_of("tiny-oss").model_digest({})
    assert (len(bundled), bundled) == (64, digest_of("tiny-oss"))
    copied = tmp_path / "cache" / "org" / "tiny"
    shutil.copytree(ROOT_ASSETS, copied)
    assert spec_of(str(copied)).model_digest({}) == bundled
    # Where the launch names no folder of models, the node's own counts.
    cache = {"HLAUNCH_MODEL_DIR": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    assert spec_of("org/tiny").model_digest(cache) == bundled
    assert spec_of("org/tiny", model_root=cache["HLAUNCH_MODEL_DIR"]).model_digest({"HOME": "/"}) == bundled
    assert spec_of("org/tiny", model_root=str(tmp_path)).model_digest(cache) == "", "the launch's folder goes before"
    weights = next(iter(copied.glob("*.safetensors")))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert spec_of(str(copied)).model_digest({}) not in ("", bundled)
    # Made-up weights come from no file.
    assert spec_of(str(copied), load_format="dummy").model_digest({}) == digest_of("tiny-oss", "dummy") != bundled


def test_a_launch_names_the_versions_of_its_nodes(tmp_path: Path) -> None:
    stand_ins = StandIns(tmp_path)
    for name, torch in (("one", "2.11.0"), ("two", "2.10.1")):
        (tmp_path / f"{name}.log").write_text("")
        (tmp_path / f"{name}.json").write_text(json.dumps({"versions": {"torch": torch, "hlaunch": "0.1.0"}}))
    with pytest.raises(PreflightError, match=r"torch differs: one 2\.11\.0, two 2\.10\.1"):
        stand_ins.start()
    assert (tmp_path / "stopped").read_text().split() == ["one", "two"]
