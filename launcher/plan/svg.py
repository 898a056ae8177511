"""A placement drawn as SVG: panels for nodes, tiles for ranks with their memory, arrows where hidden states travel.

Pure and deterministic: the same picture gives the same bytes. Every text is escaped; there is no script, no font and no
image from elsewhere. Colours follow the reader's light or dark theme.
"""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap
from xml.sax.saxutils import escape

from engine.placement import RankSpec
from launcher.plan.picture import Picture, rank_span
from launcher.plan.svg_layout import (
    GAP,
    GROUP_PAD,
    LETTER,
    MARGIN,
    PAD,
    SUMS_LINE,
    TILE,
    Edge,
    Group,
    Layout,
    Panel,
    lay_out,
)
from launcher.plan.topology import tokens
from launcher.sizes import GIB, counted

HUES = (212, 150, 28, 280, 340, 90, 190, 50)
BAR = (("stored_bytes", "w"), ("activation_bytes", "a"), ("runtime_bytes", "r"), ("kv_bytes", "k"))

_STYLE = """
svg{--bg:#fbfcfe;--panel:#fff;--line:#cfd8e3;--text:#18222f;--soft:#5b6b7f;--tile:#fff;--warn:#a15c00;--tint:93%;--edge:46%;--free:#e8edf3;
font-family:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
@media(prefers-color-scheme:dark){svg{--bg:#0f141b;--panel:#161d27;--line:#2c3848;--text:#e6edf5;--soft:#93a4b8;--tile:#1c2531;--warn:#f0b35a;--tint:17%;--edge:62%;--free:#2a3544}}
.bg{fill:var(--bg)}.panel{fill:var(--panel);stroke:var(--line);stroke-width:1.5}.title{font-size:20px;font-weight:650;fill:var(--text)}
.halo{paint-order:stroke;stroke:var(--bg);stroke-width:5px}.inner{stroke:var(--panel)}.name{font-size:15px;font-weight:650;fill:var(--text)}.soft{font-size:12px;fill:var(--soft)}.tiny{font-size:10.5px;fill:var(--soft)}
.rank{font-size:15px;font-weight:650;fill:var(--text)}.tile{fill:var(--tile);stroke:var(--line)}.warn{font-size:12px;fill:var(--warn)}
.hop{fill:none;stroke:var(--soft);stroke-width:2}.cross{fill:none;stroke:#d9480f;stroke-width:2.5;stroke-dasharray:7 5}
.kv{fill:none;stroke:#35a37c;stroke-width:2.5;stroke-dasharray:2 4}
path{stroke-linejoin:round}
.sum{stroke-width:3;fill:none}.w{fill:#3b7dd8}.a{fill:#e0a030}.r{fill:#9aa7b5}.k{fill:#35a37c}.free{fill:var(--free)}.over{fill:#d6336c}
""".strip()


def svg_text(picture: Picture) -> str:
    """Draw a picture as one SVG document, as wide as what it shows."""
    layout = lay_out(picture)
    width, bottom = layout.width, layout.bottom
    notes = [
        (kind, line)
        for kind, note in _notes(picture)
        for line in wrap(_clean(note), int((width - 2 * MARGIN) / LETTER)) or [""]
    ]
    height = bottom + 64 + 20 * len(notes)
    placement = picture.placement
    subtitle = f"{placement.sizes} · {counted(placement.world_size, 'rank')}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(width)} {_n(height)}" width="{_n(width)}" '
        f'height="{_n(height)}" role="img" aria-label="{_attribute(picture.title)}">',
        f"<title>{escape(_clean(picture.title))}</title>",
        f"<style>{_STYLE}</style>",
        '<defs><marker id="arrow" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path d="M0 0 10 5 0 10z" fill="context-stroke"/></marker></defs>',
        f'<rect class="bg" width="{_n(width)}" height="{_n(height)}"/>',
        _text(MARGIN, 42, "title", picture.title),
        _text(MARGIN, 64, "soft", subtitle),
    ]
    for panel in layout.panels:
        lines.append(_rect(MARGIN, panel.y, width - 2 * MARGIN, panel.height, "panel", radius=14))
    # Lines below cards, words above all.
    lines += [_line(edge) for edge in layout.edges]
    for panel in layout.panels:
        lines += _panel_words(panel)
        for group in panel.groups:
            lines += _group(picture, group)
    lines += [_label(edge, width) for edge in layout.edges if edge.label]
    lines += _untouched(picture, layout)
    lines += _legend(picture, bottom + 34)
    for number, (kind, note) in enumerate(notes):
        lines.append(_text(MARGIN, bottom + 64 + 20 * number, kind, note))
    lines.append("</svg>")
    return "\n".join(lines) + "\n"


def _panel_words(panel: Panel) -> Iterator[str]:
    name = panel.node.name
    yield _text(MARGIN + PAD, panel.y + PAD + 14, "name", name if len(name) <= 22 else name[:21] + "…")
    for number, line in enumerate(panel.words):
        yield _text(MARGIN + PAD, panel.y + PAD + 34 + 16 * number, "soft", line)


