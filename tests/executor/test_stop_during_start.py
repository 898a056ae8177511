"""A stop while an engine starts: everything ends in order and soon, whatever the start is at."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from executor_support import HERE, children_of, is_running, wait_until
from nodes_support import nodes_config, nodes_placement
from test_async_ranks import CONFIG

from engine import ipc
from engine.async_engine import STOP_GRACE_SECONDS, AsyncEngine
from engine.config import EngineConfig
from engine.placement import ParallelSizes

ONE = replace(CONFIG, tensor_parallel_size=1)
ORDERLY_SECONDS = STOP_GRACE_SECONDS - 0.5
"""Many times what it takes, and less than what a core gets before it is killed."""


async def stop_at(config: EngineConfig, phase: str, strike: Callable[[int], list[int]]) -> tuple[int, float, list[int]]:
    """Stop an engine when its start has come to a phase; returns the core's exit code, seconds and all processes."""
    reached = asyncio.Event()

    def on_phase(message: ipc.PhaseMessage) -> None:
        if message.phase == phase:
            reached.set()

    engine = AsyncEngine(config, on_phase, lambda _: None)
    engine.start()
    await asyncio.wait_for(reached.wait(), 60)
    pids = [engine.core_pid, *strike(engine.core_pid)]
    began = time.monotonic()
    await engine.stop()
    code = engine._process.returncode
    return code, time.monotonic() - began, pids


def has_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def freeze_ranks(core_pid: int) -> list[int]:
    """Stop the ranks' processes, so that they hear nothing and report nothing, as one in a long read does."""
    assert wait_until(lambda: len(children_of(core_pid)) == 2 and all(map(has_torch, children_of(core_pid))), 60)
    ranks = children_of(core_pid)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    return ranks


@pytest.mark.parametrize(
    ("config", "phase", "strike"),
    [(ONE, "import", lambda _: []), (ONE, "load", lambda _: []), (CONFIG, "load", freeze_ranks)],
    ids=["import", "load", "ranks that hear nothing"],
)
def test_an_engine_is_stopped_while_it_starts(
    config: EngineConfig, phase: str, strike: Callable[[int], list[int]]
) -> None:
    code, seconds, pids = asyncio.run(stop_at(config, phase, strike))
    assert code == 0, "the core ended by itself, it was not killed"
    assert seconds < ORDERLY_SECONDS
    assert wait_until(lambda: not any(map(is_running, pids)), 5)


DEAF = """
import hashlib, socket, sys
from engine.core_process import _Inbox, _Link
_Inbox(_Link(int(sys.argv[1])))
print("deaf", flush=True)
hashlib.pbkdf2_hmac("sha256", b"a library", b"that returns late", 10**9)
"""


def ticks_of(pid: int) -> int:
    """Processor time that a process has used."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


def test_a_start_deep_in_a_library_ends_all_the_same() -> None:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-c", DEAF, str(theirs.fileno())]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, cwd=HERE.parents[1]) as process:
        theirs.close()
        assert process.stdout is not None
        process.stdout.readline()
        ticks = ticks_of(process.pid)
        assert wait_until(lambda: ticks_of(process.pid) > ticks + 5, 30), "it computes"
        ours.close()
        try:
            assert process.wait(10) == 0
        finally:
            process.kill()


class Launched:
    """Processes of a launch as the launcher starts them, each with its status pipe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environ = {"PATH": os.environ["PATH"], "HLAUNCH_NODE_SECRET": "a secret of the test, long enough"}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.pipes = contextlib.ExitStack()

    def start(self, module: str, config: EngineConfig) -> tuple[subprocess.Popen[bytes], Iterator[dict[str, object]]]:
        path = self._folder / f"{module}.json"
        path.write_text(config.to_json())
        read_end, write_end = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--config", str(path), "--status-fd", str(write_end)],
            cwd=HERE.parents[1],
            env=self._environ,
            pass_fds=(write_end,),
        )
        os.close(write_end)
        self.processes.append(process)
        return process, map(json.loads, self.pipes.enter_context(open(read_end)))


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launched]:
    made = Launched(tmp_path)
    yield made
    for process in made.processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
    made.pipes.close()


def until(records: Iterator[dict[str, object]], phase: str) -> None:
    assert any(record.get("phase") == phase for record in records), f"no phase {phase}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def below(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):  # it has just ended
        found = children_of(pid)
    return found + [pid for child in found for pid in below(child)]


@pytest.mark.parametrize(
    ("phase", "number"),
    [("spawn", signal.SIGINT), ("import", signal.SIGTERM), ("load", signal.SIGTERM), ("load", signal.SIGINT)],
)
def test_a_server_is_stopped_while_it_starts(phase: str, number: signal.Signals, launched: Launched) -> None:
    config = replace(CONFIG, server=replace(CONFIG.server, port=0))
    process, records = launched.start("engine.server", config)
    until(records, phase)
    pids = below(process.pid)
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(10) == 0
    assert time.monotonic() - began < ORDERLY_SECONDS
    assert not [record for record in records if record["kind"] == "fatal"]
    assert wait_until(lambda: not any(map(is_running, pids)), 5)


@pytest.mark.parametrize("phase", ["nodes", "load"])
def test_a_launch_on_two_nodes_is_stopped_while_it_starts(phase: str, launched: Launched) -> None:
    base = replace(CONFIG, server=replace(CONFIG.server, port=0))
    config = nodes_config(base, nodes_placement(base, ParallelSizes(1, 2, 1)))
    head_nodes = replace(config.nodes, head_port=free_port())
    head, records = launched.start("engine.server", replace(config, nodes=head_nodes))
    until(records, "nodes")
    if phase == "load":
        worker, _ = launched.start("engine.executor.node_agent", replace(config, nodes=replace(head_nodes, rank=1)))
        until(records, "load")
    pids = [pid for process in launched.processes for pid in below(process.pid)]
    began = time.monotonic()
    head.send_signal(signal.SIGTERM)
    assert head.wait(10) == 0
    if phase == "load":
        assert worker.wait(10) == 0, "the other node was told"
    assert time.monotonic() - began < ORDERLY_SECONDS
    assert wait_until(lambda: not any(map(is_running, pids)), 5)


def test_a_node_is_stopped_while_its_head_says_nothing(launched: Launched) -> None:
    config = nodes_config(CONFIG, nodes_placement(CONFIG, ParallelSizes(2, 1, 1)))
    with socket.create_server(("127.0.0.1", 0)) as door:
        nodes = replace(config.nodes, rank=1, head_port=door.getsockname()[1])
        process, records = launched.start("engine.executor.node_agent", replace(config, nodes=nodes))
        until(records, "join")
        came, _ = door.accept()
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert time.monotonic() - began < ORDERLY_SECONDS
        came.close()
