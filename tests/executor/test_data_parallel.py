"""Two engines behind one face: the same tokens, shared load, and one that dies comes back while the other serves."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from executor_support import HERE, children_of, is_running, wait_until
from nodes_support import nodes_config, nodes_placement
from test_async_ranks import CONFIG
from test_parallel_tokens import BASE, requests, run

from engine import ipc, restarts
from engine.async_engine import EngineState, EngineUnavailable
from engine.core.request import EngineRequest, FinishReason, RequestOutput
from engine.data_parallel import DataParallelEngine
from engine.engine_core import EngineCore
from engine.placement import ParallelSizes

TWO = replace(BASE, data_parallel_size=2, cpu_threads=1)


async def answer(engine: DataParallelEngine, request: EngineRequest) -> tuple[list[int], RequestOutput]:
    tokens: list[int] = []
    last = None
    async for output in engine.submit(request):
        tokens += output.new_token_ids
        last = output
    assert last is not None
    return tokens, last


async def started(config: object = TWO) -> tuple[DataParallelEngine, list[ipc.FatalMessage]]:
    causes: list[ipc.FatalMessage] = []
    engine = DataParallelEngine(config, lambda _: None, causes.append)  # type: ignore[arg-type]
    assert isinstance(engine, DataParallelEngine)
    assert engine.state is EngineState.STARTING
    engine.start()
    await asyncio.wait_for(engine.ready.wait(), 60)
    assert engine.state is EngineState.READY
    return engine, causes


def test_two_engines_say_what_one_says_and_share_the_load() -> None:
    items = requests(3)
    core = EngineCore.start(BASE)
    expected = run(core, items)

    async def serve() -> dict[str, list[int]]:
        engine, causes = await started()
        assert engine.facts["engines"] == 2
        assert engine.facts["num_blocks"] == 2 * 256
        found = await asyncio.gather(*(answer(engine, item) for item in items))
        shares = [part.stats().generation_tokens for part in engine.engines]
        one = [replace(items[0], request_id=f"of {rank}", max_tokens=1) for rank in range(2)]
        assert [part.submit(item).engine for part, item in zip(engine.engines, one, strict=True)] == [0, 1]
        await engine.stop()
        assert not causes
        # Eight requests of 32 tokens each.
        assert sorted(shares) == [4 * 32, 4 * 32]
        return {item.request_id: tokens for item, (tokens, _) in zip(items, found, strict=True)}

    assert asyncio.run(serve()) == expected


def test_a_dead_engine_ends_its_own_requests_and_comes_back() -> None:
    async def serve() -> None:
        engine, causes = await started(replace(TWO, max_model_len=2048, cache=replace(TWO.cache, num_blocks=2048)))
        items = [replace(item, max_tokens=1500) for item in requests(3)]
        running = [asyncio.ensure_future(answer(engine, item)) for item in items]
        await asyncio.sleep(0.2)
        victim = engine.core_pids[1]
        os.kill(victim, signal.SIGKILL)
        struck = time.monotonic()
        await asyncio.sleep(0.3)
        # The other goes on taking requests; what the dead one held is gone with it.
        assert engine.state is EngineState.DEGRADED
        assert engine.states_by_engine()[0] is EngineState.READY
        gone = engine.stats_by_engine()[1]
        assert (gone.num_running, gone.num_waiting, gone.num_used_blocks) == (0, 0, 0)
        _, last = await answer(engine, replace(items[0], request_id="new", max_tokens=5))
        assert last.finish_reason is FinishReason.LENGTH
        ends = [(await task)[1] for task in running]
        errors = [end for end in ends if end.finish_reason is FinishReason.ERROR]
        assert len(errors) == 4
        assert all((end.error or "").startswith("engine_dead") for end in errors)
        while engine.engines[1].state is not EngineState.READY:
            assert time.monotonic() - struck < 10.0
            await asyncio.sleep(0.05)
        again = [
            await answer(engine, replace(item, request_id=f"again {item.request_id}", max_tokens=3)) for item in items
        ]
        assert all(end.finish_reason is FinishReason.LENGTH for _, end in again)
        assert engine.engines[1].stats().generation_tokens > 0
        pids = engine.core_pids
        await engine.stop()
        assert not causes
        assert wait_until(lambda: not any(map(is_running, [*pids, victim])), 5.0)

    asyncio.run(serve())


def test_an_engine_that_cannot_start_ends_everything() -> None:
    async def serve() -> ipc.FatalMessage:
        causes: list[ipc.FatalMessage] = []
        config = replace(CONFIG, tensor_parallel_size=1, data_parallel_size=2, max_model_len=1 << 20)
        engine = DataParallelEngine(config, lambda _: None, causes.append)
        engine.start()
        deadline = time.monotonic() + 30
        while not causes and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        assert engine.state is EngineState.FAILED
        await engine.stop()
        return causes[0]

    cause = asyncio.run(serve())
    assert cause.message.startswith("engine ")
    assert "positions" in cause.message


class Mortal:
    """An engine without a process: it serves as soon as it is started, until it is struck."""

    folder = model = None
    num_unfinished = 0
    has_served = True

    def __init__(self, on_fatal: Callable[[ipc.FatalMessage], None]) -> None:
        self.state = EngineState.STARTING
        self.ready = asyncio.Event()
        self.on_fatal = on_fatal

    def start(self) -> None:
        self.state = EngineState.READY
        self.ready.set()

    def strike(self) -> None:
        self.state = EngineState.FAILED
        self.on_fatal(ipc.FatalMessage("serve", "EngineDied", "it was killed"))

    async def stop(self) -> None:
        pass


class Mortals:
    """Two of them behind one face. Times are much shorter than they are."""

    def __init__(self, max_restarts: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.causes: list[ipc.FatalMessage] = []
        self.phases: list[ipc.PhaseMessage] = []

        def spawn(face: DataParallelEngine, rank: int) -> Mortal:
            def on_fatal(message: ipc.FatalMessage) -> None:
                face._on_engine_fatal(rank, message, has_served=True)

            return Mortal(on_fatal)

        monkeypatch.setattr(DataParallelEngine, "_spawn", spawn)
        monkeypatch.setattr(restarts, "FIRST_BACKOFF_SECONDS", 0.01)
        monkeypatch.setattr(restarts, "WINDOW_SECONDS", 1.5)
        self.face = DataParallelEngine(replace(TWO, max_restarts=max_restarts), self.phases.append, self.causes.append)

    async def strike(self, rank: int) -> None:
        part = self.face.engines[rank]
        assert isinstance(part, Mortal)
        part.strike()

    async def comes(self, state: EngineState, rank: int | None = None) -> None:
        async with asyncio.timeout(5):
            while (self.face if rank is None else self.face.engines[rank]).state is not state:
                await asyncio.sleep(0.005)


def test_a_replica_that_is_given_up_is_known_and_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    async def serve() -> None:
        both = Mortals(2, monkeypatch)
        both.face.start()
        await both.comes(EngineState.READY)
        for _ in range(2):
            await both.strike(1)
            assert both.face.state is EngineState.DEGRADED
            await both.comes(EngineState.READY)
        began = time.monotonic()
        await both.strike(1)
        assert both.phases[-1].state == "begin"
        assert both.phases[-1].detail.startswith("engine 1: it was killed; it is started again in ")
        assert both.phases[-1].detail.endswith(", after 2 restarts in 10 minutes")
        await asyncio.sleep(0.2)
        assert both.face.states_by_engine() == [EngineState.READY, EngineState.FAILED]
        assert both.face.state is EngineState.DEGRADED
        await both.comes(EngineState.READY)
        assert 0.5 < time.monotonic() - began < 4.0
        assert (both.phases[-1].state, both.causes) == ("end", [])
        await both.face.stop()

    asyncio.run(serve())


def test_when_no_replica_is_left_all_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def serve() -> None:
        both = Mortals(1, monkeypatch)
        both.face.start()
        await both.comes(EngineState.READY)
        for rank in (0, 1):
            await both.strike(rank)
            await both.comes(EngineState.READY)
        await both.strike(0)
        assert not both.causes
        await both.strike(1)
        assert both.face.state is EngineState.FAILED
        (cause,) = both.causes
        assert cause.message == "engine 1: it was killed; it is given up after 1 restart in 10 minutes"
        assert cause.exit_code == 70
        await both.face.stop()

    asyncio.run(serve())


def test_a_server_that_gives_up_ends_with_its_own_code(tmp_path: Path) -> None:
    config = replace(TWO, data_parallel_size=1, max_restarts=0, server=replace(TWO.server, port=0))
    path = tmp_path / "engine.json"
    path.write_text(config.to_json())
    read_end, write_end = os.pipe()
    command = [sys.executable, "-m", "engine.server", "--config", str(path), "--status-fd", str(write_end)]
    with subprocess.Popen(command, cwd=HERE.parents[1], pass_fds=[write_end], stderr=subprocess.PIPE) as server:
        os.close(write_end)
        try:
            with open(read_end) as status:
                records = map(json.loads, status)
                next(record for record in records if record["kind"] == "ready")
                (core,) = (pid for pid in children_of(server.pid) if is_core(pid))
                os.kill(core, signal.SIGKILL)
                fatal = next(record for record in records if record["kind"] == "fatal")
            assert server.wait(10) == fatal["exit_code"] == 70
            assert server.stderr is not None
            last = server.stderr.read().decode().splitlines()[-1]
        finally:
            server.kill()
    assert last == f"error: {fatal['message']}"
    assert "was killed by SIGKILL" in last
    assert last.endswith("it is not to be started again")


def is_core(pid: int) -> bool:
    return b"engine.core_process" in Path(f"/proc/{pid}/cmdline").read_bytes()


class Queue:
    """An engine of which only the queue matters: it has room for so many."""

    folder = model = None
    state = EngineState.READY

    def __init__(self, room: int) -> None:
        self.room = room
        self.num_unfinished = 0

    def submit(self, request: EngineRequest) -> int:
        if self.num_unfinished == self.room:
            raise EngineUnavailable("overloaded", "the queue is full")
        self.num_unfinished += 1
        return self.num_unfinished


def test_nobody_is_turned_away_while_one_engine_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [Queue(4), Queue(4), Queue(40)]
    monkeypatch.setattr(DataParallelEngine, "_spawn", lambda _, rank: parts[rank])
    engine = DataParallelEngine(replace(TWO, data_parallel_size=3), lambda _: None, lambda _: None)
    engine._has_been_ready = True
    one = replace(requests(1)[0], conversation="everybody's")
    for _ in range(48):
        engine.submit(one)
    assert [part.num_unfinished for part in parts] == [4, 4, 40]
    waiting = [load.waiting for load in engine._balancer.loads]
    with pytest.raises(EngineUnavailable, match="the queue is full") as caught:
        engine.submit(one)
    assert caught.value.code == "overloaded"
    # What no engine took is nowhere, and leaves no trace.
    assert [load.waiting for load in engine._balancer.loads] == waiting == [4, 4, 40]


class Part:
    """An engine of which only the end matters."""

    folder = model = None

    def __init__(self, error: Exception | None) -> None:
        self.error = error
        self.is_stopped = False

    async def stop(self) -> None:
        if self.error is not None:
            raise self.error
        await asyncio.sleep(0.05)
        self.is_stopped = True


def test_an_engine_that_cannot_be_stopped_keeps_neither_the_others_nor_the_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = [Part(PermissionError("not this one")), Part(None)]
    monkeypatch.setenv("HLAUNCH_NODE_SECRET", "a secret of the test, long enough")
    monkeypatch.setattr(DataParallelEngine, "_spawn", lambda _, rank: parts[rank])
    config = nodes_config(BASE, nodes_placement(BASE, ParallelSizes(2, 1, 1)))

    async def serve() -> None:
        engine = DataParallelEngine(config, lambda _: None, lambda _: None)
        assert engine._desk is not None
        port = engine._desk.port
        socket.create_connection(("127.0.0.1", port), 5).close()
        with pytest.raises(PermissionError, match="not this one"):
            await engine.stop()
        assert parts[1].is_stopped
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 5)

    asyncio.run(serve())
