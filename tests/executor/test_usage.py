"""What ranks do and hold, from their lines on the board to the API process: real ranks, real nodes, real signals."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from executor_support import CONFIG as STAND_IN_CONFIG
from executor_support import children_of, wait_until
from nodes_support import nodes_placement, start_on_nodes
from test_async_ranks import CONFIG
from test_multinode import PP2, serve

from engine import usage as usages
from engine.async_engine import AsyncEngine
from engine.comm.board import Activity, BoardLine, create_board, read_board
from engine.comm.rdma_traffic import read_traffic
from engine.comm.segment import LINE
from engine.core.request import EngineRequest
from engine.core.sampling_params import SamplingParams
from engine.executor.own_rank import OwnRank
from engine.executor.steps_under_way import StepsUnderWay
from engine.placement import ParallelSizes
from engine.process import Repeating
from engine.usage import DeviceUsage, EngineUsage, RankUsage

ROOT = Path(__file__).resolve().parents[2]


def test_a_line_adds_up_what_its_rank_did_since_it_serves() -> None:
    board = create_board(2)
    line = BoardLine(board.view, 1)
    line.phase("load")
    time.sleep(0.05)
    line.phase("serve")
    line.holds(5 << 30, 412.5)
    began = time.monotonic()
    line.begins(1)
    time.sleep(0.03)
    line.waits()
    time.sleep(0.05)
    line.computes()
    time.sleep(0.02)
    line.rests()
    time.sleep(0.04)
    other, state = read_board(board.view, (0, 1))
    took = time.monotonic() - began
    assert state.computing_seconds >= 0.05
    assert state.waiting_seconds >= 0.05
    assert state.idle_seconds >= 0.04
    assert state.computing_seconds + state.waiting_seconds + state.idle_seconds == pytest.approx(took, abs=0.02)
    assert (state.memory_bytes, state.watts) == (5 << 30, 412.5)
    assert (other.computing_seconds, other.memory_bytes) == (0.0, 0)
    # What it does at this moment counts already.
    line.begins(2)
    time.sleep(0.05)
    assert read_board(board.view, (0, 1))[1].computing_seconds >= state.computing_seconds + 0.05
    board.close()


def test_who_reads_a_line_that_is_being_written_sees_no_count_fall() -> None:
    board = create_board(1)
    writer = """
import sys
from engine.comm.board import BoardLine
from engine.comm.segment import Segment
line = BoardLine(Segment(int(sys.argv[1])).view, 0)
line.phase("serve")
print(flush=True)
while True:
    line.begins(1); line.waits(); line.computes(); line.rests()
