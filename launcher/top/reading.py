"""Samples → one reading of a server: gauges, counters and histograms under our words, by engine.

Knows: what vLLM (and servers that speak its names, ours among them) and SGLang call each thing. Refuses to know: time.
Ranks of one engine that all report count once (the largest), engines add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from launcher.errors import HlaunchError
from launcher.top.exposition import Sample, natural
from launcher.top.ranks import RankReading, read_ranks

_ENGINE_LABELS = ("engine", "engine_index", "dp_rank")
_RANK_LABELS = ("rank", "pp_rank", "tp_rank", "moe_ep_rank")

GAUGES: Mapping[str, Sequence[str]] = {
    "running": ("vllm:num_requests_running", "sglang:num_running_reqs"),
    "waiting": ("vllm:num_requests_waiting", "sglang:num_queue_reqs"),
    "kv_usage": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage"),
}
COUNTERS: Mapping[str, Sequence[str]] = {
    "generated_tokens": ("vllm:generation_tokens", "sglang:generation_tokens"),
    "prompt_tokens": ("vllm:prompt_tokens", "sglang:prompt_tokens"),
    "preemptions": ("vllm:num_preemptions", "sglang:num_retracted_requests"),
    "prefix_queries": ("vllm:prefix_cache_queries", "vllm:gpu_prefix_cache_queries", "sglang:prompt_tokens"),
    "prefix_hits": ("vllm:prefix_cache_hits", "vllm:gpu_prefix_cache_hits", "sglang:cached_tokens"),
    "finished": ("vllm:request_success", "sglang:num_requests"),
}
"""Counters end in `_total`; older servers leave it out."""
HISTOGRAMS: Mapping[str, Sequence[str]] = {
    "first_token": ("vllm:time_to_first_token_seconds", "sglang:time_to_first_token_seconds"),
    "next_token": (
        "vllm:inter_token_latency_seconds",
        "sglang:inter_token_latency_seconds",
        "vllm:time_per_output_token_seconds",
        "sglang:time_per_output_token_seconds",
    ),
    "whole_request": ("vllm:e2e_request_latency_seconds", "sglang:e2e_request_latency_seconds"),
}
_AVERAGED = ("kv_usage",)


class NotAModelServer(HlaunchError):
    """The metrics are well formed, and none of them is a model server's."""


@dataclass(frozen=True, slots=True)
class Row:
    """One engine, or one rank of it; `values` holds what it reports, under our names."""

    engine: str
    rank: str
    values: Mapping[str, float]

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.engine, self.rank) if part)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a server said at one moment. A value that it does not report is absent.

    `histograms` hold cumulative counts by upper bound in seconds, the last at infinity.
    """

    models: tuple[str, ...]
    values: Mapping[str, float]
    histograms: Mapping[str, Mapping[float, float]]
    rows: tuple[Row, ...] = ()
    state: str = field(default="")
    ranks: RankReading = field(default_factory=RankReading)


def read(samples: Mapping[str, Sequence[Sample]]) -> Reading:
    """Pick a server's figures out of its samples. Raises: NotAModelServer."""
    totals: dict[str, float] = {}
    by_row: dict[tuple[str, str], dict[str, float]] = {}
    models: dict[str, None] = {}
    for word, names in (*GAUGES.items(), *COUNTERS.items()):
        found = _first(samples, names, ("_total", "") if word in COUNTERS else ("",))
        if not found:
            continue
        engines: dict[str, dict[str, float]] = {}
        for sample in found:
            if not math.isfinite(sample.value) or sample.value < 0:
                continue
            models.update(dict.fromkeys([sample.labels["model_name"]] if sample.labels.get("model_name") else []))
            engine, rank = _place(sample.labels, _ENGINE_LABELS), _place(sample.labels, _RANK_LABELS)
            ranks = engines.setdefault(engine, {})
            # Several samples of one rank differ in another label, such as the reason a request ended: parts of a sum.
            ranks[rank] = ranks.get(rank, 0.0) + sample.value
        for engine, ranks in engines.items():
            for rank, value in ranks.items():
                by_row.setdefault((engine, rank), {})[word] = value
        if engines:
            parts = [max(ranks.values()) for ranks in engines.values()]
            totals[word] = sum(parts) / len(parts) if word in _AVERAGED else sum(parts)
    histograms = {word: buckets for word, names in HISTOGRAMS.items() if (buckets := _histogram(samples, names))}
    if not totals and not histograms:
        raise NotAModelServer(
            "these metrics are of no model server: neither vllm:… nor sglang:… is among them",
            hint="SGLang needs --enable-metrics",
        )
    if len(by_row) > 1:
        by_row.pop(("", ""), None)
    rows = tuple(Row(engine, rank, by_row[engine, rank]) for engine, rank in sorted(by_row, key=natural))
    state = next((item.labels.get("state", "") for item in samples.get("hlaunch_state", ()) if item.value == 1), "")
    return Reading(tuple(models), totals, histograms, rows, state, read_ranks(samples))


def _first(samples: Mapping[str, Sequence[Sample]], names: Iterable[str], suffixes: Iterable[str]) -> Sequence[Sample]:
    """Return the samples of the first name that is there; some exporters write `vllm_` for `vllm:`."""
    endings = tuple(suffixes)
    spelled = (form + end for name in names for form in (name, name.replace(":", "_")) for end in endings)
    return next((samples[name] for name in spelled if name in samples), ())


def _place(labels: Mapping[str, str], names: Sequence[str]) -> str:
    """Name the engine or the rank that a sample is of: `0`, or `pp 1 tp 0`; empty when nothing says."""
    held = [(name, labels[name]) for name in names if labels.get(name)]
    if len(held) == 1 and names is _ENGINE_LABELS:
        return held[0][1]
    return " ".join(f"{name.removesuffix('_rank')} {value}" for name, value in held)


def _histogram(samples: Mapping[str, Sequence[Sample]], names: Sequence[str]) -> dict[float, float]:
    """Add up the buckets of all label sets; cumulative and rising, whatever a racing server wrote."""
    buckets: dict[float, float] = {}
    for sample in _first(samples, names, ("_bucket",)):
        try:
            bound = float(sample.labels.get("le", ""))
        except ValueError:
            continue
        if not math.isnan(bound) and math.isfinite(sample.value):
            buckets[bound] = buckets.get(bound, 0.0) + sample.value
    rising: dict[float, float] = {}
    height = 0.0
    for bound in sorted(buckets):
        height = max(height, buckets[bound])
        rising[bound] = height
    return rising
