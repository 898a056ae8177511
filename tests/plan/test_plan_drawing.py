"""Drawings: reviewed snapshots of the seven topologies at 80 columns, bars, SVG that is well-formed and safe."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_support import gpu_hosts, shape

from engine.config import EngineConfig
from engine.placement import (
    Device,
    HostSpec,
    KVLink,
    ParallelSizes,
    PlacementOptions,
    Shares,
    place,
)
from launcher.commands.plan import placement_table
from launcher.console import Console
from launcher.plan.inventory import Nic, RdmaPort, declared_inventories
from launcher.plan.links import RDMA, TCP, between_link
from launcher.plan.picture import Picture, alike, device_span, nics_of, picture_of, rank_span
from launcher.plan.rank_memory import RankMemory, Sizing, report_memory
from launcher.plan.splits import CASES, REFERENCE
from launcher.plan.svg import svg_text
from launcher.plan.topology import bar, memory_lines, plain, tokens, topology_lines
from launcher.registry.cluster import Cluster, Node

GOLDEN = Path(__file__).with_name("golden_topologies.txt")
GIB = 1 << 30
HARDWARE = declared_inventories(REFERENCE)
HOSTS = tuple(HostSpec(name, tuple(Device(f"cuda:{i}") for i in range(8))) for name in HARDWARE)
ROLES = {node.name: (node.role, node.ip) for node in REFERENCE.nodes}


def picture(sizes: ParallelSizes, *, has_memory: bool = False, options: PlacementOptions | None = None) -> Picture:
    model = shape("gpt-oss-120b")
    placement = place(model, sizes, HOSTS, options)
    memory = report_memory(placement, Sizing(EngineConfig("m", device="cuda:0"), model, HARDWARE)).ranks
    return picture_of(
        "gpt-oss-120b",
        placement,
        model,
        HARDWARE,
        between=between_link(REFERENCE, HARDWARE),
        roles=ROLES,
        memory=memory if has_memory else (),
    )


def drawn() -> Iterator[str]:
    for case in CASES:
        yield f"== {case.number}. {case.title}: {case.sizes}"
        yield from topology_lines(picture(case.sizes))
    yield "== across nodes"
    yield from topology_lines(picture(ParallelSizes(tensor=16)))
    yield "== idle devices"
    yield from topology_lines(picture(ParallelSizes(pipeline=2, tensor=2), options=PlacementOptions("spread")))
    yield "== one rank"
    yield from topology_lines(picture(ParallelSizes()))


def test_the_drawings_are_as_reviewed() -> None:
    text = "\n".join(drawn()) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.number))
def test_every_line_fits_80_columns_and_every_rank_is_drawn_once(case: object) -> None:
    shown = picture(case.sizes, has_memory=True)  # type: ignore[attr-defined]
    lines = [*topology_lines(shown), *memory_lines(shown)]
    assert all(len(line) <= 80 for line in lines)
    text = "\n".join(topology_lines(shown))
    assert [text.count(f"[{rank}]") for rank in range(16)] == [1] * 16
    assert plain("\n".join(lines)).isascii()
    assert all(len(plain(line)) == len(line) for line in lines)


def test_placements_of_what_comes_next_are_drawn() -> None:
    model = shape()
    hosts = gpu_hosts(1, cpus=1)
    cluster = Cluster("one", (Node("n0", "head", "127.0.0.1", gpus=1),), platform="hopper")
    hardware = declared_inventories(cluster)
    shares = Shares(kv_heads=(8, 0), experts=(20, 12), vocab=(201088, 0))
    mixed = place(
        model, ParallelSizes(tensor=2, expert_parallel=True), hosts, PlacementOptions(cpu_ranks=1, shares=shares)
    )
    copied = replace(mixed, ranks=(replace(mixed.ranks[0], copied_experts=(20, 21)), mixed.ranks[1]))
    memory = report_memory(copied, Sizing(EngineConfig("m", device="cuda:0"), model, hardware)).ranks
    shown = picture_of("mixed", copied, model, hardware, memory=memory)
    text = "\n".join([*topology_lines(shown), *memory_lines(shown)])
    assert "[0]═[1]  cuda:0, cpu:0" in text
    assert memory[1].num_blocks == 0, "no KV head, no cache"
    assert memory[1].weight_bytes < memory[0].weight_bytes
    assert "no KV cache" in svg_text(shown)
    uneven = place(model, ParallelSizes(pipeline=2), gpu_hosts(2), PlacementOptions(shares=Shares(layers=(14, 10))))
    two = {"n0": replace(hardware["n0"], gpus=hardware["n0"].gpus * 2)}
    assert "layers 0-13" in "\n".join(topology_lines(picture_of("x", uneven, model, two)))


def words_of(shown: Picture) -> tuple[str, str]:
    """The terminal's drawing and the placement table, each as one text."""
    out = io.StringIO()
    placement_table(Console(is_plain=True, stdout=out), shown)
    lines = list(topology_lines(shown))
    assert all(len(line) <= 80 for line in lines)
    return "\n".join(lines), out.getvalue()


