"""What is said of tensor groups across nodes agrees with the ranking of splits: one cost model for both."""

from __future__ import annotations

import pytest
from plan_support import shape

from engine.config import EngineConfig
from engine.placement import Device, HostSpec, ParallelSizes, Remark, place, remarks
from launcher.plan.borders import weighed
from launcher.plan.cost import Load
from launcher.plan.inventory import declared_inventories
from launcher.plan.links import between_link
from launcher.plan.rank_memory import Sizing
from launcher.plan.splits import Study
from launcher.registry.cluster import Cluster, Fabric, Node


def study(rdma: str, gpus: int, platform: str = "gb10", model: str = "gpt-oss-20b") -> Study:
    nodes = tuple(Node(f"n{i}", "worker" if i else "head", f"10.0.0.{i + 1}", gpus=gpus) for i in range(2))
    cluster = Cluster("pair", nodes, platform=platform, fabric=Fabric(rdma=rdma))
    hardware = declared_inventories(cluster)
    hosts = tuple(HostSpec(node.name, tuple(Device(f"cuda:{i}") for i in range(gpus))) for node in nodes)
    return Study(Sizing(EngineConfig("m"), shape(model), hardware), hosts, between_link(cluster, hardware), Load())


def remark(made: Study, sizes: ParallelSizes) -> Remark:
    placement = place(made.model, sizes, made.hosts)
    found = remarks(placement, made.model, has_rdma=made.between.name == "RDMA")
    changed = weighed(found, placement, made.sizing, made.between)
    assert [item.code for item in changed if item.severity == "warning"] == [
        item.code for item in changed[: sum(item.severity == "warning" for item in changed)]
    ]
    return next(item for item in changed if item.code == "tp-over-slow-link")


def figures(made: Study, sizes: ParallelSizes) -> str:
    estimate = made.split(sizes).estimate
    return f"{estimate.tokens_per_second:,.0f} tok/s and {1e3 * estimate.latency_seconds:.2f} ms a token"


def test_over_rdma_the_split_that_the_ranking_puts_first_is_no_warning() -> None:
    made = study("required", 1)
    own = ParallelSizes(tensor=2)
    first, second, *_ = made.splits()
    assert first.sizes == own
    found = remark(made, own)
    assert found.severity == "info"
    assert figures(made, own) in found.message
    assert "better" not in found.hint
    assert found.hint == f"other splits are estimated slower: {second.sizes} at {figures(made, second.sizes)}"


@pytest.mark.parametrize(("rdma", "severity"), [("off", "warning"), ("required", "info")])
def test_a_faster_split_is_named_with_the_figures_of_the_ranking(rdma: str, severity: str) -> None:
    made = study(rdma, 8, "hopper", "gpt-oss-120b")
    best = made.splits()[0]
    found = remark(made, ParallelSizes(tensor=16))
    assert found.severity == severity
    assert ("TCP" if rdma == "off" else "RDMA") in found.message
    assert f"better: {best.sizes} at {figures(made, best.sizes)}" in found.hint


def test_what_does_not_cross_is_left_as_it_is() -> None:
    made = study("off", 8, "hopper")
    placement = place(made.model, ParallelSizes(data=2, tensor=8), made.hosts)
    found = remarks(placement, made.model, has_rdma=False)
    assert weighed(found, placement, made.sizing, made.between) == found
