"""What ranks do and hold, from their lines on the board to the API process: real ranks, real nodes, real signals."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
from executor_support import children_of, wait_until
from nodes_support import start_on_nodes
from test_async_ranks import CONFIG
from test_multinode import PP2, serve

from engine.async_engine import AsyncEngine
from engine.comm.board import BoardLine, create_board, read_board
from engine.comm.rdma_traffic import read_traffic
from engine.core.request import EngineRequest
from engine.core.sampling_params import SamplingParams
from engine.executor.own_rank import OwnRank
from engine.placement import ParallelSizes, RankSpec
from engine.usage import DeviceUsage, EngineUsage, RankUsage


def test_a_line_adds_up_what_its_rank_did() -> None:
    board = create_board(2)
    line = BoardLine(board.view, 1)
    line.phase("serve")
    line.holds(5 << 30, 412.5)
    for spent, act in ((0.03, line.waits), (0.05, line.computes), (0.02, line.rests), (0.04, line.rests)):
        if spent == 0.03:
            line.begins(1)
        time.sleep(spent)
        act()
    other, state = read_board(board.view, (0, 1))
    assert 0.05 <= state.computing_seconds < 0.07 + 0.2
    assert 0.05 <= state.waiting_seconds < 0.05 + 0.2
    assert 0.04 <= state.idle_seconds < 0.04 + 0.2
    assert (state.memory_bytes, state.watts) == (5 << 30, 412.5)
    assert (other.computing_seconds, other.memory_bytes) == (0.0, 0)
    # What it does at this moment counts already.
    line.begins(2)
    time.sleep(0.05)
    assert read_board(board.view, (0, 1))[1].computing_seconds >= state.computing_seconds + 0.05
    board.close()


def test_the_rank_of_this_process_is_one_like_others() -> None:
    spec = RankSpec(**_spec())
    own = OwnRank(spec, lambda: DeviceUsage(1 << 30, 300.0))
    with own.computing(1):
        (rank,) = own.usage().ranks
        assert (rank.rank, rank.node, rank.device, rank.state) == (spec.rank, spec.node, spec.device, "computing")
        time.sleep(0.05)
    (rank,) = own.usage().ranks
    assert (rank.state, rank.memory_bytes, rank.watts) == ("idle", 1 << 30, 300.0)
    assert 0.05 <= rank.computing_seconds < 0.5
    assert rank.waiting_seconds == 0.0


def _spec() -> dict[str, object]:
    from executor_support import CONFIG as config
    from nodes_support import nodes_placement

    first = nodes_placement(config, ParallelSizes(1, 1, 1), 1).ranks[0]
    return {name: getattr(first, name) for name in first.__dataclass_fields__}


def test_ranks_on_all_nodes_tell_what_they_do() -> None:
    executor, starter = start_on_nodes(PP2)
    try:
        serve(executor, 100)

        def told() -> list[RankUsage]:
            ranks = executor.usage().ranks
            return ranks if len(ranks) == 2 and all(rank.memory_bytes for rank in ranks) else []

        # The other node's come by themselves, once a second.
        assert wait_until(lambda: bool(told()), 5)
        assert wait_until(lambda: all(rank.computing_seconds > 0.02 for rank in told()), 5)
        ranks = told()
        assert [(rank.rank, rank.node, rank.device, rank.state) for rank in ranks] == [
            (0, "node0", "cpu:0", "idle"), (1, "node1", "cpu:0", "idle"),
        ]  # fmt: skip
        assert all((rank.memory_bytes, rank.watts) == (3 << 20, 70.0) for rank in ranks)
        for place, pid in enumerate((executor.pids[0], children_of(starter.hosts["node1"].pid)[0])):
            os.kill(pid, signal.SIGSTOP)
            assert wait_until(lambda place=place: told()[place].state == "stopped by a signal", 5)
            os.kill(pid, signal.SIGCONT)
            assert wait_until(lambda place=place: told()[place].state == "idle", 5)
    finally:
        executor.stop()
        assert starter.end() == {"node1": 0}
    assert all(rank.state == "spawn" for rank in executor.usage().ranks if rank.node == "node0")


def test_a_servers_ranks_are_known_to_the_api_process_until_it_fails() -> None:
    async def scenario() -> None:
        fatal = asyncio.Event()
        engine = AsyncEngine(CONFIG, lambda _: None, lambda _: fatal.set())
        engine.start()
        try:
            await asyncio.wait_for(engine.ready.wait(), 60)
            request = EngineRequest("a", [7] * 20, SamplingParams(temperature=0.0), max_tokens=400, seed=1)
            seen: list[EngineUsage] = []
            async for _ in engine.submit(request):
                seen += engine.usage_by_engine()
            await asyncio.sleep(2.5)
            (usage,) = engine.usage_by_engine()
            assert [(rank.rank, rank.device, rank.state) for rank in usage.ranks] == [
                (0, "cpu:0", "idle"), (1, "cpu:1", "idle"),
            ]  # fmt: skip
            for rank, pid in zip(usage.ranks, children_of(engine.core_pid), strict=True):
                resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                assert rank.memory_bytes == pytest.approx(resident, rel=0.1)
                assert rank.computing_seconds > 0.05
                assert rank.waiting_seconds > 0.0
                assert rank.seconds > 0.5
            os.kill(children_of(engine.core_pid)[1], signal.SIGKILL)
            await asyncio.wait_for(fatal.wait(), 10)
            assert engine.usage_by_engine() == [EngineUsage()]
        finally:
            await engine.stop()

    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_rdma_bytes_are_those_of_all_ports(tmp_path: Path) -> None:
    assert read_traffic(tmp_path) is None
    for hca, port, sent, received in (
        ("mlx5_0", 1, "10\n", "20\n"),
        ("mlx5_1", 1, "1\n", "2\n"),
        ("mlx5_1", 2, "", "5"),
    ):
        folder = tmp_path / f"sys/class/infiniband/{hca}/ports/{port}/counters"
        folder.mkdir(parents=True)
        (folder / "port_xmit_data").write_text(sent)
        (folder / "port_rcv_data").write_text(received)
    read = read_traffic(tmp_path)
    assert read is not None
    assert (read.sent_bytes, read.received_bytes) == (4 * 11, 4 * 27)
    assert 0 <= time.monotonic() - read.seconds < 5
