"""Scheduler and pool under any order of adds, aborts, faults and steps, against a worker that models the cache."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from core_support import VOCAB_SIZE, Loop, make_request
from hypothesis import HealthCheck, assume, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.config import SchedulerConfig
from engine.core.request import FinishReason, RequestRejected

MAX_MODEL_LEN = 40
# Prompts are cut from few texts, so that prefixes are shared, and diverge at any token.
TEXTS = [[(i * 7 + i // 5) % VOCAB_SIZE for i in range(MAX_MODEL_LEN)], [3] * MAX_MODEL_LEN]
WINDOWS: list[tuple[int | None, ...]] = [(8, None), (None,), (5, None), (1, None), (4,), (6, None, 3, None), (7, 3)]

configs = st.builds(
    SchedulerConfig,
    max_num_seqs=st.sampled_from([4, 6, 3, 2, 1]),
    max_num_batched_tokens=st.sampled_from([6, 7, 12, 24, MAX_MODEL_LEN]),
    long_prefill_limit=st.sampled_from([0, 0, 3, 5]),
    policy=st.sampled_from(["fcfs", "priority"]),
    enable_prefix_caching=st.sampled_from([True, True, False]),
    enable_chunked_prefill=st.sampled_from([True, True, True, False]),
    max_queue=st.sampled_from([3, 20]),
)

specs = st.fixed_dictionaries(
    {
        "text": st.sampled_from(TEXTS),
        "shared": st.integers(0, 24),
        "own": st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=4),
        "max_tokens": st.sampled_from([13, 30, 20, 8, 5, 3, 2, 1, 0]),
        "stop": st.sampled_from([(), (), (), (1,), (0, 5)]),
        "min_tokens": st.sampled_from([0, 0, 2]),
        "priority": st.integers(0, 2),
        "salt": st.sampled_from(["", "", "a"]),
    }
)


class CoreMachine(RuleBasedStateMachine):
    """One engine's life. At the end everything drains and every output is held against the reference."""

    @initialize(
        config=configs,
        windows=st.sampled_from(WINDOWS),
        block_size=st.sampled_from([2, 4]),
        num_blocks=st.sampled_from([0, 0, 3, 12]),
        depth=st.sampled_from([1, 2, 2, 3]),
    )
    def start(
        self, config: SchedulerConfig, windows: tuple[int | None, ...], block_size: int, num_blocks: int, depth: int
    ) -> None:
        if not config.enable_chunked_prefill:
            assume(config.max_num_batched_tokens >= MAX_MODEL_LEN)
        num_blocks += len(windows) * (MAX_MODEL_LEN // block_size) + 1
        self.loop = Loop(
            config,
            num_blocks=num_blocks,
            block_size=block_size,
            windows=windows,
            max_model_len=MAX_MODEL_LEN,
            depth=depth,
        )
        self.unfinished: list[str] = []
        self.count = 0

    @rule(burst=st.lists(specs, min_size=1, max_size=8))
    def add(self, burst: list[dict[str, Any]]) -> None:
        for spec in burst:
            self._add(**spec)

    @rule(spec=specs, count=st.integers(2, 6))
    def add_copies(self, spec: dict[str, Any], count: int) -> None:
        for _ in range(count):
            self._add(**spec)

    def _add(self, text: list[int], shared: int, own: list[int], max_tokens: int, **options: Any) -> None:
        prompt = text[:shared] + own
        name = f"r{self.count}"
        self.count += 1
        try:
            self.loop.add(make_request(name, prompt, max_tokens, arrival=float(self.count), **options))
        except RequestRejected as error:
            codes = ("queue_full", "never_fits") if prompt else ("empty_prompt",)
            if error.code not in codes:
                raise

    @rule(count=st.integers(1, 16))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.loop.step()

    @rule()
    def plan_further(self) -> None:
        """Run ahead as far as the plan goes, then take one result: a lag deeper than the loop's own."""
        if len(self.loop.in_flight) < 3:
            plan = self.loop.scheduler.plan(0.0)
            if plan is not None:
                self.loop.check_plan(plan)
                self.loop.in_flight.append(self.loop.worker.execute(plan))

    @precondition(lambda self: self.loop.in_flight)
    @rule()
    def take_result(self) -> None:
        self.loop.collect()

    @precondition(lambda self: self.loop.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(list(self.loop.requests)))
        if self.loop.scheduler.abort(name):
            self.unfinished.append(name)
            assert not self.loop.scheduler.abort(name)

    @precondition(lambda self: self.loop.requests)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(list(self.loop.requests)))
        for output in self.loop.scheduler.fail([name, "nobody"], "a fault"):
            self.loop.outputs[name].append(output)
            self.unfinished.append(name)
            assert (output.finish_reason, output.error) == (FinishReason.ERROR, "a fault")

    @precondition(lambda self: self.loop.requests)
    @rule(data=st.data())
    def poison(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(list(self.loop.requests)))
        if self.loop.reason(name) is None and name not in self.unfinished:
            self.loop.worker.poisoned.add(name)
            self.unfinished.append(name)

    @rule()
    def reset_prefix_cache(self) -> None:
        self.loop.scheduler.reset_prefix_cache()

    @invariant()
    def books_are_sound(self) -> None:
        self.loop.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        self.loop.run()
        self.loop.check_idle()
        self.loop.check_outputs(self.unfinished)


TestCore = CoreMachine.TestCase
TestCore.settings = settings(
    max_examples=400,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
