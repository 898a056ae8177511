"""Turn measured levels into figures: percentiles, a JSON document, rows of a table.

Units: milliseconds for latencies, tokens per second for rates.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launcher.benchmark.load import LevelResult, Workload


@dataclass(frozen=True, slots=True)
class LevelFigures:
    """Figures of one concurrency."""

    concurrency: int
    requests: int
    errors: int
    wall_seconds: float
    output_tokens_per_second: float
    requests_per_second: float
    ttft_ms_p50: float
    ttft_ms_p99: float
    itl_ms_p50: float
    itl_ms_p99: float
    total_ms_p50: float


def figures(level: LevelResult) -> LevelFigures:
    """Summarise one level; a level without a finished request has zeros."""
    wall = max(level.wall_seconds, 1e-9)
    gaps = [gap for request in level.requests for gap in request.gaps]
    ttft = [request.ttft for request in level.requests]
    return LevelFigures(
        concurrency=level.concurrency,
        requests=len(level.requests),
        errors=len(level.errors),
        wall_seconds=level.wall_seconds,
        output_tokens_per_second=level.output_tokens / wall,
        requests_per_second=len(level.requests) / wall,
        ttft_ms_p50=1e3 * percentile(ttft, 50),
        ttft_ms_p99=1e3 * percentile(ttft, 99),
        itl_ms_p50=1e3 * percentile(gaps, 50),
        itl_ms_p99=1e3 * percentile(gaps, 99),
        total_ms_p50=1e3 * percentile([request.total for request in level.requests], 50),
    )


def percentile(values: Sequence[float], percent: int) -> float:
    """Percentile with linear interpolation; 0 for no values, the value itself for one."""
    if not values:
        return 0.0
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def document(
    workload: Workload, levels: Sequence[LevelFigures], version: str, server: dict[str, Any]
) -> dict[str, Any]:
    """The result as one JSON-ready document, with what is needed to repeat it."""
    return {
        "hlaunch": version,
        "host": {"machine": platform.machine(), "system": platform.platform(), "python": platform.python_version()},
        "server": server,
        "workload": asdict(workload),
        "levels": [asdict(level) for level in levels],
    }