def test_copied_experts_are_drawn_and_stand_in_the_table() -> None:
    model = shape()
    hardware = {"n0": replace(HARDWARE["node-0"], gpus=HARDWARE["node-0"].gpus[:2])}
    base = place(model, ParallelSizes(tensor=2, expert_parallel=True), gpu_hosts(2))
    copied = replace(base, ranks=(replace(base.ranks[0], copied_experts=(20, 21, 30)), base.ranks[1]))
    drawn, table = words_of(picture_of("x", copied, model, hardware))
    assert "+ [0] holds copies of experts 20-21, 30" in drawn
    assert "0-15 + copies of 20-21, 30" in table
    plain_drawn, plain_table = words_of(picture_of("x", base, model, hardware))
    assert "cop" not in plain_drawn + plain_table


def test_kv_that_moves_between_engines_is_drawn_and_stands_in_the_table() -> None:
    model = shape()
    linked = replace(place(model, ParallelSizes(data=2, tensor=2), gpu_hosts(2, 2)), kv_links=(KVLink(0, 1),))
    two = {name: replace(HARDWARE["node-0"], gpus=HARDWARE["node-0"].gpus[:2]) for name in ("n0", "n1")}
    shown = picture_of("x", linked, model, two, between=RDMA)
    (flow,) = shown.kv_flows()
    assert flow.bytes_per_token == 24 * 8 * 64 * 2 * 2, "keys and values of all layers, in bfloat16"
    drawn, table = words_of(shown)
    assert "⇒ KV blocks to engine 1: 49.15 kB per token over RDMA" in drawn
    assert "[0]→[2] layers 0-23 KV heads 0-3, [1]→[3] layers 0-23 KV heads 4-7" in drawn
    assert "▼ KV blocks of engine 0 to engine 1: 49.15 kB per token over RDMA" in drawn
    assert "no tensor crosses" not in drawn
    moves = [line.split() for line in table.partition("KV blocks move between engines\n")[2].splitlines()]
    assert moves[1:] == [
        ["0", "to", "1", "0", "to", "2", "0-23", "0-3", "RDMA", "49.15", "kB"],
        ["0", "to", "1", "1", "to", "3", "0-23", "4-7", "RDMA", "49.15", "kB"],
    ]


def test_kv_of_engines_on_one_node_stays_inside_it() -> None:
    model = shape()
    linked = replace(place(model, ParallelSizes(data=2), gpu_hosts(2)), kv_links=(KVLink(1, 0),))
    hardware = {"n0": replace(HARDWARE["node-0"], gpus=HARDWARE["node-0"].gpus[:2])}
    drawn, _ = words_of(picture_of("x", linked, model, hardware))
    assert "⇒ KV blocks to engine 0: 49.15 kB per token over NVLink" in drawn
    assert "[1]→[0]" in drawn


def test_the_nic_of_every_rank_stands_in_the_table() -> None:
    model = shape()
    placement = place(model, ParallelSizes(tensor=2), gpu_hosts(1, 1))
    placement = replace(placement, ranks=tuple(replace(rank, numa_node=1) for rank in placement.ranks))
    first = replace(HARDWARE["node-0"], gpus=HARDWARE["node-0"].gpus[:1], rdma_ports=(), nics=())
    ports = tuple(RdmaPort(f"mlx5_{numa}", 1, "ACTIVE", numa_node=numa) for numa in (0, 1))
    down = RdmaPort("mlx5_9", 1, "DOWN", numa_node=1)
    ends = (
        (replace(first, rdma_ports=(*ports, down)), ("mlx5_1",)),
        (replace(first, rdma_ports=tuple(replace(port, numa_node=None) for port in ports)), ("mlx5_0", "mlx5_1")),
        (replace(first, nics=(Nic("eth1", "up", addresses=("10.0.0.1",)), Nic("eth2", "up"))), ("eth1",)),
    )
    for inventory, expected in ends:
        assert nics_of(inventory, placement.ranks[0]) == expected
    _, table = words_of(picture_of("x", placement, model, {"n0": ends[0][0], "n1": ends[2][0]}))
    _, head, *rows = [line.split() for line in table.splitlines()]
    assert head[-1] == "NIC"
    assert [row[-1] for row in rows] == ["mlx5_1", "eth1"]
    _, table = words_of(picture_of("x", placement, model, {"n0": first, "n1": first}))
    assert "NIC" not in table


