"""Routing: exact scores, turns, affinity; and a burst that no engine is to swallow alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.load_balancer import AFFINITY_SLACK, MAX_REMEMBERED, LoadBalancer
from engine.core.request import EngineRequest, SchedulerStats
from engine.core.sampling_params import SamplingParams


def request(prompt: list[int], conversation: str = "", salt: str = "") -> EngineRequest:
    return EngineRequest(
        "r", prompt, SamplingParams(), max_tokens=4, seed=0, cache_salt=salt, conversation=conversation
    )


def balancer(count: int = 3) -> LoadBalancer:
    made = LoadBalancer(count, block_size=4)
    for load in made.loads:
        load.is_available = True
    return made


@pytest.mark.parametrize(
    ("in_flight", "waiting", "running", "kv_usage", "score"),
    [(0, 0, 0, 0.9, 0.0), (7, 1, 2, 0.4, 7.0), (1, 4, 3, 0.5, 7.0), (1, 4, 3, 1.0, 7.0 + 4 * 3)],
)
def test_score(in_flight: int, waiting: int, running: int, kv_usage: float, score: float) -> None:
    load = balancer().loads[0]
    load.update(
        SchedulerStats(num_waiting=waiting, num_running=running, num_blocks=100, num_used_blocks=int(100 * kv_usage))
    )
    load.in_flight = in_flight
    assert load.score == pytest.approx(score)


def test_equal_engines_take_turns() -> None:
    router = balancer()
    chosen = []
    for index in range(6):
        chosen.append(router.choose(request([index])))
        for load in router.loads:
            load.waiting = 0
    assert chosen == [0, 1, 2, 0, 1, 2]


@given(st.integers(2, 40), st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_a_burst_is_spread_although_no_figure_changes(count: int, size: int) -> None:
    router = balancer(count)
    taken = [0] * count
    for index in range(size):
        chosen = router.choose(request([index]))
        assert chosen is not None
        taken[chosen] += 1
        router.loads[chosen].in_flight += 1
    slack = 1 if count <= 16 else 6
    assert max(taken) <= size / count + slack


def test_a_conversation_stays_where_it_is_until_its_engine_is_gone() -> None:
    router = balancer()
    home = router.choose(request([1], "c"))
    assert home is not None
    router.loads[home].waiting = 50
    assert router.choose(request([2], "c")) == home
    router.loads[home].is_available = False
    other = router.choose(request([3], "c"))
    assert other not in (None, home)
    router.loads[home].is_available = True
    assert router.choose(request([4], "c")) == other
    assert other is not None
    router.forget(other)
    assert router.choose(request([5], "c")) != other


def test_a_prompt_goes_where_half_of_it_lies_unless_that_engine_is_much_busier() -> None:
    router = balancer()
    prefix = list(range(100, 108))
    home = router.choose(request(prefix))
    assert home is not None
    for load in router.loads:
        load.waiting = 0
    assert router.choose(request(prefix + [1] * 8)) == home
    # Another salt is another prefix, and less than half is not enough.
    assert router.choose(request(prefix, salt="other")) != home
    assert router.choose(request(prefix + [2] * 12)) != home
    for load in router.loads:
        load.waiting = 0
    router.loads[home].waiting = int(AFFINITY_SLACK) + 1
    assert router.choose(request(prefix + [1] * 8)) != home
    router.loads[home].waiting = 0
    router.forget(home)
    assert router.loads[home].is_available is False


def test_nobody_is_chosen_when_nobody_serves() -> None:
    router = LoadBalancer(2, 16)
    assert router.choose(request([1])) is None


def test_memory_is_bounded() -> None:
    router = balancer(1)
    for index in range(MAX_REMEMBERED + 50):
        router.choose(request([index] * 8, conversation=str(index)))
    assert len(router._memories[0].prefixes) == MAX_REMEMBERED
    assert len(router._conversations) == MAX_REMEMBERED
