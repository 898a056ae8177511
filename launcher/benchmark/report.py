"""Turn measured levels into figures: percentiles, medians over runs, a JSON document, rows of a table.

Units: milliseconds for latencies, tokens per second for rates. None is "not measured that way": an offline run hands
all requests over at once and sees no single token arrive.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from launcher.benchmark.load import LevelResult, RequestTimes, Workload

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class LevelFigures:
    """Figures of one concurrency: of one run, or medians of several.

    TTFT: request sent to first token. TPOT: (E2EL - TTFT) / (tokens - 1), one value per request. ITL: between two
    events of a stream. E2EL: request sent to end. `decode_tokens_per_second`: all tokens but the first of each request
    over the time that these took longer than the first ones alone. `floor` is `launcher.benchmark.floor`'s report.
    """

    concurrency: int
    requests: int
    errors: int
    wall_seconds: float
    output_tokens_per_second: float
    requests_per_second: float
    ttft_ms_p50: float | None
    ttft_ms_p90: float | None
    ttft_ms_p99: float | None
    tpot_ms_p50: float | None
    tpot_ms_p90: float | None
    tpot_ms_p99: float | None
    itl_ms_p50: float | None
    itl_ms_p90: float | None
    itl_ms_p99: float | None
    e2el_ms_p50: float | None
    e2el_ms_p90: float | None
    e2el_ms_p99: float | None
    decode_tokens_per_second: float | None = None
    prefill_tokens_per_second: float | None = None
    distinct_experts: float | None = None
    floor: Mapping[str, Any] | None = None
    runs: int = 1


def figures(level: LevelResult, first_seconds: float | None = None) -> LevelFigures:
    """Summarise one run of a level; a level without a finished request has zeros.

    `first_seconds` is how long as many requests took that asked for one token each; it gives the decode rate.
    """
    wall = max(level.wall_seconds, 1e-9)
    done = level.requests
    later_tokens = level.output_tokens - len(done)
    extra = None if first_seconds is None else level.wall_seconds - first_seconds
    return LevelFigures(
        concurrency=level.concurrency,
        requests=len(done),
        errors=len(level.errors),
        wall_seconds=level.wall_seconds,
        output_tokens_per_second=level.output_tokens / wall,
        requests_per_second=len(done) / wall,
        **_percentiles("ttft", [request.ttft for request in done]),
        **_percentiles("tpot", [value for request in done if (value := _tpot(request)) is not None]),
        **_percentiles("itl", [gap for request in done for gap in request.gaps]),
        **_percentiles("e2el", [request.total for request in done]),
        decode_tokens_per_second=later_tokens / extra if extra and extra > 0 and later_tokens > 0 else None,
    )


def median(runs: Sequence[LevelFigures]) -> LevelFigures:
    """Take the median of each figure over the runs of one level; errors add up, requests are those of one run."""
    values: dict[str, Any] = {}
    for item in fields(LevelFigures):
        found = [value for run in runs if isinstance(value := getattr(run, item.name), (int, float))]
        if len(found) == len(runs) and item.name not in ("concurrency", "requests", "runs"):
            values[item.name] = statistics.median(found)
    return replace(runs[0], **values | {"errors": sum(run.errors for run in runs), "runs": len(runs)})


def offline_figures(event: Mapping[str, Any]) -> LevelFigures:
    """Make figures of one run of `python -m engine.benchmark`: all requests at once, timed as a whole."""
    n, out = int(event["num_requests"]), int(event["output_tokens"])
    first, full = float(event["first_seconds"]), float(event.get("full_seconds", event["first_seconds"]))
    tpot = 1e3 * (full - first) / (out - 1) if out > 1 else None
    unseen = dict.fromkeys(
        f"{name}_ms_p{percent}" for name in ("ttft", "tpot", "itl", "e2el") for percent in (50, 90, 99)
    )
    return LevelFigures(
        concurrency=n,
        requests=n,
        errors=0,
        wall_seconds=full,
        output_tokens_per_second=n * out / full,
        requests_per_second=n / full,
        **unseen | {"ttft_ms_p50": 1e3 * first, "tpot_ms_p50": tpot, "e2el_ms_p50": 1e3 * full},  # type: ignore[arg-type]
        decode_tokens_per_second=event.get("decode_tokens_per_second"),
        prefill_tokens_per_second=event["prefill_tokens_per_second"],
    )


def percentile(values: Sequence[float], percent: int) -> float:
    """Percentile with linear interpolation; 0 for no values, the value itself for one."""
    if not values:
        return 0.0
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def document(
    workload: Workload, levels: Sequence[LevelFigures], version: str, server: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """The result as one JSON-ready document, with what is needed to repeat it; see bench/results/README.md."""
    return {
        "schema": SCHEMA,
        "what": "bench",
        "hlaunch": version,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": {"machine": platform.machine(), "system": platform.platform(), "python": platform.python_version()},
        "server": server,
        **more,
        "workload": asdict(workload),
        "levels": [asdict(level) for level in levels],
    }


def _tpot(request: RequestTimes) -> float | None:
    if request.output_tokens < 2:
        return None
    return (request.total - request.ttft) / (request.output_tokens - 1)


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, Any]:
    return {f"{name}_ms_p{percent}": 1e3 * percentile(seconds, percent) for percent in (50, 90, 99)}
