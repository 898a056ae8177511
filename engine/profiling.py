"""Where the time of a decode step goes: per op on a CPU, per kernel on a GPU.

On a CPU the ops' door (`kernels.ops.Ops`) is wrapped, so every op that a model calls is timed where it is called. On a
GPU the steps run as they always do, graphs included, and torch's profiler reads the device's own record of its kernels.

Knows: how a running engine is watched. Refuses to know: bytes and floors (the caller has the arithmetic), text.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from engine.engine_core import EngineCore
from kernels.ops import ALL_OPS, Ops
from kernels.reference.moe import router_topk
from kernels.stages import stage_of


@dataclass(frozen=True, slots=True)
class OpTime:
    """One op, or the kernels of one stage, per step: calls and seconds.

    `spec` names the implementation of an op, or says how many kernels a stage has.
    """

    name: str
    spec: str
    calls: float
    seconds: float


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Means over the faster half of the steps that were watched, whole steps and their ops alike.

    On a GPU `step_seconds` is the median of steps just before, since the profiler itself costs time.
    """

    num_steps: int
    step_seconds: float
    ops: list[OpTime]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class OpTimer:
    """Wraps a door to the ops so that each call is counted and timed."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.calls: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def wrap(self, door: Ops) -> Ops:
        """Give a door with the same functions, timed."""
        timed = copy.copy(door)
        for op in ALL_OPS:
            function = getattr(door, op.name, None)
            if function is not None:
                setattr(timed, op.name, self._timed(op.name, function))
        return timed

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = self._clock()
            result = function(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - begin
            self.calls[name] = self.calls.get(name, 0) + 1
            return result

        return call


def profile_steps(core: EngineCore, num_steps: int) -> StepProfile:
    """Watch the next `num_steps` steps of an engine whose requests are all decoding."""
    if core.config.device.startswith("cuda"):
        return _profile_cuda(core, num_steps)
    timer = OpTimer()
    with watched_ops(core, timer.wrap) as platform:
        steps = []
        for _ in range(num_steps):
            timer.calls, timer.seconds = {}, {}
            steps.append((_timed_step(core), timer.calls, timer.seconds))
    # A busy machine slows some steps: what they spent waiting for a core is nobody's work.
    kept = sorted(steps, key=lambda step: step[0])[: (num_steps + 1) // 2]
    specs = {op.name: op.select(platform).name for op in ALL_OPS}
    ops = [
        OpTime(
            name,
            specs[name],
            statistics.mean(calls.get(name, 0) for _, calls, _ in kept),
            statistics.mean(seconds.get(name, 0.0) for _, _, seconds in kept),
        )
        for name in kept[0][1]
    ]
    ops.sort(key=lambda op: -op.seconds)
    return StepProfile(num_steps, statistics.mean(seconds for seconds, _, _ in kept), ops)


def count_experts(core: EngineCore, num_rows: int) -> list[int] | None:
    """Count the distinct experts that each layer touches in the next decode step of `num_rows` requests.

    None when the engine has nobody who counts (ranks in other processes, a model without experts).
    """
    executor: Any = core.executor
    if hasattr(executor, "count_experts"):
        for _ in range(2):
            core.step()
        return list(executor.count_experts(num_rows))
    if _runner(core) is None:
        return None
    counts: list[int] = []

    def counting(door: Ops) -> Ops:
        watched = copy.copy(door)
        door_name, moe_add = "moe_add", door.moe_add

        def call(x: Any, router: Any, router_bias: Any, top_k: int, *rest: Any) -> Any:
            counts.append(len(set(router_topk(x, router, router_bias, top_k)[1].flatten().tolist())))
            return moe_add(x, router, router_bias, top_k, *rest)

        # By name: what takes any arguments has no type of its own.
        setattr(watched, door_name, call)
        return watched

    with watched_ops(core, counting):
        # An overlapped engine computes a step while it plans the next.
        for _ in range(4):
            if len(counts) < core.model.num_layers:
                core.step()
    return counts[: core.model.num_layers]


@contextmanager
def watched_ops(core: EngineCore, wrap: Callable[[Ops], Ops]) -> Iterator[Any]:
    """Put something in front of the ops of a CPU rank in this process, and take it away again. Gives the platform.

    Raises: RuntimeError when the engine's ranks live in other processes.
    """
    runner = _runner(core)
    if runner is None:
        raise RuntimeError("only an engine whose rank runs in this process can be watched")
    bare, checked = runner._bare, runner._checked
    runner._bare, runner._checked = wrap(bare), wrap(checked)
    try:
        yield bare.platform
    finally:
        runner._bare, runner._checked = bare, checked


def _runner(core: EngineCore) -> Any:
    """Find the CPU rank's runner. The one place that looks behind the executor."""
    return getattr(getattr(core.executor, "_worker", None), "_runner", None)


def _timed_step(core: EngineCore) -> float:
    begin = time.perf_counter()
    core.step()
    return time.perf_counter() - begin


def _profile_cuda(core: EngineCore, num_steps: int) -> StepProfile:
    from torch.profiler import ProfilerActivity, profile

    times = [_timed_step(core) for _ in range(num_steps)]
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(num_steps):
            core.step()
    return StepProfile(num_steps, statistics.median(times), kernel_times(record.key_averages(), num_steps))


def kernel_times(events: Any, num_steps: int) -> list[OpTime]:
    """Turn the profiler's averages (`key`, `count`, `self_device_time_total` in µs) into times of stages per step."""
    stages: dict[str, list[Any]] = {}
    for event in events:
        if event.self_device_time_total > 0:
            stages.setdefault(stage_of(event.key), []).append(event)
    found = [
        OpTime(
            name,
            "kernel" if len(parts) == 1 else f"{len(parts)} kernels",
            sum(part.count for part in parts) / num_steps,
            sum(part.self_device_time_total for part in parts) / num_steps / 1e6,
        )
        for name, parts in stages.items()
    ]
    return sorted(found, key=lambda op: -op.seconds)
