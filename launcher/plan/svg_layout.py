"""Where everything of an SVG drawing stands: panels, cards of ranks, and lanes in which arrows run between them.

Knows: sizes in pixels, who is joined to whom. Refuses to know: colours, elements, what is written on a card.

A panel is one node: its words in a column at the left, its cards in rows beside it. An arrow leaves a card below or
above, runs in a lane of its own between rows or panels, and passes behind cards: no line ever crosses a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap

from engine.placement import RankSpec
from launcher.plan.picture import Picture, PictureNode, device_span

MARGIN, PAD, GAP = 28, 18, 10
TITLE = 84.0
COLUMN, COLUMN_LETTERS = 196, 30
"""Width of the words of a node, in pixels and in letters of the small size."""
MOST = 950.0
"""Width of the widest row of cards: one tensor group of eight."""
LEAST = 680.0
TILE, COPY_LINE = (104, 74), 13
GROUP_HEAD, SUMS_LINE, GROUP_PAD = 26, 14, 10
ROW_GAP, PANEL_GAP = 24, 44
LETTER = 6.4
"""Mean width of a letter of the small size, to place and to break words by."""
LANE, THIN_LANE, LABELLED = 34, 8, 4
"""Height of a lane with a label, of one without, and how many lanes between the same two rows have labels."""

Key = tuple[int, int, str]
"""A card's engine, stage and node."""


@dataclass(slots=True)
class Group:
    """A card: the ranks of one stage on one node. `row` counts within its panel."""

    key: Key
    ranks: tuple[RankSpec, ...]
    panel: int
    row: int = 0
    x: float = 0.0
    y: float = 0.0

    @property
    def width(self) -> float:
        return len(self.ranks) * TILE[0] + (len(self.ranks) - 1) * GAP + 2 * GROUP_PAD

    @property
    def head(self) -> float:
        """Room for a line of words, and for a second one about what several ranks sum."""
        return GROUP_HEAD + (SUMS_LINE if len(self.ranks) > 1 else 0)

    @property
    def tile_height(self) -> float:
        return TILE[1] + (COPY_LINE if any(rank.copied_experts for rank in self.ranks) else 0)

    @property
    def height(self) -> float:
        return self.head + self.tile_height + GROUP_PAD

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


@dataclass(slots=True)
class Panel:
    node: PictureNode
    groups: list[Group]
    words: list[str]
    y: float = 0.0
    height: float = 0.0


@dataclass(slots=True)
class Edge:
    """A line between two cards. `kind` is its class; `y` the lane, unset where it goes straight to its neighbour.

    The label begins at `label_x`: right of all lines of a band that it shares, unset where it lies along its own.
    """

    kind: str
    source: Group
    target: Group
    label: str = ""
    has_arrow: bool = True
    y: float | None = None
    label_x: float | None = None

    @property
    def ports(self) -> tuple[float, float]:
        """Where along its cards it leaves and arrives: apart from those of other rows, KV beside hidden states."""
        aside = (18 if self.kind == "kv" else 0) + (14 * self.source.row if self.band[1] < 0 else 0)
        return self.source.middle + aside, self.target.middle + aside

    @property
    def is_straight(self) -> bool:
        one, other = self.source, self.target
        apart = other.x - one.x - one.width
        return self.kind == "hop" and (one.panel, one.row) == (other.panel, other.row) and 0 < apart <= 2 * GAP + 1

    @property
    def band(self) -> tuple[int, int]:
        """Below which panel, or below which row of a panel, the lane lies; row -1: below the panel."""
        one, other = self.source, self.target
        if one.panel != other.panel:
            return max(one.panel, other.panel) - 1, -1
        return one.panel, min(one.row, other.row)


@dataclass(slots=True)
class Layout:
    panels: list[Panel]
    edges: list[Edge]
    width: float
    bottom: float


