"""Readings over time → rates and quantiles.

Knows: differences of counters, quantiles of histograms, restarts. Refuses to know: clocks (each reading comes with its
time), servers, terminals.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.top.ranks import RankPicture, RankReading, compare, rounded
from launcher.top.reading import COUNTERS, Reading

WINDOW_SECONDS = 30.0
"""Latencies and hit rates are over this time: one interval of a calm server holds too few requests for a p99."""
MAX_POINTS = 240
"""Points of the sparklines that are kept."""


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Latency in seconds. `is_capped` says that p99 lies beyond the last bucket, whose bound stands for it.

    `span_seconds` is the time they were observed in; None means since the server's start.
    """

    p50: float
    p99: float
    count: int
    is_capped: bool
    span_seconds: float | None


@dataclass(frozen=True, slots=True)
class Figures:
    """One picture. Rates are per second; a value that the server does not report is None or absent."""

    reading: Reading
    rates: Mapping[str, float]
    row_rates: Mapping[str, Mapping[str, float]]
    latencies: Mapping[str, Quantiles]
    prefix_hit_rate: float | None
    history: Mapping[str, tuple[float, ...]]
    num_restarts: int
    ranks: RankPicture = field(default_factory=RankPicture)

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, for `--json`; seconds and tokens."""
        values = self.reading.values
        return {
            "models": list(self.reading.models),
            "state": self.reading.state or None,
            "generated_tokens_per_second": rounded(self.rates.get("generated_tokens")),
            "prompt_tokens_per_second": rounded(self.rates.get("prompt_tokens")),
            "finished_per_second": rounded(self.rates.get("finished")),
            **{name: rounded(values.get(name)) for name in ("running", "waiting", "kv_usage", *COUNTERS)},
            "prefix_hit_rate": rounded(self.prefix_hit_rate),
            "latency_seconds": {
                name: {
                    "p50": rounded(found.p50),
                    "p99": rounded(found.p99),
                    "is_capped": found.is_capped,
                    "count": found.count,
                    "span_seconds": rounded(found.span_seconds),
                }
                for name, found in self.latencies.items()
            },
            "engines": [
                {
                    "engine": row.engine or None,
                    "rank": row.rank or None,
                    "generated_tokens_per_second": rounded(self.row_rates.get(row.name, {}).get("generated_tokens")),
                    **{name: rounded(value) for name, value in row.values.items()},
                }
                for row in self.reading.rows
            ],
            "ranks": [rank.to_json() for rank in self.ranks.ranks],
            "rdma_bytes_per_second": {
                node: {word: round(rate, 1) for word, rate in rates.items()}
                for node, rates in self.ranks.traffic.items()
            },
            "restarts": self.num_restarts,
        }


@dataclass(slots=True)
class Watch:
    """The readings of one server so far, at most a window of them."""

    window_seconds: float = WINDOW_SECONDS
    num_restarts: int = 0
    _readings: deque[tuple[float, Reading]] = field(default_factory=deque)
    _history: dict[str, deque[float]] = field(default_factory=dict)
    _ranks: RankPicture = field(default_factory=RankPicture)

    def add(self, at: float, reading: Reading) -> Figures:
        """Take a reading made at `at` (seconds, rising) and return the picture it makes with those before."""
        if self._readings and _went_back(self._readings[-1][1], reading):
            self._readings.clear()
            self._ranks = RankPicture()
            self.num_restarts += 1
        while len(self._readings) > 1 and at - self._readings[1][0] >= self.window_seconds:
            self._readings.popleft()
        before = self._readings[-1] if self._readings else None
        oldest = self._readings[0] if self._readings else None
        self._readings.append((at, reading))
        rates = {} if before is None else _rates(before[1].values, reading.values, at - before[0])
        for name in ("generated_tokens", "prompt_tokens"):
            if name in rates:
                self._history.setdefault(name, deque(maxlen=MAX_POINTS)).append(rates[name])
        self._ranks = compare(RankReading() if before is None else before[1].ranks, reading.ranks, self._ranks)
        return Figures(
            reading,
            rates,
            {} if before is None else _row_rates(before[1], reading, at - before[0]),
            {name: found for name in reading.histograms if (found := _latency(oldest, at, reading, name)) is not None},
            _hit_rate(oldest, reading),
            {name: tuple(points) for name, points in self._history.items()},
            self.num_restarts,
            self._ranks,
        )


def _went_back(before: Reading, now: Reading) -> bool:
    """A counter never falls; one that did belongs to a new process."""
    return any(
        now.values[name] < before.values[name] for name in COUNTERS if name in now.values and name in before.values
    )


def _rates(before: Mapping[str, float], now: Mapping[str, float], seconds: float) -> dict[str, float]:
    if seconds <= 0:
        return {}
    return {name: max(0.0, now[name] - before[name]) / seconds for name in COUNTERS if name in now and name in before}


def _row_rates(before: Reading, now: Reading, seconds: float) -> dict[str, dict[str, float]]:
    earlier = {row.name: row.values for row in before.rows}
    return {row.name: _rates(earlier[row.name], row.values, seconds) for row in now.rows if row.name in earlier}


def _hit_rate(oldest: tuple[float, Reading] | None, now: Reading) -> float | None:
    """Share of the looked-up prompt tokens that were found: in the window if there were any, else since the start."""
    queries, hits = now.values.get("prefix_queries"), now.values.get("prefix_hits")
    if queries is None or hits is None:
        return None
    if oldest is not None:
        earlier = oldest[1].values
        looked_up = queries - earlier.get("prefix_queries", 0.0)
        if looked_up > 0:
            return min(1.0, max(0.0, hits - earlier.get("prefix_hits", 0.0)) / looked_up)
    return min(1.0, hits / queries) if queries > 0 else None


def _latency(oldest: tuple[float, Reading] | None, at: float, now: Reading, name: str) -> Quantiles | None:
    buckets = now.histograms[name]
    if oldest is not None:
        earlier = oldest[1].histograms.get(name, {})
        recent = {bound: max(0.0, count - earlier.get(bound, 0.0)) for bound, count in buckets.items()}
        if (found := quantiles(recent, at - oldest[0])) is not None:
            return found
    return quantiles(buckets, None)


def quantiles(buckets: Mapping[float, float], span_seconds: float | None) -> Quantiles | None:
    """Median and 99th percentile of a histogram (cumulative counts by upper bound); None without observations."""
    total = max(buckets.values(), default=0.0)
    if total <= 0:
        return None
    p50, _ = quantile(buckets, 0.5)
    p99, is_capped = quantile(buckets, 0.99)
    return Quantiles(p50, p99, round(total), is_capped, span_seconds)


def quantile(buckets: Mapping[float, float], share: float) -> tuple[float, bool]:
    """Return a quantile, linear within its bucket as Prometheus has it, and whether it lies beyond the last bound.

    `buckets` are cumulative counts by rising upper bound with at least one observation.
    """
    wanted = share * max(buckets.values())
    low, below = 0.0, 0.0
    for bound, count in sorted(buckets.items()):
        if count >= wanted and count > below:
            if math.isinf(bound):
                return low, True
            return low + (bound - low) * (wanted - below) / (count - below), False
        if not math.isinf(bound):
            low = bound
        below = max(below, count)
    return low, True