def _group(picture: Picture, group: Group) -> Iterator[str]:
    placement = picture.placement
    engine, stage, _ = group.key
    hue = HUES[engine % len(HUES)]
    fill, edge = f"hsl({hue} 70% var(--tint))", f"hsl({hue} 60% var(--edge))"
    yield (
        f'<rect x="{_n(group.x)}" y="{_n(group.y)}" width="{_n(group.width)}" height="{_n(group.height)}" rx="10" '
        f'style="fill:{fill};stroke:{edge}" stroke-width="1.2"/>'
    )
    first = group.ranks[0]
    layers = f"{first.layers[0]}–{first.layers[1] - 1}" if first.num_layers > 1 else str(first.layers[0])
    is_staged = placement.pipeline_parallel_size > 1
    is_narrow = len(group.ranks) == 1 and (is_staged or placement.data_parallel_size > 1)
    layers = f"L{layers}" if is_narrow else f"layers {layers}"
    title = []
    if placement.data_parallel_size > 1:
        title.append(f"e{engine}" if is_narrow and is_staged else f"engine {engine}")
    if is_staged:
        title.append(f"stage {stage}")
    title.append(layers)
    yield _text(group.x + GROUP_PAD, group.y + 17, "tiny", " · ".join(title))
    middle = group.y + group.head + group.tile_height / 2
    if len(group.ranks) > 1:
        link = picture.group_link([rank.rank for rank in placement.stage(engine, stage)])
        sums = f"{2 * first.num_layers} sums a step, {link.name}"
        yield _text(group.x + GROUP_PAD, group.y + 17 + SUMS_LINE, "tiny", sums)
        end = group.x + group.width - GROUP_PAD - 4
        yield f'<path class="sum" style="stroke:{edge}" d="M{_n(group.x + GROUP_PAD + 4)} {_n(middle)}H{_n(end)}"/>'
    for number, rank in enumerate(group.ranks):
        yield from _tile(picture, rank, group, group.x + GROUP_PAD + number * (TILE[0] + GAP), group.y + group.head)


def _tile(picture: Picture, rank: RankSpec, group: Group, x: float, y: float) -> Iterator[str]:
    yield _rect(x, y, TILE[0], group.tile_height, "tile", radius=8)
    if rank.copied_experts:
        words = f"+ experts {rank_span(rank.copied_experts)}"
        # All of them are in the tool tip of a tile that is too narrow.
        shown = words if len(words) <= 15 else f"+ {len(rank.copied_experts)} experts"
        yield (
            f'<text class="tiny" x="{_n(x + 9)}" y="{_n(y + 80)}">{escape(shown)}'
            f"<title>rank {rank.rank} holds copies of experts {rank_span(rank.copied_experts)}</title></text>"
        )
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


def _line(edge: Edge) -> str:
    end = ' marker-end="url(#arrow)"' if edge.has_arrow else ""
    return f'<path class="{edge.kind}"{end} d="{_path(edge)}"/>'


def _path(edge: Edge) -> str:
    one, other = edge.source, edge.target
    if edge.y is None:
        y = one.y + one.height / 2
        return f"M{_n(one.x + one.width)} {_n(y)}H{_n(other.x - 2)}"
    x, to_x = edge.ports
    y = one.y + one.height if edge.y > one.y else one.y
    to_y = other.y - 2 if edge.y < other.y else other.y + other.height + 2
    return f"M{_n(x)} {_n(y)}V{_n(edge.y)}H{_n(to_x)}V{_n(to_y)}"


def _label(edge: Edge, width: float) -> str:
    """Write beside the lane, on the side of it where neither end comes from."""
    assert edge.y is not None
    (x, to_x), start = edge.ports, edge.source
    inside = " inner" if edge.band[1] >= 0 else ""
    kind = ("soft" if edge.kind == "kv" else "warn") + " halo" + inside
    if edge.label_x is not None:
        return _text(edge.label_x, edge.y + 4, kind, edge.label)
    is_down = edge.y > start.y
    ends_below = edge.y < edge.target.y
    is_below = (is_down and not ends_below) or (is_down == (to_x < x))
    left = min(min(x, to_x) + 10, width - MARGIN - LETTER * len(edge.label))
    return _text(left, edge.y + (14 if is_below else -6), kind, edge.label)


def _untouched(picture: Picture, layout: Layout) -> Iterator[str]:
    """Say where nothing but requests and answers passes."""
    touched = {edge.band[0] for edge in layout.edges if edge.band[1] < 0}
    for number, (upper, lower) in enumerate(zip(layout.panels, layout.panels[1:], strict=False)):
        if number not in touched and picture.placement.world_size:
            middle = (upper.y + upper.height + lower.y) / 2 + 4
            text = "no tensor crosses, only requests and answers"
            yield _text(layout.width / 2, middle, "soft", text, anchor="middle")


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
