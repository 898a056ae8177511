"""Plans of clusters: ranks, memory, ports, variables of every node; the same entry gives the same digest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.compose.render import render
from launcher.compose.specs import CONTAINER, node_spec
from launcher.plan.cluster_plan import ClusterPlan, make_cluster_plan
from launcher.plan.diff import diff_files
from launcher.plan.inventory import declared_inventories
from launcher.registry import load_registry, resolve
from launcher.registry.cluster import Cluster, Fabric, Node, RaySettings

GIB = 1 << 30
REGISTRY = """\
models:
  tiny: {model: tiny-oss}
  oss20: {model: openai/gpt-oss-20b, max-num-seqs: 8, env: {NCCL_DEBUG: INFO, OF_ENTRY: "1"}}
  oss120: {model: openai/gpt-oss-120b, max-num-seqs: 8}
  keyed: {model: tiny-oss, host: 0.0.0.0, api-key: "${KEY}", env: {MY_TOKEN: canary-1}}
  unknown: {model: org/never-heard-of}
"""
PAIR = Cluster(
    "pair",
    (
        Node("a", "head", "10.0.0.1", gpus=8, gpu_memory_bytes=80 * GIB, ifname="eth1"),
        Node("b", "worker", "10.0.0.2", gpus=8, gpu_memory_bytes=80 * GIB, ifname="eth2"),
    ),
    platform="hopper",
    fabric=Fabric(rdma="required", hcas=("mlx5_0",)),
    ray=RaySettings(),
    env={"NCCL_DEBUG": "WARN"},
)
SPARKS = replace(PAIR, platform="gb10", nodes=tuple(replace(n, gpus=1, gpu_memory_bytes=0) for n in PAIR.nodes))
CPUS = Cluster("cpus", (Node("a", "head", "10.0.0.1"), Node("b", "worker", "10.0.0.2")), platform="cpu")


def plan_of(folder: Path, name: str, *overrides: str, cluster: Cluster = PAIR, **environ: str) -> ClusterPlan:
    path = folder / "model_registry.yml"
    path.write_text(REGISTRY)
    return make_cluster_plan(resolve(load_registry(path), name, environ, overrides), cluster, environ)


def test_sixteen_ranks_on_two_nodes(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "oss120", "tp=8", "dp=2")
    assert plan.problems == ()
    assert [(node.name, node.node_rank, node.is_head, node.gpus) for node in plan.nodes] == [
        ("a", 0, True, tuple(range(8))),
        ("b", 1, False, tuple(range(8))),
    ]
    assert plan.head.name == "a"
    assert [node.name for node in plan.workers] == ["b"]
    assert plan.executor == "ray"
    assert len(plan.nodes[1].memory) == 8
    assert [memory.rank for memory in plan.nodes[1].memory] == list(range(8, 16))
    largest = max(memory.weight_bytes for node in plan.nodes for memory in node.memory)
    # The handbook's 9.72 GB at TP8, plus the second copy of the scales and the rotary table.
    assert 9.6e9 < largest < 10.6e9
    plan.check()
    assert plan.head.config.executor == "ray"
    mixed = plan_of(tmp_path, "oss120", "tp=8", "placement.cpu-ranks=1")
    assert "CPU and GPU ranks of one engine" in mixed.blockers[0].message
    with pytest.raises(type(mixed.blockers[0])):
        mixed.check()


def test_a_backend_that_starts_no_ranks_here_is_named_with_the_reason(tmp_path: Path) -> None:
    asked = ("tp=8", "pp=2", "distributed-executor-backend=mp")
    declared = plan_of(tmp_path, "oss120", *asked)
    assert PAIR.ray is not None
    assert declared.executor == "multinode"
    (blocker,) = declared.blockers
    assert "distributed-executor-backend mp starts no ranks on other nodes" in blocker.message
    assert "does not declare" not in blocker.message
    assert "use ray or auto" in blocker.hint
    (blocker,) = plan_of(tmp_path, "oss120", *asked, cluster=replace(PAIR, ray=None)).blockers
    assert "started by Ray, which it does not declare" in blocker.message
    assert "ray: {}" in blocker.hint


def test_a_compiled_graph_of_gpu_ranks_is_a_problem_of_the_plan(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "oss120", "tp=8", "pp=2", "distributed-executor-backend=ray-cgraph")
    (problem,) = plan.problems
    assert "ray-cgraph runs CPU ranks, and these are on GPUs" in problem.message
    assert problem.hint == "use distributed-executor-backend ray or auto"
    with pytest.raises(type(problem)):
        plan.check_problems()
    assert plan_of(tmp_path, "tiny", "tp=2", "distributed-executor-backend=ray-cgraph", cluster=CPUS).problems == ()


def test_one_rank_leaves_the_worker_out(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "tiny", cluster=CPUS)
    plan.check()
    assert plan.executor == "inline"
    assert plan.head.config.device == "cpu"
    assert plan.head.ranks[0].device == "cpu:0"
    assert [node.name for node in plan.nodes] == ["a"]
    assert plan.unused == ("b",)
    assert plan.ready_timeout_seconds > 0


def test_a_node_without_ranks_is_neither_rendered_nor_started(tmp_path: Path) -> None:
    third = Node("c", "worker", "10.0.0.3", gpus=8, gpu_memory_bytes=80 * GIB, ifname="eth3")
    three = replace(PAIR, nodes=(*PAIR.nodes, third))
    both = plan_of(tmp_path, "oss120", "tp=8", "pp=2", "placement.nodes=[b, c]", cluster=three)
    assert both.problems == ()
    assert [(node.name, len(node.ranks), node.node.gpus) for node in both.nodes] == [
        ("a", 0, 0),
        ("b", 8, 8),
        ("c", 8, 8),
    ]
    head = render(both)["head/docker-compose.yml"].decode()
    assert "nvidia" not in head, "a head that only serves takes no GPU"
    assert "/dev/infiniband" not in head
    first = plan_of(tmp_path, "oss120", "tp=8", "pp=2", "placement.nodes=[a, b]", cluster=three)
    assert first.unused == ("c",)
    files = render(first)
    assert {path.partition("/")[0] for path in files} == {"head", "worker"}
    assert files["worker/docker-compose.yml"].decode().count("nvidia") == 1
    peers = json.loads(node_spec(first, first.head, CONTAINER).to_json())["peers"]
    assert [peer["name"] for peer in peers] == ["a", "b"], "the head waits for nobody else"
    assert first.digest == plan_of(tmp_path, "oss120", "tp=8", "pp=2").digest, "as if it were not declared"
    # What an earlier plan rendered for it is told.
    for path, content in render(plan_of(tmp_path, "oss120", "tp=8", "pp=3", cluster=three)).items():
        (tmp_path / "out" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / path).write_bytes(content)
    gone = [item.path for item in diff_files(files, tmp_path / "out") if item.action == "remove"]
    assert "worker-c/docker-compose.yml" in gone
    alone = render(plan_of(tmp_path, "oss120", "tp=8", cluster=three))
    assert {path.partition("/")[0] for path in alone} == {"head"}
    gone = [item.path for item in diff_files(alone, tmp_path / "out") if item.action == "remove"]
    assert "worker-b/docker-compose.yml" in gone


def test_cpu_ranks_on_a_cluster_of_gpus_get_nothing_of_a_gpu(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "tiny", "device=cpu", "tp=2", "placement.strategy=spread")
    plan.check_problems()
    assert len(plan.nodes) == 2
    text = b"".join(content for path, content in render(plan).items() if path.endswith(".yml")).decode()
    for word in ("nvidia", "NVIDIA", "/dev/infiniband", "NCCL_", "CUDA_"):
        assert word not in text
    assert "GLOO_SOCKET_IFNAME" in text
    own = plan_of(tmp_path, "oss20", "device=cpu", "tp=2")
    assert {item.name for item in own.head.environment if item.name.startswith("NCCL_")} == {"NCCL_DEBUG"}, (
        "the model's"
    )


def test_cpu_ranks_share_numa_nodes_when_there_are_more(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "tiny", "tp=2", "dp=4", cluster=CPUS)
    assert plan.placement is not None
    assert [rank.node for rank in plan.placement.ranks] == ["a"] * 4 + ["b"] * 4
    assert plan.placement.ranks[3].device == "cpu:3"
    assert plan.executor == "multinode", "no ray block"
    assert plan.nodes[0].memory[0].budget_bytes == 128 * GIB // 4


def test_a_pair_of_single_gpu_nodes_serves_in_two_stages(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "oss20", "pp=2", "gpu-memory-utilization=0.35", cluster=SPARKS)
    assert plan.placement is not None
    assert [rank.layers for rank in plan.placement.ranks] == [(0, 12), (12, 24)]
    assert [remark.code for remark in plan.remarks] == ["pp-crosses-nodes"]
    across = plan_of(tmp_path, "oss20", "tp=2", cluster=SPARKS)
    assert across.remarks[0].code == "tp-over-slow-link"


def test_no_placement_offers_sizes_to_paste(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "oss20", "tp=4", cluster=SPARKS)
    (problem,) = plan.problems
    assert problem.message == "no placement: tp 4 pp 1 dp 1 needs 4 GPUs, 2 nodes have 1 each"
    assert "--set tp=2" in problem.hint
    assert problem.exit_code == 6
    assert plan.placement is None
    for way in problem.hint.removeprefix("possible: ").split("  or  "):
        overrides = [word for word in way.split() if word != "--set"]
        assert plan_of(tmp_path, "oss20", "tp=4", *overrides, cluster=SPARKS).problems == ()


def test_a_model_that_is_too_large_for_one_gpu_is_told_the_split(tmp_path: Path) -> None:
    small = replace(PAIR, nodes=tuple(replace(node, gpu_memory_bytes=24 * GIB) for node in PAIR.nodes))
    plan = plan_of(tmp_path, "oss120", cluster=small)
    (problem,) = plan.problems
    assert problem.message.startswith("does not fit: rank 0 (cuda:0): weights, activations and runtime need ")
    assert problem.hint.startswith("would fit: --set ")
    overrides = [word for word in problem.hint.removeprefix("would fit: ").split() if word != "--set"]
    assert plan_of(tmp_path, "oss120", *overrides, cluster=small).problems == ()


def test_ports_of_head_and_worker(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "tiny", "pp=2", "placement.strategy=spread")
    head = {port.name: port for port in plan.head.ports}
    assert (head["api"].first, head["api"].reached_from) == (8000, "host")
    assert str(head["ray-workers"]) == "10002-19999"
    assert head["ray-dashboard"].address == "127.0.0.1"
    assert "api" not in {port.name for port in plan.workers[0].ports}
    assert list(head) == sorted(head)
    public = plan_of(tmp_path, "keyed", KEY="k")
    assert next(port for port in public.head.ports if port.name == "api").reached_from == "clients"
    clash = plan_of(tmp_path, "tiny", "port=10500")
    assert "a: ports api 10500 and ray-workers 10002-19999 overlap" in [error.message for error in clash.problems]


def test_the_environment_of_a_node_is_complete_and_its_own(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "oss20", "pp=2", "placement.strategy=spread", SECRET="x", PATH="/bin")
    by_node = [{item.name: item for item in node.environment} for node in plan.nodes]
    assert [variables["HLAUNCH_NODE_IP"].value for variables in by_node] == ["10.0.0.1", "10.0.0.2"]
    assert by_node[0]["NCCL_SOCKET_IFNAME"].value != by_node[1]["NCCL_SOCKET_IFNAME"].value
    assert by_node[0]["NCCL_DEBUG"].value == "WARN", "the cluster's word is above the entry's"
    assert by_node[0]["OF_ENTRY"].value == "1"
    assert by_node[0]["HF_HUB_OFFLINE"].value == "1"
    assert not {"SECRET", "PATH"} & set(by_node[0])
    assert list(by_node[0]) == sorted(by_node[0])


def test_the_digest_names_what_nodes_see_and_nothing_else(tmp_path: Path) -> None:
    base = plan_of(tmp_path, "keyed", KEY="one")
    assert plan_of(tmp_path, "keyed", KEY="two").digest == base.digest, "keys are no part of it"
    (tmp_path / "elsewhere").mkdir()
    assert plan_of(tmp_path / "elsewhere", "keyed", KEY="one").digest == base.digest
    assert plan_of(tmp_path, "keyed", "max-num-seqs=3", KEY="one").digest != base.digest
    moved = replace(PAIR, nodes=(PAIR.nodes[0], replace(PAIR.nodes[1], ip="10.0.0.9")))
    assert plan_of(tmp_path, "keyed", cluster=moved, KEY="one").digest == base.digest, "no rank is there"
    split = ("pp=2", "placement.strategy=spread")
    there = plan_of(tmp_path, "keyed", *split, cluster=moved, KEY="one")
    assert there.digest != plan_of(tmp_path, "keyed", *split, KEY="one").digest
    assert plan_of(tmp_path, "keyed", "env.MY_TOKEN=canary-2", KEY="one").digest == base.digest


def test_a_shape_that_nothing_tells_is_a_problem(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "unknown")
    assert plan.placement is None
    assert plan.model is None
    assert plan.problems
    assert json.dumps([str(error.message) for error in plan.problems])


def test_hardware_that_nobody_declared_is_named_with_what_was_taken(tmp_path: Path) -> None:
    def said(name: str, *overrides: str, cluster: Cluster) -> list[str]:
        notes = plan_of(tmp_path, name, *overrides, cluster=cluster).notes
        return [note for note in notes if "assumed" in note]

    bare = replace(PAIR, platform="auto", nodes=tuple(replace(node, gpu_memory_bytes=0) for node in PAIR.nodes))
    assert said("oss20", "tp=8", "dp=2", cluster=bare) == ["gpu-memory of a, b is not declared: 24 GiB assumed"]
    assert said("oss20", "tp=8", cluster=bare) == ["gpu-memory of a is not declared: 24 GiB assumed"], "b has no rank"
    assert said("tiny", "tp=2", cluster=CPUS) == [
        "cpus of a, b is not declared: 16 cores assumed; memory of a, b is not declared: 128 GiB assumed"
    ]
    assert said("oss20", "tp=8", "dp=2", cluster=PAIR) == []
    assert said("oss20", "pp=2", cluster=SPARKS) == [], "the platform tells it"


def test_real_inventories_replace_the_declared(tmp_path: Path) -> None:
    path = tmp_path / "model_registry.yml"
    path.write_text(REGISTRY)
    entry = resolve(load_registry(path), "tiny", {}, ("pp=2", "placement.strategy=spread"))
    declared = declared_inventories(PAIR)["a"]
    one_gpu = replace(declared, gpus=declared.gpus[:1])
    plan = make_cluster_plan(entry, PAIR, {}, inventories={"a": one_gpu})
    assert len(plan.inventories[0].gpus) == 1
    assert len(plan.inventories[1].gpus) == 8


def test_cpu_ranks_on_two_nodes_are_handed_to_the_engine_with_their_addresses(tmp_path: Path) -> None:
    with_ray = replace(CPUS, ray=RaySettings())
    plan = plan_of(tmp_path, "tiny", "tp=2", cluster=with_ray)
    plan.check()
    assert plan.executor == "ray"
    config = plan.head.config
    assert config.executor == "ray"
    assert config.nodes.names == ("a", "b")
    assert config.nodes.addresses == tuple(node.ip for node in CPUS.nodes)
    assert config.nodes.ray_address == f"{CPUS.head.ip}:6379"
    assert (config.node_address, config.nodes.head_host) == (CPUS.head.ip, CPUS.head.ip)
    assert plan.placement is not None
    assert config.placement == plan.placement.to_json()
    graph = plan_of(tmp_path, "tiny", "tp=2", "distributed-executor-backend=ray-cgraph", cluster=with_ray)
    assert (graph.executor, graph.head.config.executor) == ("ray-cgraph", "ray-cgraph")
    bare = plan_of(tmp_path, "tiny", "pp=2", cluster=CPUS)
    assert bare.executor == "multinode"
    assert "are started by Ray" in bare.blockers[0].message


def test_experts_shared_by_nobody_are_noted_on_clusters_too(tmp_path: Path) -> None:
    def said(*overrides: str) -> bool:
        return any("it changes nothing; set tp" in note for note in plan_of(tmp_path, "tiny", *overrides).notes)

    assert said("pp=2", "ep=true")
    assert not said("tp=2", "ep=true")
    assert not said("pp=2")