# Bars.


@given(
    budget=st.integers(0, 1 << 40),
    parts=st.tuples(*[st.integers(0, 1 << 38)] * 4),
    width=st.integers(20, 70),
)
def test_a_bar_has_its_width_and_every_term(budget: int, parts: tuple[int, ...], width: int) -> None:
    memory = RankMemory(0, "cuda:0", budget, *parts, num_blocks=1, kv_tokens=1, max_full_requests=1.0)
    cells = bar(memory, width)
    assert len(cells) == width
    if memory.required_bytes > max(budget, 1) * 1.1:
        assert "!" in cells
    if memory.required_bytes <= budget:
        assert "!" not in cells
        if all(part > budget / width for part in parts):
            assert set("█▓▒░") <= set(cells)


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0"), (9999, "9999"), (10_000, "10k"), (578_400, "578k"), (1_250_000, "1.2M")]
)
def test_counts_of_tokens(count: int, shown: str) -> None:
    assert tokens(count) == shown


def test_spans() -> None:
    assert device_span(["cuda:0", "cuda:1", "cuda:3", "cpu:0", "cpu"]) == "cuda:0-1, cuda:3, cpu:0, cpu"
    assert rank_span([0, 1, 2, 7]) == "0-2, 7"
    assert device_span([]) == ""


def test_ranks_that_are_alike_share_a_bar() -> None:
    shown = picture(ParallelSizes(data=2, tensor=8), has_memory=True)
    groups = alike(shown.memory, range(8))
    assert [members for members, _ in groups] == [[0, 1], [2, 3, 4, 5, 6, 7]], "12 units, then 11"


# SVG.


@pytest.mark.parametrize("sizes", [case.sizes for case in CASES] + [ParallelSizes(tensor=16), ParallelSizes()], ids=str)
def test_svg_is_well_formed_deterministic_and_complete(sizes: ParallelSizes) -> None:
    shown = picture(sizes, has_memory=True)
    text = svg_text(shown)
    assert text == svg_text(shown)
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    words = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert [words.count(str(rank)) for rank in range(sizes.world)] == [1] * sizes.world
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for element in root.iter():
        if element.tag.endswith("rect"):
            assert float(element.attrib.get("x", 0)) + float(element.attrib["width"]) <= width + 0.2
            assert float(element.attrib.get("y", 0)) + float(element.attrib["height"]) <= height + 0.2
    assert "<script" not in text
    assert "href" not in text


def joined(sizes: ParallelSizes) -> Picture:
    """Two nodes with two GPUs each, KV going from the first engine to the second, copied experts."""
    base = place(shape(), sizes, gpu_hosts(2, 2))
    copies = ((20, 21), (1, 5, 9, 14), *[()] * (base.world_size - 2))
    ranks = tuple(replace(rank, copied_experts=held) for rank, held in zip(base.ranks, copies, strict=True))
    linked = replace(base, ranks=ranks, kv_links=(KVLink(0, 1),))
    two = {name: replace(HARDWARE["node-0"], gpus=HARDWARE["node-0"].gpus[:2]) for name in ("n0", "n1")}
    return picture_of("joined", linked, shape(), two, between=RDMA)


def test_copied_experts_and_moving_kv_are_in_the_svg() -> None:
    text = svg_text(joined(ParallelSizes(data=2, tensor=2)))
    words = [element.text for element in ElementTree.fromstring(text).iter() if element.tag.endswith("text")]
    assert "KV engine 0 → 1: 49.15 kB per token, RDMA" in words
    assert 'class="kv" marker-end' in text
    assert "+ experts 20-21" in words
    assert "+ 4 experts" in words
    assert "<title>rank 1 holds copies of experts 1, 5, 9, 14</title>" in text
    assert "KV engine 0 → 1: 49.15 kB per token, NVLink" in svg_text(joined(ParallelSizes(data=4)))


LINES = {"hop", "cross", "kv"}
CROSSINGS = {
    **{str(case.number): picture(case.sizes, has_memory=True) for case in CASES},
    "across": picture(ParallelSizes(tensor=16), has_memory=True),
    "spread": picture(ParallelSizes(pipeline=2, tensor=2, data=4), options=PlacementOptions("spread")),
    "backwards": picture(ParallelSizes(pipeline=2, tensor=8), options=PlacementOptions(nodes=("node-1", "node-0"))),
    "KV between nodes": joined(ParallelSizes(data=2, tensor=2)),
    "KV inside a node": joined(ParallelSizes(data=4)),
    "small": picture(ParallelSizes()),
}


