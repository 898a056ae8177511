"""Real ranks behind the asyncio face: clients get their tokens, or an error in time that names the rank."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from executor_support import children_of, is_running, stacks_of, wait_until

from engine import ipc
from engine.async_engine import AsyncEngine
from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.core.request import EngineRequest, FinishReason, RequestOutput
from engine.core.sampling_params import SamplingParams

CONFIG = EngineConfig(
    model="tiny-oss",
    max_model_len=512,
    cpu_threads=1,
    tensor_parallel_size=2,
    step_timeout_seconds=2.0,
    scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=256),
    cache=CacheConfig(num_blocks=256),
)


async def serve_until_fatal(
    config: EngineConfig, strike: Callable[[AsyncEngine, list[int]], None], *, idle: bool
) -> tuple[list[RequestOutput], ipc.FatalMessage, float, list[int]]:
    """Start an engine under load (or idle), strike it, and return the clients' last outputs and the stated cause."""
    fatal: asyncio.Future[ipc.FatalMessage] = asyncio.get_running_loop().create_future()
    engine = AsyncEngine(config, lambda _: None, lambda message: fatal.done() or fatal.set_result(message))
    engine.start()
    await asyncio.wait_for(engine.ready.wait(), 60)
    pids = children_of(engine.core_pid)  # spawned in rank order
    assert len(pids) == 2

    async def client(index: int) -> RequestOutput:
        request = EngineRequest(f"r{index}", [7 + index] * 20, SamplingParams(temperature=0.0), max_tokens=480, seed=1)
        last = None
        async for output in engine.submit(request):
            last = output
        assert last is not None
        return last

    clients = [] if idle else [asyncio.ensure_future(client(index)) for index in range(6)]
    await asyncio.sleep(0.1)
    struck = time.monotonic()
    strike(engine, pids)
    try:
        outputs = list(await asyncio.wait_for(asyncio.gather(*clients), 10))
        cause = await asyncio.wait_for(fatal, 10)
        seconds = time.monotonic() - struck
    finally:
        await engine.stop()
    return outputs, cause, seconds, [engine.core_pid, *pids]


@pytest.mark.parametrize("idle", [False, True], ids=["under load", "idle"])
def test_a_killed_rank_ends_its_requests_with_its_name(idle: bool) -> None:
    place = random.Random(idle).randrange(2)

    def strike(_: AsyncEngine, pids: list[int]) -> None:
        os.kill(pids[place], signal.SIGKILL)

    outputs, cause, seconds, pids = asyncio.run(serve_until_fatal(CONFIG, strike, idle=idle))
    assert seconds < 5.0
    assert re.search(rf"rank {place} \(node localhost, cpu:{place}\) was killed by SIGKILL", cause.message)
    assert all(output.finish_reason is FinishReason.ERROR for output in outputs)
    assert all((output.error or "").startswith("engine_dead") for output in outputs)
    assert wait_until(lambda: not any(map(is_running, pids)), 5.0)


def test_a_killed_core_takes_its_ranks_along() -> None:
    outputs, cause, seconds, pids = asyncio.run(
        serve_until_fatal(CONFIG, lambda engine, _: os.kill(engine.core_pid, signal.SIGKILL), idle=False)
    )
    assert seconds < 5.0
    assert "killed by SIGKILL" in cause.message
    assert all(output.finish_reason is FinishReason.ERROR for output in outputs)
    assert wait_until(lambda: not any(map(is_running, pids)), 5.0)


def test_a_rank_that_stands_still_is_told_from_the_one_that_waits_for_it(capfd: pytest.CaptureFixture[str]) -> None:
    def strike(_: AsyncEngine, pids: list[int]) -> None:
        os.kill(pids[1], signal.SIGSTOP)

    outputs, cause, seconds, pids = asyncio.run(serve_until_fatal(CONFIG, strike, idle=False))
    assert seconds < CONFIG.step_timeout_seconds + 3.0
    assert re.search(
        r"rank 1 \(node localhost, cpu:1\) did not finish step \d+ within 2 s: .*, stopped by a signal; ranks 0 wait",
        cause.message,
    )
    assert all(output.finish_reason is FinishReason.ERROR for output in outputs)
    assert wait_until(lambda: not any(map(is_running, pids)), 5.0)
    log = capfd.readouterr().err
    assert re.search(r"line \d+ in (all_reduce|all_gather)", stacks_of(log, 0))
    # It was stopped, and is the one that people want to look into.
    assert re.search(r"line \d+ in main", stacks_of(log, 1))


def test_a_checkpoint_that_no_rank_can_load_is_the_cause(tmp_path: Path) -> None:
    from engine.config import BUNDLED_MODELS

    folder = tmp_path / "broken"
    folder.mkdir()
    for path in BUNDLED_MODELS["tiny-oss"].iterdir():
        data = path.read_bytes()
        (folder / path.name).write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    config = replace(CONFIG, model=str(folder))

    async def start() -> ipc.FatalMessage:
        fatal: asyncio.Future[ipc.FatalMessage] = asyncio.get_running_loop().create_future()
        engine = AsyncEngine(config, lambda _: None, lambda message: fatal.done() or fatal.set_result(message))
        engine.start()
        cause = await asyncio.wait_for(fatal, 60)
        await engine.stop()
        return cause

    cause = asyncio.run(start())
    assert "CheckpointError" in cause.message
    assert "model.safetensors" in cause.message
