"""The compiled graph says what the queue path and one rank say; its failures have names."""

from __future__ import annotations

import os
import signal

import pytest
from ray_engine import on_ray, requests, run
from ray_nodes import RayPair, command_line, ray_pair

from engine.engine_core import EngineCore
from engine.executor.base import ExecutorError
from engine.executor.compiled_graph import CompiledGraphExecutor
from engine.placement import ParallelSizes


def drive(core: EngineCore) -> None:
    while core.has_work:
        core.step()


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(ParallelSizes(pipeline=2), id="pp2"),
        pytest.param(ParallelSizes(pipeline=2, tensor=2), id="tp2 pp2", marks=pytest.mark.slow),
    ],
)
def test_the_graph_says_what_one_rank_says(
    ray_environ: RayPair, alone: dict[str, list[int]], sizes: ParallelSizes
) -> None:
    core = EngineCore.start(on_ray(ray_environ, sizes, executor="ray-cgraph"))
    try:
        assert isinstance(core.executor, CompiledGraphExecutor)
        assert run(core, requests()) == alone
    finally:
        core.stop()


@pytest.mark.slow
def test_a_killed_rank_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """On nodes of its own: Ray 2.60's raylet hangs on the node whose rank was killed between two hand-overs."""
    with ray_pair() as pair:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        for name, value in pair.variables.items():
            monkeypatch.setenv(name, value)
        core = EngineCore.start(on_ray(pair, ParallelSizes(pipeline=2, tensor=2), executor="ray-cgraph"))
        try:
            for item in requests(200):
                core.add(item)
            for _ in range(4):
                core.step()
            worker = next(pid for pid in pair.pids("two") if "StageActor" in command_line(pid))
            os.kill(worker, signal.SIGKILL)
            with pytest.raises(ExecutorError, match=r"rank [23] \(node two\): its Ray actor died"):
                drive(core)
        finally:
            core.stop()