@pytest.mark.parametrize("name", CROSSINGS)
def test_no_line_crosses_a_word_and_every_word_is_inside(name: str) -> None:
    root = ElementTree.fromstring(svg_text(CROSSINGS[name]))
    drawn = [(element.tag.rpartition("}")[2], element) for element in root]
    lines = [at for at, (tag, element) in enumerate(drawn) if tag == "path" and element.get("class") in LINES]
    cards = [at for at, (tag, element) in enumerate(drawn) if tag == "rect" and element.get("style")]
    assert not lines or max(lines) < min(cards), "cards cover the lines that pass behind them"
    boxes = {}
    for tag, element in drawn:
        if tag == "text":
            x, y = float(element.attrib["x"]), float(element.attrib["y"])
            size = {"title": 10.4, "name": 8.0, "tiny": 5.6}.get(element.attrib["class"].split()[0], 6.2)
            wide = size * len(element.text or "")
            x -= {"end": wide, "middle": wide / 2}.get(element.get("text-anchor", ""), 0)
            assert x >= 0
            assert x + wide <= float(root.attrib["width"]), element.text
            if element.attrib["class"].split()[0] in ("name", "soft", "warn", "title"):
                boxes[element.text, x, y] = (x, y - 9, x + wide, y + 2)
    for at in lines:
        points = walked(drawn[at][1].attrib["d"])
        for (x, y), (to_x, to_y) in zip(points, points[1:], strict=False):
            left, right, top, low = min(x, to_x), max(x, to_x), min(y, to_y), max(y, to_y)
            for key, (begin, upper, end, lower) in boxes.items():
                assert right < begin or left > end or low < upper or top > lower, (name, key, (x, y), (to_x, to_y))


def walked(path: str) -> list[tuple[float, float]]:
    """The corners of a path of `M`, `H` and `V`."""
    points: list[tuple[float, float]] = []
    for step, numbers in re.findall(r"([MHV])([-\d. ]+)", path):
        values = [float(number) for number in numbers.split()]
        x, y = points[-1] if points else (0.0, 0.0)
        points.append({"M": tuple(values), "H": (values[0], y), "V": (x, values[0])}[step])  # type: ignore[arg-type]
    assert "".join(re.findall("[A-Z]", path)) in ("MH", "MVHV")
    return points


def test_a_drawing_is_as_wide_as_what_it_shows() -> None:
    widths = [
        float(ElementTree.fromstring(svg_text(CROSSINGS[name])).attrib["width"]) for name in ("small", "7", "across")
    ]
    assert widths == sorted(widths)
    assert widths[0] < 700
    assert widths[-1] > 1150


def test_what_crosses_is_said_in_both_drawings() -> None:
    across = picture(ParallelSizes(tensor=16))
    assert "72 all-reduces a step over RDMA" in svg_text(across)
    assert "72 all-reduces a step cross here over RDMA" in "\n".join(topology_lines(across))
    deep = picture(ParallelSizes(pipeline=16))
    assert "stage 7 → 8: 5.76 kB per token, RDMA" in svg_text(deep)
    assert "stage 7 to 8: 5.76 kB per token over RDMA" in "\n".join(topology_lines(deep))
    assert "no tensor crosses" in svg_text(picture(ParallelSizes(data=2, tensor=8)))


@given(st.text(max_size=60))
def test_no_name_can_break_the_drawing(name: str) -> None:
    shown = picture(ParallelSizes())
    node = replace(shown.nodes[0], name=name, hardware=name, address=name)
    ranks = (replace(shown.placement.ranks[0], node=name),)
    hostile = replace(shown, title=name, nodes=(node,), placement=replace(shown.placement, ranks=ranks))
    ElementTree.fromstring(svg_text(hostile))
    assert all(len(line) <= 80 for line in topology_lines(hostile))


def test_links_are_chosen_by_what_is_known() -> None:
    assert between_link(REFERENCE, HARDWARE) == RDMA
    assert between_link(None, HARDWARE) == TCP
    first = HARDWARE["node-0"]
    slow = replace(first, rdma_ports=(replace(_port(), rate_gbps=100.0),))
    fast = replace(first, rdma_ports=(replace(_port(), rate_gbps=400.0),))
    chosen = between_link(REFERENCE, {"a": slow, "b": fast})
    assert chosen.bytes_per_second == pytest.approx(11e9)


def _port() -> RdmaPort:
    return RdmaPort("mlx5_0", 1, "ACTIVE")
