"""The asyncio face over a real core process: silence, standstill, and a reader that breaks."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from engine import ipc
from engine.async_engine import AsyncEngine, EngineState, EngineUnavailable, OutputStream, PhaseCallback
from engine.config import CacheConfig, EngineConfig
from engine.core.request import EngineRequest, FinishReason, RequestOutput
from engine.core.sampling_params import SamplingParams

STEP_TIMEOUT_SECONDS = 2.0
CONFIG = EngineConfig(
    "tiny-oss", max_model_len=512, cache=CacheConfig(num_blocks=256), step_timeout_seconds=STEP_TIMEOUT_SECONDS
)


def request(name: str) -> EngineRequest:
    return EngineRequest(name, [1, 2, 3], SamplingParams(ignore_eos=True), max_tokens=500, seed=1)


@asynccontextmanager
async def running(
    fatals: asyncio.Queue[ipc.FatalMessage], on_phase: PhaseCallback = lambda _: None
) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(CONFIG, on_phase, fatals.put_nowait)
    try:
        engine.start()
        yield engine
    finally:
        await engine.stop()


def test_a_core_that_stands_still_ends_its_streams_and_is_killed() -> None:
    async def scenario() -> None:
        fatals: asyncio.Queue[ipc.FatalMessage] = asyncio.Queue()
        async with running(fatals) as engine:
            await asyncio.wait_for(engine.ready.wait(), 60)
            stream = engine.submit(request("a"))
            assert (await anext(stream)).finish_reason is None
            os.kill(engine.core_pid, signal.SIGSTOP)
            outputs = [output async for output in stream]
            assert outputs[-1].finish_reason is FinishReason.ERROR
            assert (outputs[-1].error or "").startswith("engine_dead")
            fatal = await asyncio.wait_for(fatals.get(), 10)
            assert fatal.error_type == "EngineHung"
            assert ", and rank 0 (node localhost, cpu) with it; phase serve; its stacks are in the log" in fatal.message
            assert engine.load_fraction == 0.0
            assert engine.state is EngineState.FAILED
            assert engine.num_unfinished == 0
            with pytest.raises(EngineUnavailable):
                engine.submit(request("b"))

    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_streams_end_with_the_news_of_a_failure_not_with_the_process() -> None:
    """What a core has to end when it fails, ranks on other nodes say, may take seconds."""

    async def scenario() -> None:
        fatals: asyncio.Queue[ipc.FatalMessage] = asyncio.Queue()
        async with running(fatals) as engine:
            await asyncio.wait_for(engine.ready.wait(), 60)
            stream = engine.submit(request("a"))
            assert (await anext(stream)).finish_reason is None
            os.kill(engine.core_pid, signal.SIGSTOP)
            engine._handle(ipc.Kind.FATAL, ipc.FatalMessage("serve", "NodeFailure", "node two is lost"))
            outputs = await asyncio.wait_for(collect(stream), 1)
            assert outputs[-1].finish_reason is FinishReason.ERROR
            assert (engine.num_unfinished, fatals.empty()) == (0, True)
            with pytest.raises(EngineUnavailable, match="not running"):
                engine.submit(request("b"))
            # The process goes on; who starts it again is told when it is gone.
            os.kill(engine.core_pid, signal.SIGKILL)
            assert (await asyncio.wait_for(fatals.get(), 10)).message == "node two is lost"

    async def collect(stream: OutputStream) -> list[RequestOutput]:
        return [output async for output in stream]

    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_a_standstill_of_this_process_is_not_held_against_the_core() -> None:
    async def scenario() -> None:
        fatals: asyncio.Queue[ipc.FatalMessage] = asyncio.Queue()
        async with running(fatals) as engine:
            await asyncio.wait_for(engine.ready.wait(), 60)
            # As a container that is paused: neither process runs for longer than a step may take.
            os.kill(engine.core_pid, signal.SIGSTOP)
            await asyncio.sleep(0.1)
            time.sleep(STEP_TIMEOUT_SECONDS + 1)
            os.kill(engine.core_pid, signal.SIGCONT)
            stream = engine.submit(request("a"))
            outputs = [output async for output in stream]
            assert outputs[-1].finish_reason is FinishReason.LENGTH
            assert fatals.empty()

    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_a_reader_that_breaks_is_a_dead_engine_not_a_silent_one() -> None:
    def fail(_: ipc.PhaseMessage) -> None:
        raise ValueError("cannot draw")

    async def scenario() -> None:
        fatals: asyncio.Queue[ipc.FatalMessage] = asyncio.Queue()
        async with running(fatals, fail) as engine:
            fatal = await asyncio.wait_for(fatals.get(), 30)
            assert (fatal.error_type, fatal.message) == ("ValueError", "cannot draw")
            assert engine.state is EngineState.FAILED

    asyncio.run(asyncio.wait_for(scenario(), 120))
