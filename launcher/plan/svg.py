"""A placement drawn as SVG: panels for nodes, tiles for ranks with their memory, arrows where hidden states travel.

Pure and deterministic: the same picture gives the same bytes. Every text is escaped; there is no script, no font and no
image from elsewhere. Colours follow the reader's light or dark theme.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from engine.placement import RankSpec
from launcher.plan.picture import Hop, Picture, PictureNode, device_span
from launcher.plan.topology import tokens
from launcher.sizes import GIB

WIDTH = 1240
MARGIN = 28
PAD = 18
TILE = (104, 74)
GAP = 10
GROUP_HEAD = 26
SUMS_LINE = 14
GROUP_PAD = 10
ROW_GAP = 34
PANEL_HEAD = 46
PANEL_GAP = 64
HUES = (212, 150, 28, 280, 340, 90, 190, 50)
BAR = (("stored_bytes", "w"), ("activation_bytes", "a"), ("runtime_bytes", "r"), ("kv_bytes", "k"))

_STYLE = """
svg{--bg:#fbfcfe;--panel:#fff;--line:#cfd8e3;--text:#18222f;--soft:#5b6b7f;--tile:#fff;--warn:#a15c00;--tint:93%;--edge:46%;--free:#e8edf3;
font-family:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
@media(prefers-color-scheme:dark){svg{--bg:#0f141b;--panel:#161d27;--line:#2c3848;--text:#e6edf5;--soft:#93a4b8;--tile:#1c2531;--warn:#f0b35a;--tint:17%;--edge:62%;--free:#2a3544}}
.bg{fill:var(--bg)}.panel{fill:var(--panel);stroke:var(--line);stroke-width:1.5}.title{font-size:20px;font-weight:650;fill:var(--text)}
.halo,.name{paint-order:stroke;stroke:var(--panel);stroke-width:5px}.name{font-size:15px;font-weight:650;fill:var(--text)}.soft{font-size:12px;fill:var(--soft)}.tiny{font-size:10.5px;fill:var(--soft)}
.rank{font-size:15px;font-weight:650;fill:var(--text)}.tile{fill:var(--tile);stroke:var(--line)}.warn{font-size:12px;fill:var(--warn)}
.hop{fill:none;stroke:var(--soft);stroke-width:2}.cross{fill:none;stroke:#d9480f;stroke-width:2.5;stroke-dasharray:7 5}
.sum{stroke-width:3;fill:none}.w{fill:#3b7dd8}.a{fill:#e0a030}.r{fill:#9aa7b5}.k{fill:#35a37c}.free{fill:var(--free)}.over{fill:#d6336c}
""".strip()


@dataclass(frozen=True, slots=True)
class _Group:
    """The ranks of one stage on one node, and where they stand."""

    engine: int
    stage: int
    ranks: tuple[RankSpec, ...]
    x: float
    y: float
    width: float

    @property
    def height(self) -> float:
        return self.head + TILE[1] + GROUP_PAD

    @property
    def head(self) -> float:
        """Room for a line of words, and for a second one about what several ranks sum."""
        return GROUP_HEAD + (SUMS_LINE if len(self.ranks) > 1 else 0)

    @property
    def middle(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + self.height / 2


@dataclass(frozen=True, slots=True)
class _Panel:
    node: PictureNode
    y: float
    height: float
    groups: tuple[_Group, ...]


def svg_text(picture: Picture) -> str:
    """Draw a picture as one SVG document."""
    panels = _layout(picture)
    bottom = panels[-1].y + panels[-1].height if panels else 90
    notes = _notes(picture)
    height = bottom + 64 + 20 * len(notes)
    placement = picture.placement
    subtitle = f"{placement.sizes} · {placement.world_size} rank{'s' * (placement.world_size != 1)}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {_n(height)}" width="{WIDTH}" '
        f'height="{_n(height)}" role="img" aria-label="{_attribute(picture.title)}">',
        f"<title>{escape(_clean(picture.title))}</title>",
        f"<style>{_STYLE}</style>",
        '<defs><marker id="arrow" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path d="M0 0 10 5 0 10z" fill="context-stroke"/></marker></defs>',
        f'<rect class="bg" width="{WIDTH}" height="{_n(height)}"/>',
        _text(MARGIN, 42, "title", picture.title),
        _text(MARGIN, 64, "soft", subtitle),
    ]
    for panel in panels:
        lines += _panel(picture, panel)
    lines += _edges(picture, panels)
    # Words last: an arrow that passes behind them leaves them readable.
    for panel in panels:
        lines += _panel_words(panel)
    lines += _legend(picture, bottom + 34)
    for number, (kind, note) in enumerate(notes):
        lines.append(_text(MARGIN, bottom + 64 + 20 * number, kind, note))
    lines.append("</svg>")
    return "\n".join(lines) + "\n"


def _layout(picture: Picture) -> list[_Panel]:
    panels: list[_Panel] = []
    y = 84.0
    for node in picture.nodes:
        groups = _groups(node, y + PANEL_HEAD)
        last = max((group.y + group.height for group in groups), default=y + PANEL_HEAD + 20)
        height = last + PAD - y + (18 if node.idle else 0)
        panels.append(_Panel(node, y, height, groups))
        y += height + PANEL_GAP
    return panels


def _groups(node: PictureNode, top: float) -> tuple[_Group, ...]:
    """Stand the stages of a node side by side, and go on below where the panel ends."""
    keys = list(dict.fromkeys((rank.dp_rank, rank.pp_rank) for rank in node.ranks))
    left, right = MARGIN + PAD, WIDTH - MARGIN - PAD
    x, y = float(left), top
    row_height = 0.0
    found: list[_Group] = []
    for engine, stage in keys:
        ranks = tuple(rank for rank in node.ranks if (rank.dp_rank, rank.pp_rank) == (engine, stage))
        width = len(ranks) * TILE[0] + (len(ranks) - 1) * GAP + 2 * GROUP_PAD
        if found and x + width > right:
            x, y, row_height = float(left), y + row_height + ROW_GAP, 0.0
        found.append(_Group(engine, stage, ranks, x, y, width))
        row_height = max(row_height, found[-1].height)
        x += width + 2 * GAP
    return tuple(found)


def _panel(picture: Picture, panel: _Panel) -> Iterator[str]:
    yield _rect(MARGIN, panel.y, WIDTH - 2 * MARGIN, panel.height, "panel", radius=14)
    for group in panel.groups:
        yield from _group(picture, group)


def _panel_words(panel: _Panel) -> Iterator[str]:
    node = panel.node
    words = " · ".join(word for word in (node.role, node.address, node.hardware) if word)
    yield _text(MARGIN + PAD, panel.y + 28, "name", node.name)
    yield _text(MARGIN + PAD + 10 + 9 * len(node.name), panel.y + 28, "soft halo", words)
    if node.network:
        yield _text(WIDTH - MARGIN - PAD, panel.y + 28, "soft halo", node.network, anchor="end")
    if not panel.groups:
        yield _text(MARGIN + PAD, panel.y + PANEL_HEAD + 12, "soft", "no ranks here")
    if node.idle:
        yield _text(MARGIN + PAD, panel.y + panel.height - 12, "tiny", f"idle: {device_span(node.idle)}")


def _group(picture: Picture, group: _Group) -> Iterator[str]:
    placement = picture.placement
    hue = HUES[group.engine % len(HUES)]
    fill, edge = f"hsl({hue} 70% var(--tint))", f"hsl({hue} 60% var(--edge))"
    yield (
        f'<rect x="{_n(group.x)}" y="{_n(group.y)}" width="{_n(group.width)}" height="{_n(group.height)}" rx="10" '
        f'style="fill:{fill};stroke:{edge}" stroke-width="1.2"/>'
    )
    first = group.ranks[0]
    layers = f"{first.layers[0]}–{first.layers[1] - 1}" if first.num_layers > 1 else str(first.layers[0])
    is_narrow = len(group.ranks) == 1 and placement.pipeline_parallel_size > 1
    layers = f"L{layers}" if is_narrow else f"layers {layers}"
    title = []
    if placement.data_parallel_size > 1:
        title.append(f"e{group.engine}" if is_narrow else f"engine {group.engine}")
    if placement.pipeline_parallel_size > 1:
        title.append(f"stage {group.stage}")
    title.append(layers)
    yield _text(group.x + GROUP_PAD, group.y + 17, "tiny", " · ".join(title))
    middle = group.y + group.head + TILE[1] / 2
    if len(group.ranks) > 1:
        link = picture.group_link([rank.rank for rank in placement.stage(group.engine, group.stage)])
        sums = f"{2 * first.num_layers} sums a step, {link.name}"
        yield _text(group.x + GROUP_PAD, group.y + 17 + SUMS_LINE, "tiny", sums)
        end = group.x + group.width - GROUP_PAD - 4
        yield f'<path class="sum" style="stroke:{edge}" d="M{_n(group.x + GROUP_PAD + 4)} {_n(middle)}H{_n(end)}"/>'
    for number, rank in enumerate(group.ranks):
        yield from _tile(picture, rank, group.x + GROUP_PAD + number * (TILE[0] + GAP), group.y + group.head)


def _tile(picture: Picture, rank: RankSpec, x: float, y: float) -> Iterator[str]:
    yield _rect(x, y, *TILE, "tile", radius=8)
    yield _text(x + 10, y + 21, "rank", str(rank.rank))
    yield _text(x + TILE[0] - 9, y + 20, "tiny", rank.device, anchor="end")
    memory = picture.memory.get(rank.rank)
    if memory is None:
        yield _text(x + 10, y + 44, "tiny", f"layers {rank.layers[0]}–{rank.layers[1] - 1}")
        return
    width = TILE[0] - 18
    scale = width / max(memory.budget_bytes, memory.required_bytes, 1)
    yield _rect(x + 9, y + 32, width, 9, "free", radius=2)
    at = x + 9
    for name, kind in BAR:
        part = getattr(memory, name) * scale
        if part > 0:
            yield _rect(at, y + 32, part, 9, kind if memory.fits else f"{kind} over", radius=0)
            at += part
    used = f"{memory.required_bytes / GIB:.1f} of {memory.budget_bytes / GIB:.1f} GiB"
    yield _text(x + 9, y + 54, "tiny" if memory.fits else "warn", used)
    kv = f"KV {tokens(memory.kv_tokens)} tokens" if memory.num_blocks else "no KV cache"
    yield _text(x + 9, y + 67, "tiny", kv if memory.fits else "does not fit")


def _edges(picture: Picture, panels: Sequence[_Panel]) -> Iterator[str]:
    places = {(g.engine, g.stage, panel.node.name): g for panel in panels for g in panel.groups}
    size = f"{picture.bytes_per_token / 1000:.2f} kB per token"
    for hop in picture.hops():
        one = places.get((hop.engine, hop.stage, hop.source))
        other = places.get((hop.engine, hop.stage + 1, hop.target))
        if one is not None and other is not None:
            yield from _hop(hop, one, other, size)
    for group in picture.placement.crossing(picture.placement.tp_groups):
        first = picture.placement.ranks[group[0]]
        parts = [g for key, g in places.items() if key[:2] == (first.dp_rank, first.pp_rank)]
        for one, other in zip(parts, parts[1:], strict=False):
            (x, y), (to_x, to_y) = one.middle, other.middle
            x, to_x = max(x, to_x), max(x, to_x)
            yield f'<path class="cross" d="M{_n(x)} {_n(y + one.height / 2)}V{_n(to_y - other.height / 2)}"/>'
            text = f"{2 * first.num_layers} all-reduces a step over {picture.between.name}"
            yield _text(x + 10, (y + to_y) / 2 + 4, "warn", text)
    no_tensor = not picture.placement.crossing(picture.placement.tp_groups)
    for upper, lower in zip(panels, panels[1:], strict=False):
        names = {upper.node.name, lower.node.name}
        if no_tensor and not any({hop.source, hop.target} == names for hop in picture.hops()):
            middle = (upper.y + upper.height + lower.y) / 2 + 4
            yield _text(WIDTH / 2, middle, "soft", "no tensor crosses, only requests and answers", anchor="middle")


def _hop(hop: Hop, one: _Group, other: _Group, size: str) -> Iterator[str]:
    is_crossing = hop.source != hop.target
    kind = "cross" if is_crossing else "hop"
    if one.y == other.y and not is_crossing:
        y = one.middle[1]
        path = f"M{_n(one.x + one.width)} {_n(y)}H{_n(other.x - 2)}"
    else:
        x, to_x = one.middle[0], other.middle[0]
        y, to_y = one.y + one.height, other.y
        half = (y + to_y) / 2
        path = f"M{_n(x)} {_n(y)}C{_n(x)} {_n(half)} {_n(to_x)} {_n(half)} {_n(to_x)} {_n(to_y - 2)}"
    yield f'<path class="{kind}" marker-end="url(#arrow)" d="{path}"/>'
    if is_crossing:
        x, y = (one.middle[0] + other.middle[0]) / 2, (one.y + one.height + other.y) / 2
        yield _text(x + 14, y - 10, "warn", f"stage {hop.stage} → {hop.stage + 1}: {size}, {hop.link.name}")


def _legend(picture: Picture, y: float) -> Iterator[str]:
    if not picture.memory:
        return
    x = float(MARGIN)
    for kind, name in (("w", "weights"), ("a", "activations"), ("r", "runtime"), ("k", "KV cache"), ("free", "free")):
        yield _rect(x, y - 10, 12, 12, kind, radius=2)
        yield _text(x + 18, y, "soft", name)
        x += 34 + 7.2 * len(name)


def _notes(picture: Picture) -> list[tuple[str, str]]:
    return [
        (
            "warn" if remark.severity == "warning" else "soft",
            remark.message + (f" — {remark.hint}" if remark.hint else ""),
        )
        for remark in picture.remarks
    ]


def _rect(x: float, y: float, width: float, height: float, kind: str, *, radius: int) -> str:
    return (
        f'<rect class="{kind}" x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"'
        + (f' rx="{radius}"' if radius else "")
        + "/>"
    )


def _text(x: float, y: float, kind: str, text: str, *, anchor: str = "") -> str:
    end = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text class="{kind}" x="{_n(x)}" y="{_n(y)}"{end}>{escape(_clean(text))}</text>'


def _attribute(text: str) -> str:
    return escape(_clean(text), {'"': "&quot;"})


def _clean(text: str) -> str:
    """Replace what XML 1.0 forbids, and what would be invisible."""
    return "".join(ch if ch.isprintable() else "�" for ch in text)


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
