"""Random kills under load, with real ranks, a real server and clients that stream: each of them has its answer or an
error in time, the server serves the same words again, and in the end nothing is left.

Twenty by default. By hand, two hundred on a quiet machine, each ready again within ten seconds:
`HLAUNCH_TEST_KILLS=200 .venv/bin/pytest -m slow -s tests/ray/test_kill_storm.py`.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray_engine import ALONE, on_ray
from ray_nodes import RayPair, command_line, ray_pair
from storm import NUM_STREAMS, NUM_TOKENS, PROMPT, READY_SECONDS, Kill, Server, strike

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.llm import LLM, SamplingParams
from engine.placement import ParallelSizes

RANK, CORE = "engine.executor.multiproc_rank", "engine.core_process"
LOADED_SECONDS = 60.0
"""When other work is on the machine, as in every run of all tests."""
SIZES: dict[str, Any] = {
    "max_model_len": 2048,
    "cache": CacheConfig(num_blocks=1024),
    "scheduler": SchedulerConfig(max_num_seqs=NUM_STREAMS + 1, max_num_batched_tokens=256),
}


@pytest.fixture(scope="module")
def words() -> str:
    """What one rank says, in this process."""
    llm = LLM("tiny-oss", cpu_threads=1, kv_blocks=64, device="cpu")
    try:
        (result,) = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS), use_tqdm=False)
        return result.outputs[0].text
    finally:
        llm.close()


@contextlib.contextmanager
def served(config: EngineConfig, folder: Path, words: str, environ: Mapping[str, str]) -> Iterator[Server]:
    server = Server(config, folder, environ)
    try:
        server.wait_until_served(words, 90)
        yield server
        assert server.stop() == 0, server.tail()
        deadline = time.monotonic() + 10
        while left := server.leftovers():
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
    finally:
        server.kill()


def order(kinds: Sequence[str], count: int, source: random.Random) -> list[str]:
    """Every kind equally often, in random order."""
    made = [kinds[index % len(kinds)] for index in range(count)]
    source.shuffle(made)
    return made


def end(pids: Sequence[int], source: random.Random) -> None:
    os.kill(source.choice(pids), signal.SIGKILL)


def summary(kills: Sequence[Kill]) -> str:
    lines = ["kind                 kills  clients knew after  served again after (median, worst)"]
    for kind in sorted({kill.kind for kill in kills}):
        of = [kill for kill in kills if kill.kind == kind]
        times = sorted(kill.served for kill in of)
        knew = max(kill.ended for kill in of)
        lines.append(f"{kind:20} {len(of):5}  {knew:16.2f} s  {times[len(times) // 2]:7.2f} s {times[-1]:7.2f} s")
    return "\n".join(lines)


def storm_on_one_host(count: int, seconds: float, folder: Path, words: str) -> list[Kill]:
    source = random.Random(5)
    config = replace(ALONE, **SIZES, tensor_parallel_size=2)
    with served(config, folder, words, {}) as server:
        victims: dict[str, Callable[[], None]] = {
            "rank": lambda: end(server.pids(RANK), source),
            "engine core": lambda: end(server.pids(CORE), source),
        }
        return [
            strike(server, kind, victims[kind], words, source, seconds)
            for kind in order(["rank", "rank", "engine core"], count, source)
        ]


def storm_on_two_ray_nodes(count: int, seconds: float, folder: Path, words: str) -> list[Kill]:
    source = random.Random(6)
    kills = []
    with ray_pair() as pair:
        config = replace(on_ray(pair, ParallelSizes(pipeline=2), placement_seconds=60.0), **SIZES)
        with served(config, folder, words, pair.variables) as server:
            victims: dict[str, Callable[[], None]] = {
                "rank on the head": lambda: end(server.pids(RANK), source),
                "rank on the worker": lambda: end(of_node(pair, RANK), source),
                "Ray actor": lambda: end(of_node(pair, "NodeHostActor.run"), source),
                "driver": lambda: end(server.pids(CORE), source),
                "raylet": lambda: come_back(pair, lambda: os.kill(pair.raylet("two"), signal.SIGKILL)),
                "node": lambda: come_back(pair, lambda: None),
            }
            kills = [
                strike(server, kind, victims[kind], words, source, seconds)
                for kind in order(list(victims), count, source)
            ]
        deadline = time.monotonic() + 10
        while left := [pid for part in (RANK, "NodeHostActor") for pid in of_node(pair, part)]:
            assert time.monotonic() < deadline, [command_line(pid) for pid in left]
            time.sleep(0.1)
    return kills


def of_node(pair: RayPair, part: str) -> list[int]:
    return [pid for pid in pair.pids("two") if part in command_line(pid)]


def come_back(pair: RayPair, kill: Callable[[], None]) -> None:
    """Lose node two, or its raylet and then the rest, and start it again, as a container's restart policy does."""
    kill()
    pair.stop("two")
    pair.start("two")


@pytest.mark.timeout(900)
def test_twenty_random_kills_under_load(tmp_path: Path, words: str) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    kills = storm_on_one_host(12, LOADED_SECONDS, tmp_path / "one", words)
    kills += storm_on_two_ray_nodes(8, LOADED_SECONDS, tmp_path / "two", words)
    print(summary(kills))
    assert sum(kill.num_errors for kill in kills) > len(kills), "the kills struck running requests"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_hundred_random_kills_under_load(tmp_path: Path, words: str) -> None:
    count = int(os.environ.get("HLAUNCH_TEST_KILLS", "200"))
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    kills = storm_on_one_host(count // 2, LOADED_SECONDS, tmp_path / "one", words)
    kills += storm_on_two_ray_nodes(count - count // 2, LOADED_SECONDS, tmp_path / "two", words)
    print(summary(kills))
    late = [kill for kill in kills if kill.served > READY_SECONDS]
    assert not late, late
