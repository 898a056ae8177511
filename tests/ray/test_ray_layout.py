"""Bundles of a placement group and what is missing for them, without Ray."""

from __future__ import annotations

from dataclasses import replace

from engine.config import BUNDLED_MODELS, load_model_config
from engine.executor.ray_layout import (
    RayNode,
    describe_shortages,
    find_shortages,
    lay_out,
    needed_and_there,
)
from engine.placement import Device, HostSpec, ParallelSizes, Placement, place

MODEL = load_model_config(BUNDLED_MODELS["tiny-oss"])
ADDRESSES = {"one": "10.0.0.1", "two": "10.0.0.2"}


def placed(sizes: ParallelSizes, per_node: int, backend: str = "cpu") -> Placement:
    devices = tuple(Device(f"{backend}:{i}") for i in range(per_node))
    return place(MODEL, sizes, [HostSpec("one", devices), HostSpec("two", devices)])


def node(name: str, free: dict[str, float], total: dict[str, float] | None = None, *, alive: bool = True) -> RayNode:
    return RayNode(f"id-{name}-{alive}", ADDRESSES.get(name, name), alive, total or free, free)


def test_a_tensor_group_over_two_nodes_makes_two_pinned_bundles() -> None:
    layout = lay_out(placed(ParallelSizes(tensor=2), 1), 0, ADDRESSES)
    assert layout.strategy == "STRICT_SPREAD"
    assert [bundle.resources for bundle in layout.bundles] == [
        {"CPU": 1, "node:10.0.0.1": 0.001},
        {"CPU": 1, "node:10.0.0.2": 0.001},
    ]
    assert [bundle.ranks for bundle in layout.bundles] == [(0,), (1,)]
    assert layout.index("two") == 1


def test_an_engine_inside_a_node_is_one_bundle_that_cannot_be_torn_apart() -> None:
    placement = placed(ParallelSizes(data=2, tensor=2), 2, "cuda")
    first, second = lay_out(placement, 0, ADDRESSES), lay_out(placement, 1, ADDRESSES)
    assert (first.strategy, first.bundles[0].resources) == ("PACK", {"GPU": 2, "node:10.0.0.1": 0.001})
    assert second.bundles[0].resources == {"GPU": 2, "node:10.0.0.2": 0.001}
    assert second.bundles[0].ranks == (2, 3)


def test_nothing_is_missing_when_everything_is_free() -> None:
    layout = lay_out(placed(ParallelSizes(tensor=2), 1), 0, ADDRESSES)
    assert find_shortages(layout, [node("one", {"CPU": 1}), node("two", {"CPU": 4})]) == ()


def test_each_shortage_names_its_node_and_whether_it_can_pass() -> None:
    layout = lay_out(placed(ParallelSizes(pipeline=2, tensor=2), 2, "cuda"), 0, ADDRESSES)
    found = find_shortages(layout, [node("one", {"GPU": 1}), node("10.9.9.9", {"GPU": 8})])
    assert [(item.node, item.can_come) for item in found] == [("one", False), ("two", True)]
    assert describe_shortages(found) == (
        "one: 10.0.0.1 has 1 GPU, 2 are needed; two: 10.0.0.2 is not in the Ray cluster (there: 10.0.0.1, 10.9.9.9)"
    )
    busy = find_shortages(layout, [node("one", {"GPU": 0}, {"GPU": 2}), node("two", {"GPU": 2})])
    assert [(item.what, item.can_come) for item in busy] == [("10.0.0.1: 0 of 2 GPUs are free, 2 are needed", True)]


def test_a_node_that_came_back_is_not_taken_for_its_ghost() -> None:
    layout = lay_out(placed(ParallelSizes(tensor=2), 1), 0, ADDRESSES)
    ghost, back = node("two", {"CPU": 1}, alive=False), node("two", {"CPU": 1})
    assert find_shortages(layout, [node("one", {"CPU": 1}), ghost, back]) == ()
    lost = find_shortages(layout, [node("one", {"CPU": 1}), ghost])
    assert lost[0].what.startswith("10.0.0.2 is lost")
    # For a while Ray holds both for alive, and the old one's resources for taken.
    taken = replace(back, id="old", available={"CPU": 0.0})
    assert find_shortages(layout, [node("one", {"CPU": 1}), taken, back]) == ()


def test_without_addresses_different_nodes_are_found_for_the_bundles() -> None:
    layout = lay_out(placed(ParallelSizes(tensor=2), 1), 0, {})
    assert find_shortages(layout, [node("a", {"CPU": 1}), node("b", {"CPU": 1})]) == ()
    found = find_shortages(layout, [node("a", {"CPU": 64})])
    assert [(item.what, item.can_come) for item in found] == [
        ("2 different nodes are needed, 1 are in the Ray cluster", True)
    ]


def test_the_table_sets_needs_beside_what_is_there() -> None:
    layout = lay_out(placed(ParallelSizes(tensor=2), 1), 0, ADDRESSES)
    table = needed_and_there(layout, [node("one", {"CPU": 1}, {"CPU": 2}), node("10.0.0.7", {"GPU": 1})])
    assert table.splitlines() == [
        "node  address   needs  free       has",
        "one   10.0.0.1  1 CPU  1 CPU      2 CPU",
        "two   10.0.0.2  1 CPU  not there",
        "      10.0.0.7         1 GPU      1 GPU",
    ]
