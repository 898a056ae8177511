"""Two clusters that the fabric's tests share: a pair of unified-memory hosts with RDMA, and a pair without GPUs."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType
from typing import Any

from launcher.fabric.finding import Finding
from launcher.registry.cluster import Cluster, Fabric, Node, RaySettings

SPARK_IFNAME = "enP2p1s0f0np0"
SPARK_HCAS = ("rocep1s0f0", "roceP2p1s0f0")


def node(name: str = "spark-01", **changes: Any) -> Node:
    number = int(name[-1])
    values: dict[str, Any] = {
        "name": name,
        "role": "head" if number == 1 else "worker",
        "ip": f"192.168.100.{number}",
        "gpus": 1,
        "ifname": SPARK_IFNAME,
        "hcas": SPARK_HCAS,
    }
    values |= changes
    values["env"] = MappingProxyType(dict(values.get("env", {})))
    return Node(**values)


def spark_pair(
    *,
    fabric: dict[str, Any] | None = None,
    env: dict[str, str] | None = None,
    first: dict[str, Any] | None = None,
    second: dict[str, Any] | None = None,
    **changes: Any,
) -> Cluster:
    fields: dict[str, Any] = {
        "rdma": "required",
        "subnet": "192.168.100.0/24",
        "mtu": 9000,
        "traffic_class": 106,
        "timeout": 20,
        "merge_nics": True,
    }
    values: dict[str, Any] = {"platform": "gb10", "ray": RaySettings(), **changes}
    return Cluster(
        "spark-pair",
        (node("spark-01", **(first or {})), node("spark-02", **(second or {}))),
        fabric=Fabric(**(fields | (fabric or {}))),
        env=MappingProxyType(env or {}),
        **values,
    )


def cpu_pair(**changes: Any) -> Cluster:
    nodes = tuple(
        Node(f"cpu-{i}", "head" if i == 1 else "worker", f"10.77.0.{i}", ifname=f"veth{i}", cpus=2) for i in (1, 2)
    )
    return Cluster("cpu-pair", nodes, platform="cpu", **changes)


def codes(findings: Iterable[Finding]) -> list[str]:
    return sorted({found.code for found in findings})


def only(findings: Iterable[Finding], code: str) -> Finding:
    found = [item for item in findings if item.code == code]
    assert len(found) == 1, [item.headline() for item in findings]
    return found[0]
