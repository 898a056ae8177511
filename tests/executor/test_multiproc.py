"""Ranks as processes: plans out, results back, and every way in which a rank can fail, named and in time."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from executor_support import (
    CONFIG,
    HERE,
    add_requests,
    drive,
    is_running,
    leftovers,
    new_scheduler,
    stacks_of,
    start,
    wait_until,
)

from engine.core.request import FinishReason
from engine.core.scheduler import Scheduler
from engine.engine_core import open_model, place
from engine.executor.base import ExecutorError
from engine.executor.messages import EndedReport, Report
from engine.executor.multinode import MultiNodeExecutor
from engine.executor.multiproc_watch import RankHandle, RankWatch, describe_end
from engine.executor.roster import RankFailure
from engine.process import ask_for_stacks


@pytest.mark.parametrize(("num_ranks", "num_stages"), [(2, 1), (2, 2)])
def test_plans_go_out_and_results_come_back(num_ranks: int, num_stages: int) -> None:
    before = leftovers()
    executor = start(num_ranks, num_stages=num_stages)
    scheduler = new_scheduler()
    add_requests(scheduler, 6, 20)
    outputs = drive(executor, scheduler)
    assert sum(len(output.new_token_ids) for output in outputs) == 6 * 20
    assert sum(output.finish_reason is FinishReason.LENGTH for output in outputs) == 6
    pids = executor.pids
    began = time.monotonic()
    executor.stop()
    executor.stop()
    assert time.monotonic() - began < 4.0
    assert not any(map(is_running, pids))
    with pytest.raises(ExecutorError, match="stopped"):
        executor.submit(None)  # type: ignore[arg-type]
    assert leftovers() == before


FAULTS = {
    "raise": r"rank 1 \(node localhost, cpu:1\) failed: RuntimeError: a kernel went wrong; phase serve",
    "exit": r"rank 1 \(node localhost, cpu:1\) ended by itself with code 7; phase serve",
    "unnamed signal": r"rank 1 \(node localhost, cpu:1\) was killed by signal 40; phase serve",
    "kill": r"rank 1 \(node localhost, cpu:1\) was killed by SIGKILL \(out of memory\?\); phase serve",
    "hang": r"rank 1 \(node localhost, cpu:1\) did not finish step 5 within 1 s: computing in step 5 for \d\.\d s",
    "stop": r"rank 1 \(node localhost, cpu:1\) did not finish step 5 within 1 s: computing .*, stopped by a signal",
}


DEAF = """
import signal, time
from engine.process import dump_stacks_on_signal
dump_stacks_on_signal()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
print("deaf", flush=True)
time.sleep(60)
"""


def test_who_shows_no_stacks_is_shown_as_the_kernel_sees_it() -> None:
    with subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, cwd=HERE.parents[1]) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            assert re.match(r"it takes no signal; State: S \(sleeping\)", ask_for_stacks(process.pid))
        finally:
            process.kill()
    assert ask_for_stacks(process.pid) == "it has ended"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (-9, "was killed by SIGKILL (out of memory?)"),
        (-signal.SIGRTMIN, "was killed by SIGRTMIN"),
        (-40, "was killed by signal 40"),
        (3, "ended by itself with code 3"),
    ],
)
def test_every_end_has_a_name(code: int, expected: str) -> None:
    assert describe_end(code) == expected


def test_the_watch_outlives_whoever_hears_it(capfd: pytest.CaptureFixture[str]) -> None:
    heard: list[Report] = []

    def hear(report: Report) -> None:
        heard.append(report)
        raise RuntimeError("who hears it breaks")

    handles = []
    for rank in range(2):
        ours, theirs = socket.socketpair()
        process = subprocess.Popen(["sleep", "60"], pass_fds=[theirs.fileno()])
        theirs.close()
        spec = place(CONFIG, open_model(CONFIG)[1]).ranks[rank]
        handles.append(RankHandle(spec, process, ours, os.pidfd_open(process.pid)))
    watch = RankWatch(handles, hear)
    for rank, handle in enumerate(handles):
        handle.process.send_signal(40)
        assert wait_until(lambda rank=rank: len(heard) == rank + 1, 5.0)  # type: ignore[misc]
    watch.stop()
    for handle in handles:
        handle.control.close()
        os.close(handle.pidfd)
    assert heard == [EndedReport(rank, "was killed by signal 40") for rank in range(2)]
    assert capfd.readouterr().err.count("who hears it breaks") >= 2


def test_ranks_outlive_the_thread_that_wanted_them() -> None:
    with ThreadPoolExecutor(1) as pool:
        executor = pool.submit(start, 2).result()
    scheduler = new_scheduler()
    add_requests(scheduler, 2, 20)
    time.sleep(0.2)
    assert len(drive(executor, scheduler)) == 40
    threads = threading.enumerate()
    executor.stop()
    assert wait_until(lambda: not any(thread.is_alive() for thread in threads if "rank" in thread.name), 2.0)


@pytest.mark.parametrize(
    # Stand-ins do not meet each other: the rank that answers does not wait for one that hangs.
    ("kind", "place"),
    [
        ("raise", 0),
        ("raise", 1),
        ("exit", 1),
        ("kill", 0),
        ("kill", 1),
        ("unnamed signal", 1),
        ("hang", 0),
        ("stop", 0),
    ],
)
def test_a_rank_that_fails_in_a_step_is_named(
    kind: str, place: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STAND_IN_FAULT", f"{place}:{kind}:5")
    before = leftovers()
    executor = start(2, step_timeout_seconds=1.0)
    pids = executor.pids
    scheduler = new_scheduler()
    add_requests(scheduler, 4, 5000 // 16)
    expected = FAULTS[kind].replace("rank 1", f"rank {place}").replace("cpu:1", f"cpu:{place}")
    began = time.monotonic()
    with pytest.raises(RankFailure, match=expected) as caught:
        drive(executor, scheduler)
    assert time.monotonic() - began < 8.0
    assert (caught.value.rank, caught.value.phase) == (place, "serve")
    with pytest.raises(RankFailure):
        executor.collect()
    began = time.monotonic()
    executor.stop()
    assert time.monotonic() - began < 3.0
    assert not any(map(is_running, pids))
    assert leftovers() == before
    if kind in ("hang", "stop"):
        # As faulthandler writes it: a trace that the rank makes of its own has a comma there.
        assert re.search(r'stand_in_rank.py", line \d+ in execute', stacks_of(capfd.readouterr().err, place))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("no load", "rank 1 .* failed: ValueError: the weights are of another model; phase load"),
        ("silent load", r"rank 1 .* has said nothing for \d s \(waited for: load\).*; phase load"),
        ("no memory", "rank 1 .* failed: MemoryError: 64 blocks; phase kv"),
    ],
)
def test_a_rank_that_does_not_come_up_is_named(kind: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_FAULT", f"1:{kind}:0")
    before = leftovers()
    with pytest.raises(RankFailure, match=expected) as caught:
        start(2, silence_seconds=1.0 if kind == "silent load" else 30.0)
    assert caught.value.does_not_fit == (kind == "no memory")
    assert leftovers() == before


def test_a_rank_speaks_before_it_imports_torch() -> None:
    code = "import sys, engine.executor.multiproc_rank; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE.parents[1])
    assert done.stdout.strip() == "False"


def test_a_death_is_noticed_while_nothing_runs() -> None:
    executor = start(2)
    heard = threading.Event()
    causes: list[ExecutorError] = []
    executor.on_failure(lambda cause: (causes.append(cause), heard.set()))
    os.kill(executor.pids[1], signal.SIGKILL)
    assert heard.wait(5.0)
    assert "rank 1" in str(causes[0])
    executor.stop()


def drive_for_ever(executor: MultiNodeExecutor, scheduler: Scheduler) -> None:
    while True:
        drive(executor, scheduler)
        add_requests(scheduler, 8, 400)


def kill_storm(num_kills: int, seed: int) -> None:
    """Kill a random rank at a random moment under load: the loop must learn of it within five seconds."""
    source = random.Random(seed)
    before = leftovers()
    for _ in range(num_kills):
        executor = start(source.choice([2, 4]))
        pids = executor.pids
        scheduler = new_scheduler()
        add_requests(scheduler, 8, 400)
        victim = source.randrange(len(pids))
        killed_at: list[float] = []

        def kill(pid: int = pids[victim], killed_at: list[float] = killed_at) -> None:
            killed_at.append(time.monotonic())
            os.kill(pid, signal.SIGKILL)

        timer = threading.Timer(source.random() * 0.15, kill)
        timer.start()
        with pytest.raises(RankFailure, match=f"rank {victim} .* was killed by SIGKILL"):
            drive_for_ever(executor, scheduler)
        assert time.monotonic() - killed_at[0] < 5.0
        timer.join()
        outputs = scheduler.fail([f"r{index}" for index in range(8)], "engine_dead")
        assert all(output.finish_reason is FinishReason.ERROR for output in outputs)
        executor.stop()
        assert not any(map(is_running, pids))
        assert leftovers() == before


@contextlib.contextmanager
def owner_of_ranks(step_timeout_seconds: float) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Run two busy ranks and the process that owns them; yields it and their ids."""
    owner = subprocess.Popen(
        [sys.executable, str(HERE / "stand_in_core.py"), "2", str(step_timeout_seconds)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
    )
    try:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 2
        yield owner, pids
    finally:
        owner.kill()
        owner.communicate()


def owner_storm(num_kills: int, seed: int) -> None:
    """Kill the process that owns the ranks: they go with it."""
    source = random.Random(seed)
    names = leftovers()[0]
    for _ in range(num_kills):
        with owner_of_ranks(30.0) as (_, pids):
            time.sleep(source.random() * 0.1)
        assert wait_until(lambda pids=pids: not any(map(is_running, pids)), 5.0)
        assert leftovers()[0] == names


def test_a_pause_of_the_whole_engine_is_no_hang() -> None:
    with owner_of_ranks(1.0) as (owner, pids):
        assert owner.stdout is not None
        for _ in range(2):
            assert owner.stdout.readline() == "round\n"
            for pid in (owner.pid, *pids):
                os.kill(pid, signal.SIGSTOP)
            time.sleep(2.0)
            for pid in (owner.pid, *pids):
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.2)  # the ranks go on when the deadline has long passed for who waits for them
        for _ in range(3):
            assert owner.stdout.readline() == "round\n"
        # One that stands still alone is still found.
        os.kill(pids[1], signal.SIGSTOP)
        assert owner.wait(10) == 1


def test_kills_under_load_leave_nothing_behind() -> None:
    kill_storm(14, seed=1)
    owner_storm(4, seed=2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_hundred_kills() -> None:
    kill_storm(150, seed=3)
    owner_storm(50, seed=4)