"""
    argv = [sys.executable, "-c", writer, str(board.fd)]
    process = subprocess.Popen(argv, pass_fds=[board.fd], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    process.stdout.readline()
    falls, lasts = 0, [0.0] * 3
    try:
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            (state,) = read_board(board.view, (0,))
            assert state.phase == "serve"
            assert state.seconds >= 0.0
            now = [state.idle_seconds, state.computing_seconds, state.waiting_seconds]
            falls += any(after < before - 0.05 for before, after in zip(lasts, now, strict=True))
            lasts = now
    finally:
        process.kill()
        process.communicate()
        board.close()
    assert sum(lasts) > 1.0
    assert falls == 0


def test_the_rank_of_this_process_is_one_like_others() -> None:
    spec = nodes_placement(STAND_IN_CONFIG, ParallelSizes(1, 1, 1), 1).ranks[0]
    held = threading.Event()

    def measure() -> DeviceUsage:
        held.wait(20)
        return DeviceUsage(1 << 30, 300.0)

    own = OwnRank(spec, measure)
    with own.computing(1):
        # A device that does not answer holds nobody up.
        (rank,) = own.usage().ranks
        assert (rank.rank, rank.node, rank.device, rank.state) == (spec.rank, spec.node, spec.device, "computing")
        assert rank.memory_bytes == 0
        time.sleep(0.05)
    held.set()
    assert wait_until(lambda: own.usage().ranks[0].memory_bytes == 1 << 30, 5)
    (rank,) = own.usage().ranks
    assert (rank.state, rank.watts, rank.waiting_seconds) == ("idle", 300.0, 0.0)
    assert rank.computing_seconds >= 0.05
    own.stop()


def test_a_step_shows_as_long_as_it_lasts_however_many_wait_behind_it() -> None:
    memory = bytearray(LINE)
    line = BoardLine(memory, 0)
    line.phase("serve")
    steps = StepsUnderWay(line)
    for step in range(1, 6):
        steps.begin(step)
        time.sleep(0.03)
        if step > 1:
            steps.end()
            (state,) = read_board(memory, (0,))
            assert (state.activity, state.step_id) == (Activity.COMPUTES, step)
            assert state.seconds < 0.02, "the next step began when the one before it ended"
    time.sleep(0.05)
    assert read_board(memory, (0,))[0].seconds >= 0.05
    steps.end()
    (state,) = read_board(memory, (0,))
    assert state.activity is Activity.IDLE
    assert state.computing_seconds >= 5 * 0.03


def test_what_is_repeated_goes_on_after_an_error_that_is_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []

    def work() -> None:
        calls.append(len(calls))
        if len(calls) in (2, 3, 4, 6):
            raise OSError("too many open files")

    repeating = Repeating(work, 0.01, "test")
    assert wait_until(lambda: len(calls) >= 8, 5)
    repeating.stop()
    assert capfd.readouterr().err.count("OSError: too many open files") == 2


def test_a_gpu_is_measured_by_its_uuid_and_without_nvml_by_its_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from engine.worker.gpu_usage import GpuMeter

    class Nvml(ModuleType):
        def nvmlInit(self) -> None: ...

        def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
            return uuid

        def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
            assert handle == "GPU-67ec-2"
            return SimpleNamespace(used=5 << 30)

        def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
            return 412_500

    properties = {2: SimpleNamespace(uuid="67ec-2")}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml("pynvml"))
    assert GpuMeter(2).read() == DeviceUsage(5 << 30, 412.5)
    monkeypatch.setattr(Nvml, "nvmlDeviceGetPowerUsage", None)
    assert GpuMeter(2).read() == DeviceUsage(5 << 30)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3, 10))
    assert GpuMeter(2).read() == DeviceUsage(7)

    def broken(_: int) -> tuple[int, int]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    assert GpuMeter(2).read() == DeviceUsage()


def test_ranks_on_all_nodes_tell_what_they_do() -> None:
    executor, starter = start_on_nodes(PP2)
    try:

        def told() -> list[RankUsage]:
            ranks = executor.usage().ranks
            return ranks if len(ranks) == 2 and all(rank.memory_bytes for rank in ranks) else []

        # The other node's come by themselves, once a second.
        assert wait_until(lambda: bool(told()), 5)
        before = [rank.computing_seconds for rank in told()]
        serve(executor, 100)

        def have_computed() -> bool:
            # A step of a stand-in takes half a millisecond.
            pairs = zip(told() or [None, None], before, strict=True)
            return all(rank is not None and rank.computing_seconds > seconds + 0.05 for rank, seconds in pairs)

        assert wait_until(have_computed, 5)
        ranks = told()
        assert [(rank.rank, rank.node, rank.device, rank.state) for rank in ranks] == [
            (0, "node0", "cpu:0", "idle"), (1, "node1", "cpu:0", "idle"),
        ]  # fmt: skip
        assert all((rank.memory_bytes, rank.watts) == (3 << 20, 70.0) for rank in ranks)
        for place, pid in enumerate((executor.pids[0], children_of(starter.hosts["node1"].pid)[0])):
            os.kill(pid, signal.SIGSTOP)
            assert wait_until(lambda place=place: told()[place].state == "stopped by a signal", 5)
            assert told()[place].seconds < 3.0, "since it was stopped, not since it idles"
            os.kill(pid, signal.SIGCONT)
            assert wait_until(lambda place=place: told()[place].state == "idle", 5)
    finally:
        executor.stop()
        assert starter.end() == {"node1": 0}
    assert all(rank.state == "spawn" for rank in executor.usage().ranks if rank.node == "node0")


def test_a_servers_ranks_are_known_to_the_api_process_until_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        fatal = asyncio.Event()
        engine = AsyncEngine(CONFIG, lambda _: None, lambda _: fatal.set())
        engine.start()
        try:
            await asyncio.wait_for(engine.ready.wait(), 60)
            seen: list[EngineUsage] = []

            def is_seen_busy() -> bool:
                return bool({"computing", "waiting"} & {rank.state for usage in seen for rank in usage.ranks})

            # Figures come once a second: requests follow each other until some have come in the middle of one.
            deadline = time.monotonic() + 30
            while not is_seen_busy() and time.monotonic() < deadline:
                name = f"request {len(seen)}"
                request = EngineRequest(name, [7] * 20, SamplingParams(temperature=0.0), max_tokens=400, seed=1)
                async for _ in engine.submit(request):
                    seen += engine.usage_by_engine()
            assert is_seen_busy()
            await asyncio.sleep(2.5)
            (usage,) = engine.usage_by_engine()
            assert [(rank.rank, rank.device, rank.state) for rank in usage.ranks] == [
                (0, "cpu:0", "idle"), (1, "cpu:1", "idle"),
            ]  # fmt: skip
            for rank, pid in zip(usage.ranks, children_of(engine.core_pid), strict=True):
                resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                assert rank.memory_bytes == pytest.approx(resident, rel=0.1)
                first = next(past.ranks[rank.rank] for past in seen if past.ranks)
                assert rank.computing_seconds > first.computing_seconds + 0.05
                assert rank.waiting_seconds > first.waiting_seconds
                assert rank.seconds > 0.5
            os.kill(engine.core_pid, signal.SIGSTOP)
            monkeypatch.setattr(usages, "SILENT_SECONDS", 1.2)
            await asyncio.sleep(1.5)
            assert {rank.state for rank in engine.usage_by_engine()[0].ranks} == {"silent"}
            os.kill(engine.core_pid, signal.SIGCONT)
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
