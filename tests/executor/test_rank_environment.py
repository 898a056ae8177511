"""What ranks are started with, on the head's node and on others: no secret of the launch, their own thread count."""

from __future__ import annotations

from pathlib import Path

import pytest
from executor_support import children_of
from nodes_support import start_on_nodes

from engine.placement import ParallelSizes

CANARY = "canary-of-the-test"


def environ_of(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if pair)


def test_no_rank_on_any_node_has_a_secret_of_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ("HLAUNCH_NODE_SECRET", "HLAUNCH_NODE_SECRET_FILE", "HLAUNCH_API_KEY", "RAY_AUTH_TOKEN_PATH")
    for name in secrets:
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    executor, starter = start_on_nodes(ParallelSizes(1, 2, 1))
    try:
        host = starter.hosts["node1"].pid
        assert CANARY in environ_of(host).values()
        ranks = [environ_of(pid) for pid in (*executor.pids, *children_of(host))]
        assert len(ranks) == 2
        for environ in ranks:
            assert CANARY not in environ.values()
            assert (environ["NCCL_DEBUG"], environ["CUDA_VISIBLE_DEVICES"]) == ("WARN", "")
            assert environ["OMP_NUM_THREADS"] == environ["MKL_NUM_THREADS"]
    finally:
        executor.stop()
        starter.end()
