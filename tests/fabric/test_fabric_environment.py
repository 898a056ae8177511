"""What a node gets: fields of the fabric, presets, blocks of the registry, what the launching machine may add."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fabric_support import cpu_pair, spark_pair

from launcher.fabric.environment import as_mapping, carried_environment, node_environment
from launcher.fabric.lint import lint
from launcher.fabric.sources import Source
from launcher.plan.cluster_plan import make_cluster_plan
from launcher.registry import parse_registry, resolve, resolve_cluster
from launcher.supervise.runtimes import RUNTIMES, Secrets
from launcher.supervise.shell import Shell


def test_a_unified_memory_pair_renders_as_the_handbook_says() -> None:
    cluster = spark_pair(env={"NCCL_DEBUG": "WARN"})
    assert as_mapping(node_environment(cluster, cluster.head, {})) == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "GLOO_SOCKET_IFNAME": "enP2p1s0f0np0",
        "HLAUNCH_NODE_IP": "192.168.100.1",
        "NCCL_DEBUG": "WARN",
        "NCCL_DMABUF_ENABLE": "0",
        "NCCL_IB_HCA": "=rocep1s0f0,roceP2p1s0f0",
        "NCCL_IB_TC": "106",
        "NCCL_IGNORE_CPU_AFFINITY": "1",
        "NCCL_NET": "IB",
        "NCCL_NET_GDR_C2C": "0",
        "NCCL_NET_GDR_LEVEL": "LOC",
        "NCCL_NET_PLUGIN": "none",
        "NCCL_NVLS_ENABLE": "0",
        "NCCL_SOCKET_IFNAME": "=enP2p1s0f0np0",
        "NVSHMEM_DISABLE_NVLS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_worker_niceness": "0",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    }


def test_a_node_without_gpu_gets_no_nccl() -> None:
    cluster = cpu_pair()
    names = set(as_mapping(node_environment(cluster, cluster.head, {"NCCL_IB_HCA": "mlx5_0"})))
    assert names == {"GLOO_SOCKET_IFNAME", "HLAUNCH_NODE_IP"}


def test_discrete_gpus_keep_gpudirect() -> None:
    cluster = spark_pair(platform="hopper")
    values = as_mapping(node_environment(cluster, cluster.head, {}))
    assert "NCCL_NET_GDR_LEVEL" not in values
    assert "NCCL_IGNORE_CPU_AFFINITY" not in values
    assert "RAY_memory_monitor_refresh_ms" not in values


def test_rdma_modes() -> None:
    off = spark_pair(fabric={"rdma": "off"})
    values = as_mapping(node_environment(off, off.head, {}))
    assert (values["NCCL_NET"], values["NCCL_IB_DISABLE"]) == ("Socket", "1")
    assert "NCCL_IB_HCA" not in values
    preferred = spark_pair(fabric={"rdma": "preferred"})
    assert "NCCL_NET" not in as_mapping(node_environment(preferred, preferred.head, {}))


def test_defaults_of_nccl_stay_out() -> None:
    cluster = spark_pair(fabric={"timeout": 22, "merge_nics": False, "service_level": 3, "gid_index": 3})
    values = as_mapping(node_environment(cluster, cluster.head, {}))
    assert values["NCCL_IB_TIMEOUT"] == "22"
    assert values["NCCL_IB_MERGE_NICS"] == "0"
    assert values["NCCL_IB_SL"] == "3"
    assert values["NCCL_IB_GID_INDEX"] == "3"
    plain = spark_pair(fabric={"timeout": 20, "merge_nics": True, "traffic_class": None})
    assert {"NCCL_IB_TIMEOUT", "NCCL_IB_MERGE_NICS", "NCCL_IB_TC"}.isdisjoint(
        as_mapping(node_environment(plain, plain.head, {}))
    )


def test_the_higher_layer_wins_and_keeps_what_it_hides() -> None:
    cluster = spark_pair(env={"NCCL_IB_TC": "104"}, first={"env": {"NCCL_IB_TC": "96"}})
    found = {item.name: item for item in node_environment(cluster, cluster.head, {"NCCL_IB_TC": "1"})}["NCCL_IB_TC"]
    assert (found.value, found.origin) == ("96", "node env")
    assert [(item.value, item.origin) for item in found.shadowed] == [
        ("104", "cluster env"),
        ("106", "fabric tc"),
        ("1", "carried from the launching environment"),
    ]
    other = {item.name: item for item in node_environment(cluster, cluster.workers[0], {})}["NCCL_IB_TC"]
    assert other.value == "104"


def test_the_launching_environment_adds_only_what_may_travel() -> None:
    base = {
        "NCCL_DEBUG": "INFO",
        "NCCL_IB_HCA": "mlx5_9",
        "NCCL_SOCKET_IFNAME": "eth9",
        "RANK": "3",
        "HF_TOKEN": "canary",
        "RAY_AUTH_TOKEN": "canary",
        "PATH": "/bin",
        "EDITOR": "vi",
        "NCCL_NET_PLUGIN": "aws-ofi",
    }
    cluster = spark_pair()
    found = {item.name: item for item in node_environment(cluster, cluster.head, base)}
    assert found["NCCL_DEBUG"].origin == "carried from the launching environment"
    assert found["NCCL_IB_HCA"].value == "=rocep1s0f0,roceP2p1s0f0"
    assert found["NCCL_NET_PLUGIN"].value == "none"
    assert {"RANK", "HF_TOKEN", "RAY_AUTH_TOKEN", "PATH", "EDITOR"}.isdisjoint(found)


def test_a_start_carries_what_the_plan_lacks_and_the_fabric_does_not_forbid() -> None:
    cluster = spark_pair()
    base = {
        "NCCL_DEBUG": "INFO",
        "NCCL_IB_DISABLE": "1",
        "NCCL_IB_TC": "8",
        "NCCL_BUFFSIZE": "1",
        "RANK": "3",
        "A": "b",
    }
    planned = as_mapping(node_environment(cluster, cluster.head, {}))
    carried = carried_environment(cluster, cluster.head, base, {*planned, "NCCL_BUFFSIZE"})
    assert carried == {"NCCL_DEBUG": "INFO"}
    assert "NCCL_IB_DISABLE" not in as_mapping(node_environment(cluster, cluster.head, base)), "rdma is required"
    free = spark_pair(fabric={"rdma": "preferred"})
    assert carried_environment(free, free.head, base, ())["NCCL_IB_DISABLE"] == "1"


def test_a_node_gets_its_plan_over_what_is_carried(tmp_path: Path) -> None:
    registry = parse_registry(
        "clusters: {c: {platform: cpu, env: {GLOO_LOG_LEVEL: WARN}, "
        "nodes: [{name: a, role: head, ip: 10.0.0.1, ifname: lo}]}}\n"
        "models: {m: {model: tiny-oss, cluster: c, env: {OMP_NUM_THREADS: '2'}}}\n"
    )
    entry = resolve(registry, "m", {})
    shell = {"GLOO_LOG_LEVEL": "INFO", "TORCH_GLOO_LAZY_INIT": "1", "HF_TOKEN": "canary", "OMP_NUM_THREADS": "9"}
    plan = make_cluster_plan(entry, resolve_cluster(registry, "c", {}, entry), shell)
    assert "TORCH_GLOO_LAZY_INIT" not in {item.name for item in plan.head.environment}, "a plan has no shell"
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **shell}
    RUNTIMES["process"].stage(Shell("a", None, environ), plan, plan.head, Secrets("token", ""))
    staged = json.loads(next(tmp_path.rglob("environment.json")).read_text())
    assert staged["GLOO_LOG_LEVEL"] == "WARN"
    assert staged["TORCH_GLOO_LAZY_INIT"] == "1"
    assert staged["OMP_NUM_THREADS"] == "2"
    assert "HF_TOKEN" not in staged


def test_our_own_environment_has_no_finding_but_the_decoded_class() -> None:
    """Lint the rendered values as if a user had written them into the nodes' blocks."""
    cluster = spark_pair()
    sources = [
        Source(f"node '{node.name}' env", "node", as_mapping(node_environment(cluster, node, {})), node.name)
        for node in cluster.nodes
    ]
    found = lint(sources, cluster=cluster)
    assert {item.code for item in found} == {"tc-decoded"}
    decoded = next(item for item in found if item.code == "tc-decoded")
    assert decoded.cause.startswith("106 = DSCP 26, ECN 2, priority 3")
