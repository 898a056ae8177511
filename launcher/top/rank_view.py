"""Ranks → lines of the screen: one row per rank, and what nodes carry over RDMA. Pure, as `view`."""

from __future__ import annotations

from collections.abc import Callable

from launcher.console import Line, clip, layout_table
from launcher.sizes import size
from launcher.top.ranks import RankFigures, RankPicture

MAX_ROWS = 32
"""More ranks than this are counted, not drawn; `--json` has all of them."""
WIDE = 60
"""In fewer columns only what a rank does is shown, and where."""
LONG_SECONDS = 2.0
"""A rank that does one thing for longer is worth a word: steps take milliseconds."""


def rank_lines(picture: RankPicture, width: int) -> list[Line]:
    """Draw all ranks, in at most `width` columns; nothing when there are none."""
    if not picture.ranks:
        return []
    has_engines = len({item.rank.engine for item in picture.ranks}) > 1
    has_power = any("watts" in item.rank.values for item in picture.ranks)
    is_wide = width >= WIDE
    columns: list[tuple[str, bool, Callable[[RankFigures], str]]] = [
        ("ENGINE", has_engines, lambda item: item.rank.engine),
        ("RANK", True, lambda item: item.rank.rank),
        ("NODE", True, lambda item: item.rank.node),
        ("DEVICE", is_wide, lambda item: item.rank.device),
        ("STATE", True, _state),
        (">BUSY", True, lambda item: _percent(item.computing)),
        (">WAIT", is_wide, lambda item: _percent(item.waiting)),
        (">MEMORY", is_wide, lambda item: _memory(item.rank.values.get("memory_bytes"))),
        (">POWER", is_wide and has_power, lambda item: _watts(item.rank.values.get("watts"))),
    ]
    shown = [(name, read) for name, is_shown, read in columns if is_shown]
    cells = [tuple(read(item) for _, read in shown) for item in picture.ranks[:MAX_ROWS]]
    title, *body = layout_table([name for name, _ in shown], cells, width)
    lines: list[Line] = [[], [(title, "bold")], *([(line, "")] for line in body)]
    if (more := len(picture.ranks) - MAX_ROWS) > 0:
        lines.append([(f"… and {more} more", "dim")])
    for node, rates in list(picture.traffic.items())[:MAX_ROWS]:
        carried = ", ".join(f"{rates[word] / 1e9:.2f} GB/s {word}" for word in ("sent", "received") if word in rates)
        if carried:
            lines.append([(clip(f"RDMA {node}: {carried}", width), "")])
    return lines


def _state(item: RankFigures) -> str:
    seconds = item.rank.values.get("seconds", 0.0)
    is_told = item.rank.state != "idle" and seconds >= LONG_SECONDS
    return f"{item.rank.state} {seconds:.0f} s" if is_told else item.rank.state


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"


def _memory(count: float | None) -> str:
    return "-" if count is None else size(count)


def _watts(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} W"
