"""Ranks on both nodes of a Ray cluster: the same tokens as one rank, failures with names, and nothing left."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from ray_engine import ALONE, on_ray, requests, run
from ray_nodes import TWO, RayPair, wait_for

from engine.engine_core import EngineCore
from engine.executor.base import ExecutorError
from engine.executor.multinode import MultiNodeExecutor
from engine.executor.roster import NodeFailure
from engine.placement import ParallelSizes


@pytest.fixture(scope="module")
def alone() -> dict[str, list[int]]:
    core = EngineCore.start(ALONE)
    try:
        return run(core, requests())
    finally:
        core.stop()


def own_descendants() -> set[int]:
    """This process's descendants."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    mine = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in mine and pid not in mine}:
        mine |= more
    return mine - {os.getpid()}


def ranks_of(pair: RayPair, node: str) -> list[int]:
    return [
        pid for pid in own_descendants()
        if is_in_session(pid, pair.processes[node].pid)
        and b"multiproc_rank" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]  # fmt: skip


def is_in_session(pid: int, session: int) -> bool:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3]) == session
    except (OSError, IndexError):
        return False


def actor_of(pair: RayPair, node: str) -> int:
    return next(
        pid for pid in pair.pids(node) if b"NodeHostActor.run" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )  # fmt: skip


def run_on(core: EngineCore) -> None:
    while core.has_work:
        core.step()


def test_a_lost_node_is_named_and_another_split_serves_the_same_tokens(
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
    again = EngineCore.start(on_ray(ray_environ, ParallelSizes(pipeline=2)))
    try:
        assert run(again, requests()) == alone
    finally:
        again.stop()
    wait_for(lambda: not ranks_of(ray_environ, "two"), 5)


def test_what_the_cluster_lacks_is_the_error_of_the_start(ray_environ: RayPair) -> None:
    with pytest.raises(ExecutorError, match=f"two: {TWO} has 2 CPUs, 3 are needed"):
        EngineCore.start(on_ray(ray_environ, ParallelSizes(pipeline=6)))
    config = on_ray(ray_environ, ParallelSizes(tensor=2), placement_seconds=0.5)
    config = replace(config, nodes=replace(config.nodes, addresses=(config.nodes.addresses[0], "127.0.0.44")))
    with pytest.raises(ExecutorError, match=r"two: 127\.0\.0\.44 is not in the Ray cluster"):
        EngineCore.start(config)
