"""Inventories: of fixture trees, of an NVML of our own, of a declared cluster, through JSON and back."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from fake_nvml import FakeGpu, FakeNvml
from hypothesis import given
from hypothesis import strategies as st

from launcher.plan.inventory import (
    Finding,
    Gpu,
    GpuLink,
    GpuProcess,
    Inventory,
    InventoryError,
    Nic,
    NumaNode,
    RdmaPort,
    declared_inventories,
    read_inventory,
)
from launcher.plan.inventory.bandwidth import cache_file, load_bandwidth, measure_read_bandwidth, save_bandwidth
from launcher.plan.inventory.host import parse_cores, torch_cuda_version
from launcher.registry.cluster import Cluster, Fabric, Node

GIB = 1 << 30

HOST = {
    "proc/meminfo": "MemTotal:       263921664 kB\nMemFree: 1 kB\nMemAvailable:   251658240 kB\n",
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: Xeon\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile amx_bf16 x\n"
    "processor\t: 1\nmodel name\t: Xeon\n",
    "sys/devices/system/node/node0/cpulist": "0-3,16\n",
    "sys/devices/system/node/node0/meminfo": "Node 0 MemTotal:  1048576 kB\nNode 0 MemFree:  524288 kB\n",
    "sys/devices/system/node/node1/cpulist": "4-7\n",
    "sys/devices/system/node/node10/cpulist": "8\n",
    "sys/class/net/lo/operstate": "unknown\n",
    "sys/class/net/docker0/operstate": "up\n",
    "sys/class/net/eth0/operstate": "up\n",
    "sys/class/net/eth0/speed": "-1\n",
    "sys/class/net/eth0/mtu": "1500\n",
    "sys/class/net/ens1f0np0/operstate": "up\n",
    "sys/class/net/ens1f0np0/speed": "200000\n",
    "sys/class/net/ens1f0np0/mtu": "9000\n",
    "sys/class/net/ens1f0np0/device/numa_node": "1\n",
    "sys/class/infiniband/mlx5_0/device/numa_node": "1\n",
    "sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n",
    "sys/class/infiniband/mlx5_0/ports/1/link_layer": "Ethernet\n",
    "sys/class/infiniband/mlx5_0/ports/1/rate": "200 Gb/sec (4X HDR)\n",
    "sys/class/infiniband/mlx5_0/ports/1/gid_attrs/ndevs/0": "ens1f0np0\n",
    "sys/class/infiniband/mlx5_1/device/numa_node": "-1\n",
    "sys/class/infiniband/mlx5_1/ports/1/state": "1: DOWN\n",
    "sys/class/infiniband/mlx5_1/ports/1/rate": "10 Gb/sec (4X)\n",
}
DRIVER = {
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul\n",
    "proc/driver/nvidia/gpus/0000:3b:00.0/information": "Model: \t\t NVIDIA H100 80GB HBM3\n",
}


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_host_with_two_sockets_and_rdma(tmp_path: Path) -> None:
    found = read_inventory(tree(tmp_path, HOST))
    assert found.node == socket.gethostname()
    assert found.cpu_features == ("AVX2", "AVX-512", "AVX-512 bf16", "AMX", "AMX bf16")
    assert [node.index for node in found.numa] == [0, 1, 10]
    assert found.numa[0] == NumaNode(0, (0, 1, 2, 3, 16), GIB, GIB // 2)
    assert found.numa_nodes == 3
    assert [nic.name for nic in found.nics] == ["ens1f0np0", "eth0"]
    assert found.nics[0] == Nic("ens1f0np0", "up", 200.0, 9000, (), 1, "mlx5_0")
    assert found.nics[1].speed_gbps == 0.0
    assert found.rdma_ports[0] == RdmaPort("mlx5_0", 1, "ACTIVE", "Ethernet", 200.0, "ens1f0np0", 1)
    assert found.rdma_ports[1].state == "DOWN"
    assert found.rdma_ports[1].numa_node is None
    assert found.has_rdma
    assert found.gpus == ()
    assert found.findings == ()


def test_an_empty_tree_is_a_machine_with_nothing(tmp_path: Path) -> None:
    found = read_inventory(tmp_path)
    assert found.memory_total_bytes == 0
    assert found.cpu_cores == 1
    assert found.numa_nodes == 1
    assert not found.has_rdma


def test_this_machine_can_be_read() -> None:
    found = read_inventory()
    assert found.memory_total_bytes > 0
    assert found.cpu_cores >= 1
    assert Inventory.from_json(found.to_json(), "here") == found


# GPUs.


def test_gpus_by_nvml(tmp_path: Path) -> None:
    gpus = [
        FakeGpu(bus=0x3B, nvlinks=[1, 1, 1, 1], processes=[(41, "python", 3 * GIB), (42, "vllm", 60 * GIB)]),
        FakeGpu(bus=0x86, nvlinks=[0, 0, 0, 0], numa=1),
    ]
    nvml = FakeNvml(gpus, driver=b"580.65.06")
    found = read_inventory(tree(tmp_path, HOST), nvml)
    assert found.driver_version == "580.65.06"
    first, second = found.gpus
    assert first.memory_bytes == 80 * GIB
    assert first.free_bytes == 79 * GIB
    assert first.capability == (9, 0)
    assert first.capability_text == "9.0"
    assert first.bus_id == "0000:3b:00.0"
    assert first.links == (GpuLink(1, "nvlink", 4),)
    assert first.processes == (GpuProcess(42, "vllm", 60 * GIB), GpuProcess(41, "python", 3 * GIB))
    assert second.numa_node == 1
    assert not nvml.is_open, "NVML is closed again"


def test_links_over_a_switch_and_over_pcie(tmp_path: Path) -> None:
    switched = [FakeGpu(bus=i, nvlinks=[-1] * 18) for i in range(3)]
    found = read_inventory(tmp_path, FakeNvml(switched))
    assert found.gpus[0].links == (GpuLink(1, "nvlink", 18, "NVSwitch"), GpuLink(2, "nvlink", 18, "NVSwitch"))
    plain = [FakeGpu(bus=0, ancestor=10), FakeGpu(bus=1, ancestor=20)]
    assert read_inventory(tmp_path, FakeNvml(plain)).gpus[1].links == (GpuLink(0, "pcie", 0, "PXB"),)


def test_unified_memory_comes_from_meminfo(tmp_path: Path) -> None:
    gb10 = FakeGpu(name="NVIDIA GB10", memory=None, capability=(12, 1), numa=None)
    found = read_inventory(tree(tmp_path, HOST), FakeNvml([gb10]))
    (gpu,) = found.gpus
    assert gpu.is_unified
    assert gpu.memory_bytes == 263921664 * 1024
    assert gpu.free_bytes == 251658240 * 1024
    assert gpu.numa_node is None


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("Driver/library version mismatch", "driver-mismatch"),
        ("NVML Shared Library Not Found", "driver-missing"),
        ("Driver Not Loaded", "driver-missing"),
        ("Unknown Error", "nvml-failed"),
    ],
)
def test_a_driver_that_does_not_answer_is_a_finding(tmp_path: Path, said: str, code: str) -> None:
    found = read_inventory(tree(tmp_path, HOST | DRIVER), FakeNvml(init_error=said))
    (finding,) = found.findings
    assert finding.code == code
    assert said in finding.message
    assert finding.fix
    assert [gpu.name for gpu in found.gpus] == ["NVIDIA H100 80GB HBM3"], "the driver's own listing still counts"
    assert found.gpus[0].memory_bytes == 0


def test_gpus_without_the_library_are_named(tmp_path: Path) -> None:
    found = read_inventory(tree(tmp_path, HOST | DRIVER))
    (finding,) = found.findings
    assert finding.code == "nvml-missing"
    assert finding.fix == "run: pip install nvidia-ml-py"
    assert found.driver_version == "580.65.06"
    assert found.gpus[0].bus_id == "0000:3b:00.0"


def test_old_bindings_lack_functions_and_still_tell_the_rest(tmp_path: Path) -> None:
    lacks = ["nvmlDeviceGetNumaNodeId", "nvmlDeviceGetCudaComputeCapability", "nvmlDeviceGetComputeRunningProcesses"]
    (gpu,) = read_inventory(tmp_path, FakeNvml([FakeGpu()], lacks=lacks)).gpus
    assert gpu.memory_bytes == 80 * GIB
    assert gpu.capability is None
    assert gpu.capability_text == "unknown"
    assert gpu.processes == ()


# JSON.

texts = st.text(max_size=20)
inventories = st.builds(
    Inventory,
    node=texts,
    cpu_name=texts,
    cpu_cores=st.integers(0, 999),
    numa_nodes=st.integers(0, 9),
    memory_total_bytes=st.integers(0, 1 << 50),
    memory_available_bytes=st.integers(0, 1 << 50),
    gpus=st.lists(
        st.builds(
            Gpu,
            index=st.integers(0, 15),
            name=texts,
            capability=st.none() | st.tuples(st.integers(0, 20), st.integers(0, 9)),
            numa_node=st.none() | st.integers(0, 7),
            links=st.lists(st.builds(GpuLink, peer=st.integers(0, 7), kind=texts), max_size=2).map(tuple),
            processes=st.lists(
                st.builds(GpuProcess, pid=st.integers(1), name=texts, memory_bytes=st.integers(0)), max_size=2
            ).map(tuple),
        ),
        max_size=3,
    ).map(tuple),
    cpu_features=st.lists(texts, max_size=3).map(tuple),
    memory_bandwidth=st.none() | st.floats(0, 1e13),
    torch_cuda=st.none() | texts,
    findings=st.lists(st.builds(Finding, code=texts, message=texts), max_size=2).map(tuple),
)


@given(inventories)
def test_json_brings_every_inventory_back(inventory: Inventory) -> None:
    assert Inventory.from_json(inventory.to_json(), "f") == inventory


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cpu_cores": "2"}, "cpu_cores is not int"),
        ({"cpu_cores": True}, "cpu_cores is not int"),
        ({"gpus": {}}, "gpus is not a list"),
        ({"gpus": [{"index": 0}]}, r"^saved.json: missing field gpus\[0\].name$"),
        ({"numa": [{}]}, r"^saved.json: missing fields numa\[0\].index, numa\[0\].cores$"),
        ({"gpus": [{"index": 0, "name": "x", "memory": 3}]}, r"unknown field gpus\[0\].memory"),
        ({"gpus": [{"index": 0, "name": "x", "capability": [9]}]}, r"gpus\[0\].capability has 1 items, not 2"),
        ({"hlaunch_inventory": 2}, "not an inventory of format 1"),
        ({"spare": 1}, "unknown field spare"),
    ],
)
def test_a_wrong_file_is_refused_by_field(change: dict[str, object], said: str) -> None:
    data = json.loads(Inventory("n", "c", 1, 1, 1, 1).to_json()) | change
    with pytest.raises(InventoryError, match=said):
        Inventory.from_json(json.dumps(data), "saved.json")


def test_a_file_without_the_host_names_what_it_lacks() -> None:
    with pytest.raises(InventoryError) as caught:
        Inventory.from_json('{"hlaunch_inventory": 1, "node": "spark-01"}', "saved.json")
    lacking = "cpu_name, cpu_cores, numa_nodes, memory_total_bytes, memory_available_bytes"
    assert caught.value.message == f"saved.json: missing fields {lacking}"


@pytest.mark.parametrize("text", ["", "[]", "3", "[" * 100_000, "{}", '{"hlaunch_inventory": 1}'])
def test_what_is_no_inventory_is_refused(text: str) -> None:
    with pytest.raises(InventoryError, match=r"^saved.json: "):
        Inventory.from_json(text, "saved.json")


# A declared cluster.


def test_a_declared_pair_of_gb10() -> None:
    nodes = (
        Node("spark-01", "head", "192.168.100.1", gpus=1, gpu_memory_bytes=119 * GIB, ifname="enp2", hcas=("rocep1",)),
        Node("spark-02", "worker", "192.168.100.2", gpus=1),
    )
    cluster = Cluster("spark-pair", nodes, platform="gb10", fabric=Fabric(rdma="required", mtu=9000, hcas=("mlx5_0",)))
    found = declared_inventories(cluster)
    assert list(found) == ["spark-01", "spark-02"]
    first, second = found.values()
    assert first.gpus[0].memory_bytes == 119 * GIB
    assert first.memory_total_bytes == 119 * GIB, "unified: one memory"
    assert first.gpus[0].is_unified
    assert first.rdma_ports == (RdmaPort("rocep1", 1, "ACTIVE", netdev="enp2"),)
    assert first.nics[0].addresses == ("192.168.100.1",)
    assert second.rdma_ports[0].device == "mlx5_0"
    assert second.gpus[0].capability == (12, 1)
    assert second.source == "declared in cluster spark-pair"
    without = replace(cluster, fabric=Fabric(rdma="off", hcas=("mlx5_0",)), platform="cpu")
    assert not declared_inventories(without)["spark-02"].has_rdma


# Small parts.


@pytest.mark.parametrize(
    ("text", "cores"),
    [("0-3,8", (0, 1, 2, 3, 8)), ("", ()), ("5\n", (5,)), ("junk,2", (2,)), ("0-1,4-5", (0, 1, 4, 5))],
)
def test_core_lists(text: str, cores: tuple[int, ...]) -> None:
    assert parse_cores(text) == cores


def test_bandwidth_is_measured_once_and_kept(tmp_path: Path) -> None:
    rate = measure_read_bandwidth(1, 64 << 20, seconds=0.05)
    assert 1e8 < rate < 1e12
    path = cache_file({"XDG_CACHE_HOME": str(tmp_path)}, "node", "cpu", 2)
    assert load_bandwidth(path) is None
    save_bandwidth(path, rate)
    assert load_bandwidth(path) == round(rate)
    assert cache_file({"HOME": str(tmp_path)}, "node", "cpu", 2) != cache_file(
        {"HOME": str(tmp_path)}, "node", "cpu", 4
    )
    assert cache_file({}, "node", "cpu", 2) is None
    assert path is not None
    path.write_text('{"bytes_per_second": "fast"}')
    assert load_bandwidth(path) is None


def test_torch_is_not_imported_to_know_its_cuda() -> None:
    installed = torch_cuda_version()
    from torch.version import cuda

    assert installed == (cuda or "")
