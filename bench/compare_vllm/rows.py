"""Rows of the comparison from the runs of both sides: medians, ratios, fractions of the floor. Pure.

A row is one point (requests, input, output) or `ready`. The ratio is hlaunch over the best of vLLM's backends in that
row; for `ready`, where less is better, the other way round: above 1 means that hlaunch is ahead, everywhere.

A decode rate is a difference of two times. Where a side's times of the same work differ by more than a fifth between
runs (it compiled, or stalled), a median of such differences is no rate: the fastest prompt pass and the fastest whole
run stand in for it, the best that this side can have done, and the row says so (`stalled`).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

Event = Mapping[str, Any]
Side = Mapping[str, Sequence[Event]]

STEADY = 1.2

COLUMNS = ("row", "hlaunch", "best vLLM", "backend", "ratio", "% of floor", "experts", "runs")


def make_rows(sides: Side, floors: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Make the rows of `sides`, which holds each side's events by name: `hlaunch`, `vllm-triton`, `vllm-marlin`.

    `floors` gives, by a row's name, what hlaunch's figure was held against (`floor_report`).
    """
    rows = []
    points = dict.fromkeys(_point(event) for events in sides.values() for event in events if event["event"] == "run")
    for point in points:
        name, key = point_name(point), "prefill_tokens_per_second" if point[2] == 1 else "decode_tokens_per_second"
        values = {side: _values(events, point, key) for side, events in sides.items()}
        fastest = {side: rate for side, events in sides.items() if (rate := _rate_of_fastest(events, point))}
        extra = _extra(sides, point, floors.get(name)) | {"stalled": sorted(fastest)}
        rows.append(_row(name, values, is_rate=True, unit="tok/s", extra=extra, instead=fastest))
    ready = {side: [e["ready_seconds"] for e in events if e["event"] == "ready"] for side, events in sides.items()}
    for label, at in (("ready, first start", 0), ("ready, caches warm", 1)):
        values = {side: [times[at]] for side, times in ready.items() if len(times) > at}
        if values:
            rows.append(_row(label, values, is_rate=False, unit="s", extra={}))
    return rows


def point_name(point: Sequence[int]) -> str:
    """Name a point as people do: `n = 8` for decoding, `prefill 16 x 8192` for prompts alone."""
    n, length, out = point
    return f"prefill {n} x {length}" if out == 1 else f"n = {n}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw the rows as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        fraction, experts = row.get("fraction"), row.get("distinct_experts")
        cells = (
            row["name"],
            _number(row["hlaunch"], row["unit"]) + ("*" if "hlaunch" in row.get("stalled", ()) else ""),
            _number(row["vllm"], row["unit"]) + ("*" if f"vllm-{row['backend']}" in row.get("stalled", ()) else ""),
            row["backend"] or "-",
            "-" if row["ratio"] is None else f"**{row['ratio']:.2f}**",
            "-" if fraction is None else f"{100 * fraction:.0f}",
            "-" if experts is None else f"{experts:.1f}",
            str(row["runs"]),
        )
        lines.append("| " + " | ".join(cells) + " |")
    if any(row.get("stalled") for row in rows):
        lines += ["", "\\* its times of the same work differ by more than a fifth: the rate of its fastest times"]
    return "\n".join(lines)


def _row(
    name: str,
    values: Mapping[str, Sequence[float]],
    *,
    is_rate: bool,
    unit: str,
    extra: Mapping[str, Any],
    instead: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, Any]:
    medians = {side: statistics.median(found) for side, found in values.items() if found} | dict(instead)
    ours = medians.get("hlaunch")
    theirs = {side: value for side, value in medians.items() if side != "hlaunch"}
    best = (max if is_rate else min)(theirs, key=theirs.__getitem__) if theirs else None
    ratio = None
    if ours and best is not None and theirs[best]:
        ratio = ours / theirs[best] if is_rate else theirs[best] / ours
    return {
        "name": name,
        "unit": unit,
        "hlaunch": ours,
        "vllm": None if best is None else theirs[best],
        "backend": None if best is None else best.removeprefix("vllm-"),
        "ratio": ratio,
        "runs": min((len(found) for found in values.values() if found), default=0),
        "all": {side: list(found) for side, found in values.items()},
        **extra,
    }


def _extra(sides: Side, point: tuple[int, int, int], floor: Mapping[str, Any] | None) -> dict[str, Any]:
    counted = [
        event["distinct_experts"]
        for event in sides.get("hlaunch", ())
        if event["event"] == "experts" and _point(event) == point
    ]
    extra: dict[str, Any] = {"distinct_experts": counted[-1] if counted else None}
    if floor is not None:
        extra |= {"floor": dict(floor), "fraction": floor.get("fraction_spec", floor.get("fraction"))}
    return extra


def _point(event: Event) -> tuple[int, int, int]:
    return event["num_requests"], event["input_tokens"], event["output_tokens"]


def _values(events: Sequence[Event], point: tuple[int, int, int], key: str) -> list[float]:
    return [e[key] for e in events if e["event"] == "run" and _point(e) == point and e.get(key) is not None]


def _rate_of_fastest(events: Sequence[Event], point: tuple[int, int, int]) -> float | None:
    """Give the decode rate of the fastest times, where times of the same work are too far apart; else None."""
    runs = [e for e in events if e["event"] == "run" and _point(e) == point and e.get("full_seconds")]
    if not runs:
        return None
    first, full = [e["first_seconds"] for e in runs], [e["full_seconds"] for e in runs]
    if max(max(first) / min(first), max(full) / min(full)) <= STEADY:
        return None
    return point[0] * (point[2] - 1) / (min(full) - min(first)) if min(full) > min(first) else None


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if unit == "tok/s" else f"{value:.1f} s"
