"""The compiled graph says what the queue path and one rank say; its failures have names."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from ray_engine import ALONE, on_ray, requests, run
from ray_nodes import RayPair

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
def test_the_graph_says_the_same_and_a_killed_rank_is_named(ray_environ: RayPair, sizes: ParallelSizes) -> None:
    alone = EngineCore.start(ALONE)
    expected = run(alone, requests())
    alone.stop()
    core = EngineCore.start(on_ray(ray_environ, sizes, executor="ray-cgraph"))
    try:
        assert isinstance(core.executor, CompiledGraphExecutor)
        assert run(core, requests()) == expected
        for item in requests(200):
            core.add(item)
        for _ in range(4):
            core.step()
        worker = next(
            pid for pid in ray_environ.pids("two")
            if b"StageActor" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )  # fmt: skip
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(ExecutorError, match=r"rank [123] \(node two\): its Ray actor died"):
            drive(core)
    finally:
        core.stop()
