"""A log on a full disk, or one that nobody reads: lines are lost, and nothing else is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
from executor_support import add_requests, drive, new_scheduler, start, wait_until
from nodes_support import nodes_config, nodes_placement
from test_data_parallel import TWO, answer, started
from test_node_desk import CONFIG, FACTS, SECRET, come
from test_parallel_tokens import requests

from engine.async_engine import EngineState
from engine.comm.node_messages import Hello, NodeKind
from engine.executor.roster import RankFailure
from engine.node_desk import NodeDesk
from engine.placement import ParallelSizes
from engine.process import say, say_trace


@contextlib.contextmanager
def dead_log(dead: int) -> Iterator[None]:
    """Let descriptor 2, which children inherit, and `sys.stderr` be one that takes nothing."""
    kept, stream = os.dup(2), sys.stderr
    os.dup2(dead, 2)
    os.close(dead)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - what it holds is lost on purpose
    try:
        with pytest.raises(OSError, match="No space|Broken pipe"):
            os.write(2, b"what all this is about")
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        sys.stderr = stream


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def gone_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("kind", [full_disk, gone_reader])
def test_what_cannot_be_said_is_no_error(kind: Callable[[], int]) -> None:
    with dead_log(kind()):
        say("nobody hears this")
        say_trace(ValueError("nor this"))


def test_what_can_be_said_is_said_in_one_piece(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    say("one \udcff line")
    say_trace(ValueError("two"))
    assert capfd.readouterr().err == "one \\udcff line\nValueError: two\n"
    lines: list[str] = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(flush=int, fileno=lambda: int("none"), write=lines.append))
    say("into a buffer")
    assert lines == ["into a buffer\n"]
    monkeypatch.setattr(sys, "stderr", None)
    say("not even a stream")


def test_an_engine_that_dies_is_started_again() -> None:
    async def serve() -> None:
        engine, causes = await started(replace(TWO, data_parallel_size=1))
        try:
            await answer(engine, replace(requests(1)[0], max_tokens=3))
            first = engine.engines[0]
            os.kill(first.core_pid, signal.SIGKILL)
            async with asyncio.timeout(60):
                while engine.engines[0] is first or engine.state is not EngineState.READY:
                    await asyncio.sleep(0.05)
            assert not causes
        finally:
            await engine.stop()

    with dead_log(full_disk()):
        asyncio.run(serve())


@pytest.mark.parametrize(
    ("kind", "expected"), [("raise", "RuntimeError: a kernel went wrong"), ("hang", "did not finish step 5 within 1 s")]
)
def test_a_rank_that_fails_is_named(kind: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_FAULT", f"0:{kind}:5")
    scheduler = new_scheduler()
    add_requests(scheduler, 4, 5000 // 16)
    with dead_log(full_disk()):
        executor = start(2, step_timeout_seconds=1.0)
        try:
            with pytest.raises(RankFailure, match=rf"rank 0 .*{expected}"):
                drive(executor, scheduler)
        finally:
            executor.stop()


def test_the_desk_goes_on_letting_nodes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HLAUNCH_NODE_SECRET", SECRET)
    with dead_log(gone_reader()):
        desk = NodeDesk(nodes_config(CONFIG, nodes_placement(CONFIG, ParallelSizes(2, 1, 1))), FACTS)
        try:
            stranger, kind, _ = come(desk, Hello("nobody", "", FACTS))
            assert kind == NodeKind.REFUSED
            stranger.dispose()
            with socket.create_connection(("127.0.0.1", desk.port), 5) as scanner:
                scanner.sendall(b"GET / HTTP/1.1\r\n\r\n" * 8)
            for _ in range(2):
                link, kind, _ = come(desk, Hello("node1", "", FACTS))
                assert kind == NodeKind.WELCOME
                assert wait_until(lambda: desk.joined == ("node1",), 2)
                link.dispose()
                assert wait_until(lambda: desk.joined == (), 2)
        finally:
            desk.close()
