"""A placement drawn for a terminal: a box per node, a line per stage, arrows where hidden states travel.

Pure text of at most `width` columns; `plain` turns box characters into ASCII for terminals that lack them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import wrap

from engine.placement import KVRoute, RankSpec
from launcher.plan.picture import Hop, KVFlow, Picture, PictureNode, alike, device_span, rank_span, span
from launcher.plan.rank_memory import RankMemory
from launcher.sizes import GIB, counted

WIDTH = 80
_ASCII = str.maketrans("─│╭╮╰╯═║▼┊█▓▒░↓→⇒·…", "-|++++=|v:#%+.v>>._")
BAR_PARTS = (("█", "stored_bytes"), ("▓", "activation_bytes"), ("▒", "runtime_bytes"), ("░", "kv_bytes"))
LEGEND = "█ weights  ▓ activations  ▒ runtime  ░ KV cache  · free  ! too much"


def plain(line: str) -> str:
    """Write a drawn line in ASCII."""
    return line.translate(_ASCII)


def topology_lines(picture: Picture, width: int = WIDTH) -> Iterator[str]:
    """Draw nodes, engines, stages, tensor groups, and what crosses borders."""
    hops = picture.hops()
    for number, node in enumerate(picture.nodes):
        if number:
            yield from _between(picture, picture.nodes[number - 1], node, hops)
        yield from _node(picture, node, hops, width)


def _node(picture: Picture, node: PictureNode, hops: tuple[Hop, ...], width: int) -> Iterator[str]:
    words = [word for word in (node.name, node.role, node.address) if word]
    title = _cut(f"─ {' ─ '.join(words)} ", width - 4)
    hardware = _cut(f" {node.hardware} ", max(0, width - 5 - len(title)))
    yield "╭" + title + "─" * (width - 3 - len(title) - len(hardware)) + hardware + "─╮"
    for line in _inside(picture, node, hops, width - 4):
        yield f"│ {_cut(line, width - 4):<{width - 4}} │"
    yield "╰" + "─" * (width - 2) + "╯"


def _inside(picture: Picture, node: PictureNode, hops: tuple[Hop, ...], width: int) -> Iterator[str]:
    placement = picture.placement
    engines = sorted({rank.dp_rank for rank in node.ranks})
    lone = [engine for engine in engines if sum(rank.dp_rank == engine for rank in node.ranks) == 1]
    if len(lone) == len(engines) > 1 and placement.sizes.engine_ranks == 1:
        # Engines of one rank each: one line for all of them.
        ranks = [rank.rank for rank in node.ranks]
        devices = device_span([rank.device for rank in node.ranks])
        yield f"{len(engines)} engines of one rank each: ranks {rank_span(ranks)} on {devices}"
        yield "".join(f"[{rank}]" for rank in ranks)
        yield from _copies(node.ranks, width)
        for engine in engines:
            yield from _kv(picture, engine, width)
    else:
        for engine in engines:
            yield from _engine(picture, node, engine, hops)
            yield from _copies([rank for rank in node.ranks if rank.dp_rank == engine], width)
            if picture.placement.engine(engine)[-1] in node.ranks:
                yield from _kv(picture, engine, width)
    if not node.ranks:
        yield "no ranks here"
    if node.idle:
        yield f"idle: {device_span(node.idle)}"


def _engine(picture: Picture, node: PictureNode, engine: int, hops: tuple[Hop, ...]) -> Iterator[str]:
    placement = picture.placement
    yield f"engine {engine}" if placement.data_parallel_size > 1 else "engine"
    stages = sorted({rank.pp_rank for rank in node.ranks if rank.dp_rank == engine})
    if placement.tensor_parallel_size == 1 and len(stages) > 2:
        yield from _chain(picture, node, engine)
        return
    for stage in stages:
        ranks = [rank for rank in placement.stage(engine, stage) if rank.node == node.name]
        whole = placement.stage(engine, stage)
        first = ranks[0]
        chain = "═".join(f"[{rank.rank}]" for rank in ranks)
        if len(ranks) < len(whole):
            chain = ("" if ranks[0] is whole[0] else "═") + chain + ("" if ranks[-1] is whole[-1] else "═")
        layers = f"layers {first.layers[0]}-{first.layers[1] - 1}"
        devices = device_span([rank.device for rank in ranks])
        yield f"  stage {stage}  {layers:<13} {chain}  {devices}"
        if len(whole) > 1:
            link = picture.group_link([rank.rank for rank in whole])
            yield f"     ═ 2 sums a layer over {link.name}, {2 * first.num_layers} a step"
        inner = [h for h in hops if h.engine == engine and h.stage == stage and h.source == h.target == node.name]
        if inner and stage + 1 in stages:
            yield f"     ↓ {picture.bytes_per_token / 1000:.2f} kB per token over {inner[0].link.name}"


def _copies(ranks: Sequence[RankSpec], width: int) -> Iterator[str]:
    """Say which experts these ranks hold beside those they own."""
    for rank in ranks:
        if rank.copied_experts:
            words = f"+ [{rank.rank}] holds copies of experts {rank_span(rank.copied_experts)}"
            yield from wrap(words, width, initial_indent="     ", subsequent_indent="       ")


def _kv(picture: Picture, engine: int, width: int) -> Iterator[str]:
    """Say where this engine's finished KV blocks go, rank by rank."""
    for flow in picture.kv_flows():
        if flow.source == engine:
            yield f"     ⇒ KV blocks to {_kv_words(flow)}"
            text = ", ".join(_route(route) for route in flow.routes) or "no rank of the one owns what the other needs"
            yield from wrap(text, width, initial_indent="       ", subsequent_indent="       ")


