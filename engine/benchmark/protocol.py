"""Timed points on one engine, all requests handed over at once, prompts of random token ids without a common prefix.

    decode rate    n · (output − 1) / (time for `output` tokens − time for 1 token)
    prefill rate   n · input / time for 1 token

Greedy, the end of sequence ignored, so that every answer has its full length. Knows: the engine core and the clock.
Refuses to know: medians, floors, documents; the caller gets every run.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.core.request import EngineRequest
from engine.core.sampling_params import SamplingParams
from engine.engine_core import EngineCore
from engine.profiling import count_experts

SETTLE_STEPS = 4


class BenchmarkError(Exception):
    """A request was refused or failed; the figures would mean nothing."""


@dataclass(frozen=True, slots=True)
class Point:
    """`num_requests` prompts of `input_tokens`; `output_tokens` of 1 measures prefill alone."""

    num_requests: int
    input_tokens: int
    output_tokens: int = 1


def random_prompts(seed: str, count: int, length: int, vocab_size: int) -> list[list[int]]:
    """Draw prompts; the same seed gives the same ids to every engine under comparison."""
    source = random.Random(seed)
    return [[source.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


class Bench:
    """Runs points on one engine."""

    def __init__(self, core: EngineCore, seed: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._core = core
        self._seed = seed
        self._clock = clock
        self._count = 0

    @property
    def max_model_len(self) -> int:
        return self._core.max_model_len

    def run(self, point: Point, run: int) -> dict[str, Any]:
        """Measure a point once. `run` numbers the repeats: each draws prompts of its own."""
        n, length = point.num_requests, point.input_tokens
        first = self._seconds(point, run, "first", 1)
        figures: dict[str, Any] = {
            "num_requests": n,
            "input_tokens": length,
            "output_tokens": point.output_tokens,
            "run": run,
            "first_seconds": first,
            "prefill_tokens_per_second": n * length / first,
        }
        if point.output_tokens > 1:
            full = self._seconds(point, run, "full", point.output_tokens)
            # A full run that is no longer than the short one says that the point is too short to be measured.
            rate = n * (point.output_tokens - 1) / (full - first) if full > first else None
            figures |= {
                "full_seconds": full,
                "decode_tokens_per_second": rate,
                "output_tokens_per_second": n * point.output_tokens / full,
            }
        return figures

    def distinct_experts(self, num_requests: int, input_tokens: int) -> float | None:
        """Count the distinct experts that a decode step touches, mean over the layers; None where nobody counts."""
        with_room = Point(num_requests, input_tokens, num_requests + 8 * SETTLE_STEPS)
        self.begin_decode(with_room, "experts")
        counts = count_experts(self._core, num_requests)
        self.finish()
        return statistics.mean(counts) if counts else None

    def begin_decode(self, point: Point, phase: str) -> None:
        """Bring all requests of a point past their prompts, a few steps into decoding."""
        self._add(point, 0, phase, point.output_tokens)
        started: set[str] = set()
        while len(started) < point.num_requests:
            if not self._core.has_work:
                raise BenchmarkError("requests ended before all had begun: ask for more output tokens")
            started |= {output.request_id for output in self._step()}
        for _ in range(SETTLE_STEPS):
            self._step()

    def finish(self) -> None:
        """End what still runs."""
        for number in range(self._count):
            self._core.abort(f"bench-{number}")
        while self._core.has_work:
            self._step()

    def _seconds(self, point: Point, run: int, phase: str, num_tokens: int) -> float:
        prompts_made = self._prompts(point, run, phase)
        begin = self._clock()
        self._submit(prompts_made, num_tokens)
        made = 0
        while self._core.has_work:
            made += sum(len(output.new_token_ids) for output in self._step())
        seconds = self._clock() - begin
        if made != num_tokens * point.num_requests:
            raise BenchmarkError(f"{made} tokens came instead of {num_tokens * point.num_requests}")
        return seconds

    def _prompts(self, point: Point, run: int, phase: str) -> list[list[int]]:
        seed = f"{self._seed}/{point.num_requests}/{point.input_tokens}/{run}/{phase}"
        return random_prompts(seed, point.num_requests, point.input_tokens, self._core.model.vocab_size)

    def _add(self, point: Point, run: int, phase: str, num_tokens: int) -> None:
        self._submit(self._prompts(point, run, phase), num_tokens)

    def _submit(self, prompts: list[list[int]], num_tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        for prompt in prompts:
            request = EngineRequest(
                f"bench-{self._count}", prompt, params, max_tokens=num_tokens, stop_token_ids=(), seed=0
            )
            self._count += 1
            refusal = self._core.add(request)
            if refusal is not None:
                raise BenchmarkError(f"a request was refused: {refusal.error}")

    def _step(self) -> list[Any]:
        outputs = self._core.step()
        for output in outputs:
            if output.error:
                raise BenchmarkError(f"a request failed: {output.error}")
        return outputs
