"""How a count of things that cannot be cut (layers, heads, 32-column units, experts) is shared out.

Knows: weights, capacities, rounding. Refuses to know: where weights come from (measured speed, or all alike).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from engine.placement.values import PlacementError, Span

MLP_UNIT = 32
"""Intermediate columns of one unit: one MXFP4 block, so that no scale is cut in two."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Counts per position, where they are not to be equal; empty means equal. Each must add up to the whole.

    `layers` has one count per stage; the others one per tensor rank, the same in all stages. A 0 leaves a rank out:
    a CPU rank with experts and no KV head, a GPU rank with neither.
    """

    layers: tuple[int, ...] = ()
    kv_heads: tuple[int, ...] = ()
    mlp_units: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    vocab: tuple[int, ...] = ()


def split_evenly(units: int, parts: int) -> tuple[int, ...]:
    """Share `units` out in parts that differ by at most one, the larger ones first."""
    small, larger = divmod(units, parts)
    return (small + 1,) * larger + (small,) * (parts - larger)


def apportion(
    units: int, weights: Sequence[float], *, capacities: Sequence[int] | None = None, minimum: int = 0
) -> tuple[int, ...]:
    """Share `units` out by weight: water-fill up to each capacity, then round by largest remainder.

    A weight of 0 gets nothing; every other gets at least `minimum`. What a full one cannot take, the others share.
    Raises: PlacementError when the capacities, or `minimum` for each, cannot hold it.
    """
    limits = [units if weight > 0 else 0 for weight in weights]
    if capacities is not None:
        limits = [min(limit, capacity) for limit, capacity in zip(limits, capacities, strict=True)]
    if sum(limits) < units:
        raise PlacementError(f"{units} units do not fit: the ranks hold {sum(limits)} at most")
    takers = sum(weight > 0 for weight in weights)
    if units < minimum * takers:
        raise PlacementError(f"{units} units cannot give {takers} ranks {minimum} each")
    exact = _water_fill(units, weights, limits)
    counts = [int(share) for share in exact]
    # Ties go to the lower rank, so that equal weights give the larger parts first.
    order = sorted(range(len(counts)), key=lambda i: (counts[i] - exact[i], i))
    while left := units - sum(counts):
        for i in [i for i in order if counts[i] < limits[i]][:left]:
            counts[i] += 1
    for i, weight in enumerate(weights):
        while weight > 0 and counts[i] < min(minimum, limits[i]):
            counts[max(range(len(counts)), key=lambda k: (counts[k], -k))] -= 1
            counts[i] += 1
    return tuple(counts)


def _water_fill(units: int, weights: Sequence[float], limits: Sequence[int]) -> list[float]:
    shares = [0.0] * len(weights)
    open_ranks = [i for i, weight in enumerate(weights) if weight > 0 and limits[i] > 0]
    left = float(units)
    while open_ranks and left > 0:
        total = sum(weights[i] for i in open_ranks)
        full = [i for i in open_ranks if left * weights[i] / total >= limits[i]]
        if not full:
            for i in open_ranks:
                shares[i] = left * weights[i] / total
            break
        for i in full:
            shares[i] = float(limits[i])
        left = units - sum(shares)
        open_ranks = [i for i in open_ranks if i not in full]
    return shares


def split_layers(windows: Sequence[int | None], stages: int, weights: Sequence[float] = ()) -> tuple[int, ...]:
    """Share layers out over stages; `windows[i]` is layer i's sliding window, None for full attention.

    Where the kinds of layers repeat (sliding, full, sliding, …), a stage keeps whole repetitions, so that its KV groups
    stay equally large: unless that would make the longest stage longer.
    """
    weights = weights or (1.0,) * stages
    plain = apportion(len(windows), weights, minimum=1)
    period = _period(windows)
    if period == 1 or len(windows) // period < stages:
        return plain
    whole = tuple(count * period for count in apportion(len(windows) // period, weights, minimum=1))
    return whole if max(whole) <= max(plain) else plain


def _period(windows: Sequence[int | None]) -> int:
    """The shortest repetition of the layers' kinds that divides their number."""
    count = len(windows)
    for period in range(1, count // 2 + 1):
        if count % period == 0 and all(windows[i] == windows[i % period] for i in range(count)):
            return period
    return count


def spans(counts: Sequence[int]) -> tuple[Span, ...]:
    """Turn counts into half-open ranges that follow one another."""
    ends = list(accumulate(counts))
    return tuple((end - count, end) for end, count in zip(ends, counts, strict=True))