def lay_out(picture: Picture) -> Layout:
    """Give everything its place."""
    panels = [Panel(node, _groups(node, number), _words(node)) for number, node in enumerate(picture.nodes)]
    for panel in panels:
        _into_rows(panel.groups)
    right = max((group.x + group.width for panel in panels for group in panel.groups), default=0.0)
    edges = list(_edges(picture, {group.key: group for panel in panels for group in panel.groups}))
    lanes: dict[tuple[int, int], list[Edge]] = {}
    for edge in edges:
        if not edge.is_straight:
            lanes.setdefault(edge.band, []).append(edge)
    y = TITLE
    for number, panel in enumerate(panels):
        panel.y = y
        rows = sorted({group.row for group in panel.groups})
        y += PAD
        for row in rows:
            members = [group for group in panel.groups if group.row == row]
            for group in members:
                group.y = y
            y = _take_lanes(lanes.get((number, row), ()), y + max(group.height for group in members))
            y += ROW_GAP if row != rows[-1] else 0
        y = max(y, panel.y + PAD + 18 + 16 * len(panel.words)) + PAD
        panel.height = y - panel.y
        if number + 1 < len(panels):
            y = _take_lanes(lanes.get((number, -1), ()), y + PANEL_GAP / 2) + PANEL_GAP / 2
    for shared in lanes.values():
        ends = max(port for edge in shared for port in edge.ports)
        for edge in shared:
            x, to_x = edge.ports
            if len(shared) > 1 or abs(x - to_x) < 1:
                edge.label_x = ends + 10
    labels = (edge.label_x + LETTER * len(edge.label) for edge in edges if edge.label and edge.label_x is not None)
    return Layout(panels, edges, max(LEAST, right + PAD + MARGIN, max(labels, default=0.0) + MARGIN), y)


def _groups(node: PictureNode, panel: int) -> list[Group]:
    keys = list(dict.fromkeys((rank.dp_rank, rank.pp_rank) for rank in node.ranks))
    return [
        Group((*key, node.name), tuple(rank for rank in node.ranks if (rank.dp_rank, rank.pp_rank) == key), panel)
        for key in keys
    ]


def _into_rows(groups: Sequence[Group]) -> None:
    """Stand cards side by side, in as few rows as fit, and as many in each of them."""
    rows, x = 1, 0.0
    for group in groups:
        if x and x + group.width > MOST:
            rows, x = rows + 1, 0.0
        x += group.width + 2 * GAP
    each = -(-len(groups) // rows)
    left = MARGIN + PAD + COLUMN
    row, x, count = 0, float(left), 0
    for group in groups:
        if count == each or (count and x + group.width > left + MOST):
            row, x, count = row + 1, float(left), 0
        group.row, group.x = row, x
        x, count = x + group.width + 2 * GAP, count + 1


def _take_lanes(edges: Sequence[Edge], y: float) -> float:
    """Give each edge its lane below `y`; returns where the lanes end. Of many the first has the label of all."""
    has_all = len(edges) <= LABELLED
    for number, edge in enumerate(edges):
        if not has_all and number:
            edge.label = ""
        elif not has_all:
            edge.label += f", and {len(edges) - 1} more"
        room = LANE if edge.label else THIN_LANE
        edge.y = y + room / 2
        y += room
    return y


def _words(node: PictureNode) -> list[str]:
    """The small words of a node, in lines that its column holds."""
    parts = [" · ".join(word for word in (node.role, node.address) if word), node.hardware, node.network]
    parts += [f"idle: {device_span(node.idle)}" if node.idle else "", "" if node.ranks else "no ranks here"]
    return [line for part in parts for line in wrap(part, COLUMN_LETTERS)[:3]]


def _edges(picture: Picture, groups: dict[Key, Group]) -> list[Edge]:
    size = f"{picture.bytes_per_token / 1000:.2f} kB per token"
    found: list[Edge] = []
    for hop in picture.hops():
        one, other = (
            groups.get((hop.engine, hop.stage, hop.source)),
            groups.get((hop.engine, hop.stage + 1, hop.target)),
        )
        if one is not None and other is not None:
            is_crossing = one.panel != other.panel
            who = f"engine {hop.engine}, " if picture.placement.data_parallel_size > 1 else ""
            label = f"{who}stage {hop.stage} → {hop.stage + 1}: {size}, {hop.link.name}" if is_crossing else ""
            found.append(Edge("cross" if is_crossing else "hop", one, other, label))
    ranks = picture.placement.ranks
    for members in picture.placement.crossing(picture.placement.tp_groups):
        first = ranks[members[0]]
        parts = [group for key, group in groups.items() if key[:2] == (first.dp_rank, first.pp_rank)]
        label = f"{2 * first.num_layers} all-reduces a step over {picture.between.name}"
        found += [Edge("cross", *pair, label, False) for pair in zip(parts, parts[1:], strict=False)]
    for flow in picture.kv_flows():
        if flow.routes:
            ends = [ranks[rank] for rank in (flow.routes[0].source, flow.routes[0].target)]
            one, other = (groups[rank.dp_rank, rank.pp_rank, rank.node] for rank in ends)
            label = f"KV engine {flow.source} → {flow.target}: {flow.bytes_per_token / 1000:.2f} kB per token"
            found.append(Edge("kv", one, other, f"{label}, {flow.link.name}"))
    return found