def _kv_words(flow: KVFlow) -> str:
    return f"engine {flow.target}: {flow.bytes_per_token / 1000:.2f} kB per token over {flow.link.name}"


def _route(route: KVRoute) -> str:
    return f"[{route.source}]→[{route.target}] layers {span(route.layers)} KV heads {span(route.kv_heads)}"


def _chain(picture: Picture, node: PictureNode, engine: int) -> Iterator[str]:
    """Draw stages of one rank each as a line of its own: there are many of them, and little to say of each."""
    ranks = [rank for rank in node.ranks if rank.dp_rank == engine]
    size = picture.bytes_per_token / 1000
    for first in range(0, len(ranks), 8):
        part = ranks[first : first + 8]
        follows = "→" if part[-1] is not ranks[-1] else ""
        chain = "→".join(f"[{rank.rank}]" for rank in part) + follows
        yield f"  {chain}  {device_span([rank.device for rank in part])}"
        spans = [f"{rank.layers[0]}-{rank.layers[1] - 1}" for rank in part]
        yield f"     layers {', '.join(spans)}"
    yield f"     → {size:.2f} kB per token over {node.inside.name}"


def _between(picture: Picture, upper: PictureNode, lower: PictureNode, hops: tuple[Hop, ...]) -> Iterator[str]:
    names = {upper.name, lower.name}
    crossing = [hop for hop in hops if {hop.source, hop.target} == names]
    sums = [
        group
        for group in picture.placement.crossing(picture.placement.tp_groups)
        if names <= {picture.placement.ranks[rank].node for rank in group}
    ]
    link = picture.between.name
    lines: list[str] = []
    if sums:
        count = 2 * picture.placement.ranks[sums[0][0]].num_layers
        lines.append(f"║ {count} all-reduces a step cross here over {link}")
    for hop in crossing[:4]:
        who = f"engine {hop.engine}, " if picture.placement.data_parallel_size > 1 else ""
        size = picture.bytes_per_token / 1000
        lines.append(f"▼ {who}stage {hop.stage} to {hop.stage + 1}: {size:.2f} kB per token over {link}")
    if len(crossing) > 4:
        lines.append(f"▼ and {len(crossing) - 4} more stage borders")
    for flow in picture.kv_flows():
        if len(flow.nodes) > 1 and names <= set(flow.nodes):
            lines.append(f"▼ KV blocks of engine {flow.source} to {_kv_words(flow)}")
    if not lines:
        lines.append("┊ no tensor crosses here, only requests and answers")
    for line in lines:
        yield "        " + line


def memory_lines(picture: Picture, width: int = WIDTH) -> Iterator[str]:
    """Draw the memory of every rank (those alike together) and of every node."""
    if not picture.memory:
        return
    yield LEGEND
    for node in picture.nodes:
        ranks = [rank.rank for rank in node.ranks]
        groups = alike(picture.memory, ranks)
        if not groups:
            continue
        total = sum(picture.memory[rank].required_bytes for rank in ranks if rank in picture.memory)
        budget = sum(picture.memory[rank].budget_bytes for rank in ranks if rank in picture.memory)
        yield f"{node.name}: {total / GIB:.1f} of {budget / GIB:.1f} GiB in {counted(len(ranks), 'rank')}"
        labels = [f"{'rank' if len(members) == 1 else 'ranks'} {rank_span(members)}" for members, _ in groups]
        for label, (_, memory) in zip(labels, groups, strict=True):
            yield from _rank_bar(f"  {label:<{max(map(len, labels))}} ", memory, width)


def _rank_bar(label: str, memory: RankMemory, width: int) -> Iterator[str]:
    tail = f" {memory.budget_bytes / GIB:.1f} GiB"
    yield label + "[" + bar(memory, max(20, width - len(label) - len(tail) - 2)) + "]" + tail
    parts = (
        ("weights", memory.weight_bytes),
        *((("second layouts", memory.held_bytes),) if memory.held_bytes else ()),
        ("activations", memory.activation_bytes),
        ("runtime", memory.runtime_bytes),
    )
    pad = "    "
    yield pad + "  ".join(f"{name} {amount / GIB:.2f}" for name, amount in parts) + " GiB"
    if memory.num_blocks:
        yield (
            f"{pad}KV {memory.kv_bytes / GIB:.2f} GiB = {tokens(memory.kv_tokens)} tokens"
            f" = {memory.max_full_requests:.1f} requests of full length"
        )
        if memory.is_capped:
            yield f"{pad}{memory.asked_requests} asked (max-num-seqs), room for {memory.room_requests}"
    if memory.problem:
        yield from (f"{pad}{line}" for line in wrap(f"DOES NOT FIT: {memory.problem}", width - len(pad)))


def tokens(count: int) -> str:
    """Write a count of tokens for people: `578k`, `1.2M`."""
    if count >= 1_000_000:
        return f"{count / 1e6:.1f}M"
    return f"{count / 1e3:.0f}k" if count >= 10_000 else str(count)


def bar(memory: RankMemory, width: int) -> str:
    """Draw one rank's budget in `width` cells; what is above it becomes `!`."""
    scale = max(memory.budget_bytes, memory.required_bytes, 1)
    cells, done = "", 0
    for mark, name in BAR_PARTS:
        amount = getattr(memory, name)
        done += amount
        # Something that exists is at least one cell, and rounding never adds up to more than the whole.
        cells += mark * max(round(done / scale * width) - len(cells), 1 if amount else 0)
    cells = cells[:width]
    limit = round(memory.budget_bytes / scale * width)
    if memory.required_bytes > memory.budget_bytes and len(cells) > limit:
        cells = cells[:limit] + "!" * (len(cells) - limit)
    return cells.ljust(width, "·")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"
