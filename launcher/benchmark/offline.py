"""Measure an engine without a server: the plan of `hlaunch up`, run by `python -m engine.benchmark` in a child.

Knows: which settings a measurement changes (no prefix reuse, room for the largest level), how events become figures.
Refuses to know: the clock and the engine; the child has them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from launcher.benchmark import floor
from launcher.benchmark.child import run_child
from launcher.benchmark.report import LevelFigures, median, offline_figures
from launcher.benchmark.synthetic import is_synthetic
from launcher.errors import EngineFailed

if TYPE_CHECKING:
    from engine.config import EngineConfig, ModelConfig
    from launcher.plan import LaunchPlan


@dataclass(slots=True)
class OfflineResult:
    """What came back: medians per level, the time to ready, the device, and profiles by number of requests."""

    levels: list[LevelFigures] = field(default_factory=list)
    ready: Mapping[str, Any] = field(default_factory=dict)
    device: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    profiles: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    is_synthetic: bool = False


def measure_offline(
    plan: LaunchPlan,
    points: Sequence[tuple[int, int, int]],
    *,
    runs: int,
    seed: int,
    profile: Sequence[int] = (),
    on_event: Callable[[Mapping[str, Any]], None] = lambda _: None,
) -> OfflineResult:
    """Measure (requests, input, output) points; `profile` lists numbers of requests whose steps are taken apart.

    Raises: EngineFailed with the child's cause, and what the plan's checks raise.
    """
    plan.check()
    request = {
        "engine": json.loads(bench_config(plan.config, points, is_watched=bool(profile)).to_json()),
        "points": points,
        "runs": runs,
        "seed": seed,
        "profile": profile,
        "started": time.time(),
    }
    result = OfflineResult(is_synthetic=plan.config.load_format == "dummy")
    if plan.files.folder is not None:
        result.is_synthetic = result.is_synthetic or is_synthetic(plan.files.folder)
    by_point: dict[tuple[int, int, int], list[LevelFigures]] = {}
    experts: dict[tuple[int, int, int], float] = {}
    for event in run_child("engine.benchmark", request, plan.environment_mapping):
        on_event(event)
        kind = event["event"]
        if kind == "error":
            raise EngineFailed(f"{event['kind']}: {event['message']}", hint=event["hint"])
        if kind == "run":
            by_point.setdefault(_point(event), []).append(offline_figures(event))
        elif kind == "experts":
            experts[_point(event)] = event["distinct_experts"]
        elif kind == "ready":
            result.ready = {key: value for key, value in event.items() if key != "event"}
        elif kind == "profile":
            result.profiles.append({key: value for key, value in event.items() if key != "event"})
        elif kind == "skipped":
            result.skipped.append(event)
        elif kind == "done":
            result.device, result.versions = event["device"], event["versions"]
    limits = device_limits(result.device)
    for point, found in by_point.items():
        level = replace(median(found), distinct_experts=experts.get(point))
        result.levels.append(with_floor(plan.model, level, point, limits))
    if plan.model is not None:
        for profile_of in result.profiles:
            n, context = int(profile_of["num_requests"]), int(profile_of["context"])
            counted = next((value for point, value in experts.items() if point[0] == n), None)
            floor.add_bytes(profile_of, plan.model, n, context, limits, counted)
    return result


def bench_config(config: EngineConfig, points: Sequence[tuple[int, int, int]], *, is_watched: bool) -> EngineConfig:
    """Change what a measurement needs changed: no prefix reuse, room for every request of the largest point."""
    scheduler = config.scheduler
    largest = max([scheduler.max_num_seqs, *(n for n, _, _ in points)])
    scheduler = replace(
        scheduler,
        max_num_seqs=largest,
        max_num_batched_tokens=max(largest, scheduler.max_num_batched_tokens),
        enable_prefix_caching=False,
        max_queue=1 << 20,
        # On a CPU an overlapped step is computed in another thread than the one that is watched.
        async_scheduling=scheduler.async_scheduling and not (is_watched and config.device == "cpu"),
    )
    return replace(config, scheduler=scheduler)


def device_limits(device: Mapping[str, Any]) -> floor.Device:
    """Give a device's limits: the table's, with the copy bandwidth that was measured on this very one."""
    name = str(device.get("name", ""))
    known = floor.find_device(name) or floor.Device(name, None, None, None)
    measured = device.get("copy_bytes_per_second")
    return replace(known, copy=float(measured)) if measured else known


def with_floor(
    model: ModelConfig | None, level: LevelFigures, point: tuple[int, int, int], limits: floor.Device
) -> LevelFigures:
    """Hold a level against the floor of its device, where the model's shape is known."""
    n, length, out = point
    if model is None:
        return level
    if level.decode_tokens_per_second is not None:
        rate, context = level.decode_tokens_per_second, length + (out - 1) // 2
        return replace(level, floor=floor.decode_report(model, n, context, rate, limits, level.distinct_experts))
    if out == 1 and level.prefill_tokens_per_second is not None:
        return replace(level, floor=floor.prefill_report(model, n, length, level.prefill_tokens_per_second, limits))
    return level


def _point(event: Mapping[str, Any]) -> tuple[int, int, int]:
    return event["num_requests"], event["input_tokens"], event["output_tokens"]
