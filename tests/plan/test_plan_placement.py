"""Placements: every part of the model owned once per engine, groups as vLLM's, borders, refusals with a way out."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_support import gpu_hosts, shape, small

from engine.placement import (
    Device,
    HostSpec,
    KVLink,
    ParallelSizes,
    Placement,
    PlacementError,
    PlacementOptions,
    Shares,
    apportion,
    embedding_rows,
    find_sizes,
    place,
    remarks,
    shard,
    single_rank,
    split_evenly,
    split_layers,
)

TWO_BY_EIGHT = gpu_hosts(8, 8)


def counts(pairs: list[tuple[int, int]]) -> list[int]:
    return [end - begin for begin, end in pairs]


# Shares.


@given(
    units=st.integers(0, 400),
    weights=st.lists(st.floats(0, 100), min_size=1, max_size=12),
    data=st.data(),
)
def test_apportion_gives_every_unit_once_within_the_capacities(
    units: int, weights: list[float], data: st.DataObject
) -> None:
    capacities = data.draw(st.lists(st.integers(0, 200), min_size=len(weights), max_size=len(weights)))
    room = sum(min(c, units) for c, w in zip(capacities, weights, strict=True) if w > 0)
    if room < units:
        with pytest.raises(PlacementError, match="do not fit"):
            apportion(units, weights, capacities=capacities)
        return
    found = apportion(units, weights, capacities=capacities)
    assert sum(found) == units
    assert all(0 <= n <= c for n, c in zip(found, capacities, strict=True))
    assert all(n == 0 for n, w in zip(found, weights, strict=True) if w == 0)
    # Whoever has room left got within one unit of what its weight says against any other that got some.
    open_ranks = [i for i, w in enumerate(weights) if w > 1e-3 and found[i] < capacities[i]]
    for i in open_ranks:
        for k in open_ranks:
            assert found[i] / weights[i] <= (found[k] + 1) / weights[k] + 1 / weights[i]


@given(units=st.integers(1, 200), parts=st.integers(1, 32))
def test_equal_weights_are_an_even_split(units: int, parts: int) -> None:
    assert apportion(units, [1.0] * parts) == split_evenly(units, parts)


@given(units=st.integers(8, 90), weights=st.lists(st.floats(0.001, 100), min_size=1, max_size=8))
def test_a_minimum_is_given_to_all(units: int, weights: list[float]) -> None:
    found = apportion(units, weights, minimum=1)
    assert sum(found) == units
    assert min(found) >= 1


def test_shares_follow_measured_bandwidth_and_capacity() -> None:
    # One GPU of 3000 GB/s and one CPU of 80: 90 units are 88 and 2; a GPU with room for 60 leaves 30 to the CPU.
    assert apportion(90, [3000, 80]) == (88, 2)
    assert apportion(90, [3000, 80], capacities=[60, 90]) == (60, 30)


@pytest.mark.parametrize(
    ("stages", "expected"),
    [(1, (24,)), (2, (12, 12)), (4, (6,) * 4), (5, (5, 5, 5, 5, 4)), (8, (3,) * 8), (16, (2,) * 8 + (1,) * 8)],
)
def test_layers_of_gpt_oss_over_stages(stages: int, expected: tuple[int, ...]) -> None:
    assert split_layers(shape().layer_windows, stages) == expected


def test_pairs_stay_together_where_it_costs_nothing() -> None:
    windows = tuple(None if i % 2 else 128 for i in range(36))
    assert split_layers(windows, 4, (1, 1, 1, 1)) == (9, 9, 9, 9), "pairs would make one stage 10 layers long"
    assert split_layers(windows, 3) == (12, 12, 12)
    assert split_layers(windows, 2, (2.0, 1.0)) == (24, 12)


# Every part owned exactly once per engine.


@st.composite
def cases(draw: st.DrawFn) -> tuple[object, ...]:
    kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
    model = small(
        layers=draw(st.integers(1, 40)),
        kv_heads=kv_heads,
        group=draw(st.sampled_from([1, 4, 8])),
        units=draw(st.integers(16, 100)),
        experts=draw(st.integers(16, 128)),
    )
    sizes = ParallelSizes(
        draw(st.integers(1, 4)),
        draw(st.integers(1, 6)),
        draw(st.sampled_from([1, 2, 4, 8, 16])),
        draw(st.booleans()),
    )
    hosts = gpu_hosts(*draw(st.lists(st.integers(0, 8), min_size=1, max_size=5)))
    strategy = draw(st.sampled_from(["pack", "spread", "strict-pack", "strict-spread"]))
    return model, sizes, hosts, PlacementOptions(strategy=strategy, exact=draw(st.booleans()))


@settings(max_examples=400, deadline=None)
@given(cases())
def test_every_part_of_the_model_has_its_owner(case: tuple[object, ...]) -> None:
    model, sizes, hosts, options = case
    try:
        placement = place(model, sizes, hosts, options, suggests=False)
    except PlacementError:
        return
    assert placement.world_size == sizes.world
    seats = [(rank.node, rank.device) for rank in placement.ranks]
    assert len(set(seats)) == len(seats), "a device is given once"
    assert set(seats) <= {(host.name, device.name) for host in hosts for device in host.devices}
    copies = max(1, sizes.tensor // model.num_kv_heads)
    for dp in range(sizes.data):
        owned: Counter[tuple[str, int, int]] = Counter()
        for rank in placement.engine(dp):
            for layer in range(*rank.layers):
                owned.update(("kv", layer, head) for head in range(*rank.kv_heads))
                owned.update(("query", layer, head) for head in range(*rank.query_heads))
                for expert in range(*rank.experts):
                    owned[("expert", layer, expert)] += rank.mlp_units[1] - rank.mlp_units[0]
                # A query head sits beside the KV head that it reads.
                group = model.num_attention_heads // model.num_kv_heads
                for head in range(*rank.query_heads):
                    assert rank.kv_heads[0] <= head // group < rank.kv_heads[1]
            owned.update(("vocab", -1, row) for row in range(*rank.vocab))
        units = -(-model.intermediate_size // 32)
        expected: Counter[tuple[str, int, int]] = Counter()
        for layer in range(model.num_layers):
            expected.update({("kv", layer, head): copies for head in range(model.num_kv_heads)})
            expected.update({("query", layer, head): 1 for head in range(model.num_attention_heads)})
            expected.update({("expert", layer, expert): units for expert in range(model.num_experts)})
        expected.update({("vocab", -1, row): 1 for row in range(model.vocab_size)})
        assert owned == expected
        assert sum(rank.has_embedding for rank in placement.engine(dp)) == sizes.tensor
    if options.strategy == "strict-pack":
        assert all(len({rank.node for rank in placement.engine(dp)}) == 1 for dp in range(sizes.data))
    if options.strategy == "strict-spread":
        for dp in range(sizes.data):
            assert len({placement.stage(dp, pp)[0].node for pp in range(sizes.pipeline)}) == sizes.pipeline
    if any(len(host.devices) >= sizes.tensor for host in hosts):
        assert placement.crossing(placement.tp_groups) == (), "a stage stays in a node when one is large enough"
    assert Placement.from_json(placement.to_json()) == placement


# Groups, as vLLM lays ranks out.


def test_ranks_and_groups_are_vllms() -> None:
    placement = place(shape(), ParallelSizes(data=2, pipeline=2, tensor=4), TWO_BY_EIGHT)
    # vLLM: torch.arange(16).reshape(dp, pp, tp), and groups by each axis.
    assert placement.tp_groups == ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15))
    assert placement.pp_groups == ((0, 4), (1, 5), (2, 6), (3, 7), (8, 12), (9, 13), (10, 14), (11, 15))
    assert placement.dp_groups == ((0, 8), (1, 9), (2, 10), (3, 11), (4, 12), (5, 13), (6, 14), (7, 15))
    assert placement.ep_groups == ()
    assert placement.ranks[13].dp_rank == 1
    assert placement.ranks[13].pp_rank == 1
    assert placement.ranks[13].tp_rank == 1
    assert placement.ranks[13].node == "n1"
    assert placement.ranks[13].device == "cuda:5"
    assert placement.crossing(placement.pp_groups) == ()
    assert placement.nodes == ("n0", "n1")


def test_expert_parallel_groups_are_the_stages() -> None:
    placement = place(shape(), ParallelSizes(tensor=8, expert_parallel=True), gpu_hosts(8))
    assert placement.ep_groups == placement.tp_groups == (tuple(range(8)),)
    assert [rank.experts for rank in placement.ranks] == [(4 * i, 4 * i + 4) for i in range(8)]
    assert all(rank.mlp_units == (0, 90) for rank in placement.ranks)


@pytest.mark.parametrize(("tp", "units"), [(2, [45, 45]), (4, [23, 23, 22, 22]), (8, [12, 12] + [11] * 6)])
def test_ninety_blocks_are_shared_out_without_padding(tp: int, units: list[int]) -> None:
    placement = place(shape(), ParallelSizes(tensor=tp), TWO_BY_EIGHT)
    assert counts([rank.mlp_units for rank in placement.ranks]) == units
    found = {remark.code: remark for remark in remarks(placement, shape())}
    assert ("mxfp4-blocks" in found) is (tp != 2)
    if tp == 4:
        assert "23 x2, 22 x2; the slowest rank does 1.02" in found["mxfp4-blocks"].message
    if tp == 8:
        assert "1.07 of an equal share (padding all to 12 would waste 6.7 %" in found["mxfp4-blocks"].message


def test_more_ranks_than_kv_heads_copy_them() -> None:
    placement = place(shape(), ParallelSizes(tensor=16), gpu_hosts(16))
    assert [rank.kv_heads for rank in placement.ranks[:4]] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert [rank.query_heads for rank in placement.ranks[:3]] == [(0, 4), (4, 8), (8, 12)]
    assert "each is held 2 times" in next(r.message for r in remarks(placement, shape()) if r.code == "kv-replicated")


# Node borders and strategies.


def test_tensor_groups_across_nodes_are_warned_about_with_the_alternative() -> None:
    placement = place(shape(), ParallelSizes(tensor=16), TWO_BY_EIGHT)
    assert placement.crossing(placement.tp_groups) == (tuple(range(16)),)
    first = remarks(placement, shape(), has_rdma=False)[0]
    assert (first.code, first.severity) == ("tp-over-slow-link", "warning")
    assert "48 all-reduces per step go over TCP" in first.message
    assert first.hint.startswith("tp 8 pp 2 ")


def test_a_pair_of_single_gpu_nodes() -> None:
    pair = gpu_hosts(1, 1)
    assert place(shape(), ParallelSizes(pipeline=2), pair).nodes == ("n0", "n1")
    assert place(shape(), ParallelSizes(tensor=2), pair).crossing(((0, 1),)) == ((0, 1),)
    with pytest.raises(PlacementError, match="tp 4 pp 1 dp 1 needs 4 GPUs, 2 nodes have 1 each") as caught:
        place(shape(), ParallelSizes(tensor=4), pair)
    assert ParallelSizes(tensor=2) in caught.value.alternatives


def test_strategies_choose_different_nodes() -> None:
    hosts = gpu_hosts(4, 4, 4)
    sizes = ParallelSizes(pipeline=2, tensor=2)
    assert place(shape(), sizes, hosts).nodes == ("n0",)
    assert place(shape(), sizes, hosts, PlacementOptions("spread")).nodes == ("n0", "n1")
    with pytest.raises(PlacementError, match="no node has room for a whole engine"):
        place(shape(), ParallelSizes(pipeline=4, tensor=2), hosts, PlacementOptions("strict-pack"))
    with pytest.raises(PlacementError, match="its 4 stages find no 4 different nodes"):
        place(shape(), ParallelSizes(pipeline=4, tensor=2), hosts, PlacementOptions("strict-spread"))
    assert place(shape(), sizes, hosts, PlacementOptions(nodes=("n2", "n0"))).nodes == ("n2",)
    with pytest.raises(PlacementError, match="no node is called n9: there are n0, n1, n2"):
        place(shape(), sizes, hosts, PlacementOptions(nodes=("n9",)))
    # One stage is nothing to spread: its tensor ranks would stay on one node, whatever was asked.
    with pytest.raises(PlacementError, match=r"its 4 tensor ranks stay together \(use pp, or spread\)") as caught:
        place(shape(), ParallelSizes(tensor=4), gpu_hosts(8, 8), PlacementOptions("strict-spread"))
    assert ParallelSizes(pipeline=2, tensor=4) in caught.value.alternatives
    assert place(shape(), ParallelSizes(tensor=4), gpu_hosts(8, 8), PlacementOptions("spread")).nodes == ("n0",)
    assert place(shape(), caught.value.alternatives[0], gpu_hosts(8, 8), PlacementOptions("strict-spread"))
    with pytest.raises(PlacementError, match="leaves 8 GPUs idle"):
        place(shape(), sizes, hosts, PlacementOptions(exact=True))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (ParallelSizes(tensor=3), "tp 3: 64 attention heads do not divide by it"),
        (ParallelSizes(pipeline=25), "pp 25: the model has 24 layers"),
        (ParallelSizes(data=3, tensor=8), "needs 24 GPUs, 2 nodes have 8 each"),
        (ParallelSizes(tensor=64, expert_parallel=True), "tp 64 with expert parallel: the model has 32 experts"),
    ],
)
def test_refusals_name_the_limit_and_what_is_near(sizes: ParallelSizes, said: str) -> None:
    with pytest.raises(PlacementError, match=said) as caught:
        place(shape(), sizes, TWO_BY_EIGHT)
    assert caught.value.alternatives
    for alternative in caught.value.alternatives:
        place(shape(), alternative, TWO_BY_EIGHT)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(PlacementError, match="tensor parallel size 0: must be at least 1"):
        ParallelSizes(tensor=0)


def test_all_sizes_of_two_nodes_with_eight_gpus() -> None:
    found = find_sizes(shape(), TWO_BY_EIGHT)
    assert len(found) == len(set(found))
    assert all(sizes.world == 16 for sizes in found)
    wanted = [(2, 1, 8), (2, 2, 4), (4, 2, 2), (2, 4, 2), (4, 4, 1), (16, 1, 1), (1, 16, 1), (1, 1, 16), (1, 2, 8)]
    assert {ParallelSizes(*sizes) for sizes in wanted} <= set(found)


# Room for what comes next.


def test_uneven_shares_of_unlike_gpus() -> None:
    asked = Shares(kv_heads=(6, 2), mlp_units=(68, 22), vocab=(150000, 51088))
    placement = place(shape(), ParallelSizes(tensor=2), gpu_hosts(2), PlacementOptions(shares=asked))
    assert [rank.query_heads for rank in placement.ranks] == [(0, 48), (48, 64)]
    assert [rank.mlp_units for rank in placement.ranks] == [(0, 68), (68, 90)]
    layers = PlacementOptions(shares=Shares(layers=(14, 10)))
    assert [r.layers for r in place(shape(), ParallelSizes(pipeline=2), gpu_hosts(2), layers).ranks] == [
        (0, 14),
        (14, 24),
    ]
    with pytest.raises(PlacementError, match="not 2 counts that add up to 90"):
        place(shape(), ParallelSizes(tensor=2), gpu_hosts(2), PlacementOptions(shares=Shares(mlp_units=(68, 20))))
    with pytest.raises(PlacementError, match="leaves a stage without a layer"):
        place(shape(), ParallelSizes(pipeline=2), gpu_hosts(2), PlacementOptions(shares=Shares(layers=(24, 0))))


def test_a_gpu_with_attention_and_a_cpu_with_experts_serve_one_model() -> None:
    shares = Shares(kv_heads=(8, 0), experts=(20, 12), vocab=(201088, 0))
    placement = place(
        shape(),
        ParallelSizes(tensor=2, expert_parallel=True),
        gpu_hosts(1, cpus=1),
        PlacementOptions(cpu_ranks=1, shares=shares),
    )
    gpu, cpu = placement.ranks
    assert (gpu.device, cpu.device, cpu.numa_node, cpu.cores) == ("cuda:0", "cpu:0", 0, (0,))
    assert cpu.kv_heads == (8, 8)
    assert cpu.experts == (20, 32)
    assert cpu.vocab[0] == cpu.vocab[1]
    assert remarks(placement, shape())[0].code == "cpu-in-tensor-group"


def test_cpu_stages_come_first_so_that_the_head_stays_on_a_gpu() -> None:
    placement = place(
        shape(), ParallelSizes(pipeline=3), gpu_hosts(2, cpus=2), PlacementOptions(cpu_ranks=1, strategy="pack")
    )
    assert [rank.device for rank in placement.ranks] == ["cpu:0", "cuda:0", "cuda:1"]
    assert placement.ranks[0].has_embedding
    with pytest.raises(PlacementError, match="one must stay on a GPU"):
        place(shape(), ParallelSizes(pipeline=2), gpu_hosts(2, cpus=2), PlacementOptions(cpu_ranks=2))
    with pytest.raises(PlacementError, match="a multiple of 2"):
        place(shape(), ParallelSizes(pipeline=2, tensor=2), gpu_hosts(4, cpus=2), PlacementOptions(cpu_ranks=1))


def test_kv_moves_between_engines_split_differently() -> None:
    prefill = place(shape(), ParallelSizes(tensor=2), (HostSpec("a", (Device("cuda:0"), Device("cuda:1"))),))
    base = place(shape(), ParallelSizes(data=2, tensor=2), gpu_hosts(4))
    linked = replace(base, kv_links=(KVLink(0, 1),))
    assert [(route.source, route.target, route.kv_heads) for route in linked.kv_routes()] == [
        (0, 2, (0, 4)),
        (1, 3, (4, 8)),
    ]
    assert prefill.kv_routes() == ()
    assert json.loads(linked.to_json())["kv_links"] == [{"source_dp": 0, "target_dp": 1}]
    assert Placement.from_json(linked.to_json()) == linked
    with pytest.raises(PlacementError, match="no such engine"):
        replace(base, kv_links=(KVLink(0, 2),))


def test_experts_may_be_copied() -> None:
    base = place(shape(), ParallelSizes(tensor=4, expert_parallel=True), gpu_hosts(4))
    busy = replace(base, ranks=(*base.ranks[:3], replace(base.ranks[3], copied_experts=(0, 9))))
    assert Placement.from_json(busy.to_json()).ranks[3].copied_experts == (0, 9)


# The value itself.


def test_ranks_out_of_order_are_no_placement() -> None:
    base = place(shape(), ParallelSizes(tensor=2), gpu_hosts(2))
    with pytest.raises(PlacementError, match="stands at place"):
        replace(base, ranks=base.ranks[::-1])
    with pytest.raises(PlacementError, match="1 ranks where tp 2 pp 1 dp 1 makes 2"):
        replace(base, ranks=base.ranks[:1])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"ranks": [{}], "kv_links": []}', "[" * 100000])
def test_what_is_no_placement_is_refused(text: str) -> None:
    with pytest.raises(PlacementError, match="not a placement"):
        Placement.from_json(text)


def test_one_rank_owns_everything() -> None:
    model = shape()
    placement = single_rank(
        node="here",
        device="cpu",
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        intermediate_size=model.intermediate_size,
        num_experts=model.num_experts,
        num_query_heads=model.num_attention_heads,
        vocab_size=model.vocab_size,
    )
    assert placement.is_single_rank
    host = HostSpec("here", (Device("cpu"),))
    assert place(model, ParallelSizes(), (host,)) == placement
    assert remarks(placement, model) == ()


# Shares as shapes.


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (1, 1, 2), (1, 2, 4), (1, 3, 8), (1, 24, 1)], ids=lambda s: f"pp{s[1]}tp{s[2]}"
)
@pytest.mark.parametrize("name", ["gpt-oss-20b", "gpt-oss-120b"])
def test_the_shares_of_all_ranks_are_the_model(name: str, sizes: tuple[int, int, int], tie: bool) -> None:
    model = replace(shape(name), tie_word_embeddings=tie)
    placement = place(model, ParallelSizes(*sizes), gpu_hosts(24))
    parts = [shard(model, rank) for rank in placement.ranks]
    tp = sizes[2]
    assert sum(part.num_layers for part in parts) == model.num_layers * tp
    assert sum(part.num_layers * part.num_kv_heads for part in parts) == model.num_layers * model.num_kv_heads
    assert sum(part.num_layers * part.intermediate_size for part in parts) == model.num_layers * model.intermediate_size
    assert sum(part.vocab_size for part in parts) == model.vocab_size
    windows = [window for pp in range(sizes[1]) for window in parts[pp * tp].layer_windows]
    assert tuple(windows) == model.layer_windows
    held = sum(embedding_rows(model, rank) for rank in placement.ranks)
    assert held == (0 if tie and placement.is_single_rank else model.vocab_size * tp)


def test_a_width_that_32_does_not_divide_ends_in_a_short_unit() -> None:
    model = replace(shape(), intermediate_size=100)
    placement = place(model, ParallelSizes(tensor=4), gpu_hosts(4))
    assert [shard(model, rank).intermediate_size for rank in placement.ranks] == [32, 32, 32, 4]
