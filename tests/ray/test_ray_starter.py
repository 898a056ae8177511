"""Ranks on both nodes of a Ray cluster: the same tokens as one rank, failures with names, and nothing left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray_engine import on_ray, requests, run
from ray_nodes import ROOT, TWO, RayPair, command_line, descendants, wait_for

from engine.engine_core import EngineCore
from engine.executor.base import ExecutorError
from engine.executor.multinode import MultiNodeExecutor
from engine.executor.roster import NodeFailure
from engine.placement import ParallelSizes

PATHS = f"{ROOT}:{Path(__file__).parent}"
DRIVER = """\
import json, sys, time
from types import SimpleNamespace
from ray_engine import on_ray, requests, run
from engine.engine_core import EngineCore
from engine.placement import ParallelSizes
core = EngineCore.start(on_ray(SimpleNamespace(address=sys.argv[1]), ParallelSizes(pipeline=2)))
print(json.dumps(run(core, requests())), flush=True)
time.sleep(600)
"""


def ranks_of(pair: RayPair, node: str) -> list[int]:
    return [
        pid for pid in descendants(os.getpid())
        if is_in_session(pid, pair.processes[node].pid) and "multiproc_rank" in command_line(pid)
    ]  # fmt: skip


def is_in_session(pid: int, session: int) -> bool:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3]) == session
    except (OSError, IndexError):
        return False


def actor_of(pair: RayPair, node: str) -> int:
    return next(
        pid for pid in pair.pids(node) if "NodeHostActor.run" in command_line(pid)
    )  # fmt: skip


def run_on(core: EngineCore) -> None:
    while core.has_work:
        core.step()


def test_a_lost_node_is_named_and_a_dead_driver_leaves_nothing(
    ray_environ: RayPair, alone: dict[str, list[int]]
) -> None:
    core = EngineCore.start(on_ray(ray_environ, ParallelSizes(tensor=2)))
    try:
        assert isinstance(core.executor, MultiNodeExecutor)
        assert len(core.executor.pids) == 1, "one rank on this node, the other on node two"
        assert len(ranks_of(ray_environ, "two")) == 1
        assert run(core, requests()) == alone
        for item in requests(200):
            core.add(item)
        for _ in range(5):
            core.step()
        killed_at = time.monotonic()
        os.kill(actor_of(ray_environ, "two"), signal.SIGKILL)
        with pytest.raises(NodeFailure) as caught:
            run_on(core)
        assert time.monotonic() - killed_at < 5
        assert caught.value.node == "two"
        assert "node two (rank 1, cpu:0) is lost: " in str(caught.value)
    finally:
        core.stop()
    wait_for(lambda: not ranks_of(ray_environ, "two"), 5)
    # Again, as two stages, in a process of its own: which is killed.
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, ray_environ.address], cwd=ROOT, env={**os.environ, "PYTHONPATH": PATHS},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert driver.stdout is not None
    try:
        assert json.loads(driver.stdout.readline()) == alone
        assert len(ranks_of(ray_environ, "two")) == 1
    finally:
        driver.kill()
        driver.communicate(timeout=10)
    wait_for(lambda: not ranks_of(ray_environ, "two"), 5)
    wait_for(lambda: not any("NodeHostActor" in command_line(pid) for pid in ray_environ.pids("two")), 10)


def test_what_the_cluster_lacks_is_the_error_of_the_start(ray_environ: RayPair) -> None:
    with pytest.raises(ExecutorError, match=f"two: {TWO} has 2 CPUs, 3 are needed"):
        EngineCore.start(on_ray(ray_environ, ParallelSizes(pipeline=6)))
