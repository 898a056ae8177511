"""`python -m engine.benchmark`: one request as JSON on stdin, results as JSON lines on stdout, each as it comes.

    in   {"engine": EngineConfig as JSON, "points": [[requests, input, output], …], "runs": 3, "warm_up": 1, "seed": 0,
          "profile": [requests, …], "profile_steps": 20, "started": seconds since the epoch, "deadline_seconds": null}
    out  ready, run …, experts …, profile …, skipped …, done; or error

`started` is when the caller started this process: "ready" counts from there. Past the deadline nothing new begins, and
a point that would not end before it, judging by its last run, is skipped and said so. Exit status: 0 done, 1 failed.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.benchmark.protocol import Bench, Point
    from engine.engine_core import EngineCore


class Deadline:
    """When to stop. Units: seconds; None is never."""

    def __init__(self, started: float, seconds: float | None) -> None:
        self._end = None if seconds is None else started + seconds

    def has_room_for(self, seconds: float) -> bool:
        return self._end is None or time.time() + seconds < self._end


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    request = json.load(sys.stdin)
    try:
        _run(request)
    except BrokenPipeError:
        return 1
    except Exception as error:  # noqa: BLE001 - the process boundary: the parent shows one line
        import traceback

        traceback.print_exc()
        message = str(error).splitlines()[0] if str(error) else ""
        say("error", kind=type(error).__name__, message=message, hint=getattr(error, "hint", ""))
        return 1
    return 0


def _run(request: dict[str, Any]) -> None:
    entered = time.time()
    started = float(request.get("started") or entered)
    deadline = Deadline(started, request.get("deadline_seconds"))
    from engine.config import EngineConfig
    from engine.engine_core import EngineCore

    config = EngineConfig.from_json(json.dumps(request["engine"]), "the benchmark's request")
    from engine.benchmark.protocol import Bench, Point

    imported = time.time()
    core = EngineCore.start(config)
    ready = time.time()
    say(
        "ready",
        ready_seconds=ready - started,
        import_seconds=imported - started,
        init_seconds=ready - imported,
        facts=asdict(core.facts),
    )
    try:
        bench = Bench(core, int(request.get("seed", 0)))
        for n, length, out in request["points"]:
            _measure(bench, Point(n, length, out), request, deadline)
        for n in request.get("profile", []):
            _profile(core, bench, n, request, deadline)
    finally:
        core.stop()
    # Last: the copy's buffers are not to take memory that the engine planned with.
    from engine.benchmark.device import copy_bandwidth, describe_device, versions

    try:
        copy: float | None = copy_bandwidth(config.device)
    except RuntimeError:
        copy = None  # the GPU is full with the engine's own memory
    say("done", device={**describe_device(config.device), "copy_bytes_per_second": copy}, versions=versions())


def _measure(bench: Bench, point: Point, request: dict[str, Any], deadline: Deadline) -> None:
    from engine.benchmark.protocol import SETTLE_STEPS

    facts = {
        "num_requests": point.num_requests,
        "input_tokens": point.input_tokens,
        "output_tokens": point.output_tokens,
    }
    last = 0.0
    warm_up = int(request.get("warm_up", 1))
    for run in range(-warm_up, int(request.get("runs", 3))):
        if not deadline.has_room_for(1.1 * last):
            say("skipped", **facts, run=run, reason="the deadline")
            return
        begin = time.perf_counter()
        figures = bench.run(point, run)
        last = time.perf_counter() - begin
        if run >= 0:
            say("run", **figures)
        else:
            say("warm-up", **facts, seconds=last)
    has_room = point.input_tokens + point.num_requests + 8 * SETTLE_STEPS < bench.max_model_len
    if point.output_tokens > 1 and has_room and deadline.has_room_for(last):
        experts = bench.distinct_experts(point.num_requests, point.input_tokens)
        if experts is not None:
            say("experts", **facts, distinct_experts=experts)


def _profile(core: EngineCore, bench: Bench, n: int, request: dict[str, Any], deadline: Deadline) -> None:
    from engine.benchmark.protocol import Point
    from engine.profiling import profile_steps

    steps = int(request.get("profile_steps", 20))
    length = next((point[1] for point in request["points"] if point[0] == n), 128)
    if not deadline.has_room_for(0):
        say("skipped", num_requests=n, reason="the deadline")
        return
    bench.begin_decode(Point(n, length, 3 * steps + n + 32), "profile")
    profile = profile_steps(core, steps)
    bench.finish()
    say("profile", num_requests=n, context=length + n + 4, **profile.as_dict())


def say(event: str, **fields: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
