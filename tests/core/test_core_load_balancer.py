"""Routing: exact scores, turns, affinity; and a burst that no engine is to swallow alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.load_balancer import AFFINITY_SLACK, COARSE_BLOCKS, FINE_BLOCKS, MAX_REMEMBERED, LoadBalancer
from engine.core.request import EngineRequest, SchedulerStats
from engine.core.sampling_params import SamplingParams

SLACK = 32.0


def request(prompt: list[int], conversation: str = "", salt: str = "") -> EngineRequest:
    return EngineRequest(
        "r", prompt, SamplingParams(), max_tokens=4, seed=0, cache_salt=salt, conversation=conversation
    )


def balancer(count: int = 3) -> LoadBalancer:
    made = LoadBalancer(count, block_size=4, conversation_slack=SLACK)
    for load in made.loads:
        load.is_available = True
    return made


def choose(router: LoadBalancer, item: EngineRequest) -> int | None:
    """Send a request to the first engine of its route, which takes it."""
    route = router.route(item)
    if not route.engines:
        return None
    router.record(route, route.engines[0])
    return route.engines[0]


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
        chosen.append(choose(router, request([index])))
        for load in router.loads:
            load.waiting = 0
    assert chosen == [0, 1, 2, 0, 1, 2]


@given(st.integers(2, 40), st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_a_burst_is_spread_although_no_figure_changes(count: int, size: int) -> None:
    router = balancer(count)
    taken = [0] * count
    for index in range(size):
        chosen = choose(router, request([index]))
        assert chosen is not None
        taken[chosen] += 1
        router.loads[chosen].in_flight += 1
    slack = 1 if count <= 16 else 6
    assert max(taken) <= size / count + slack


def test_a_conversation_stays_where_it_is_until_its_engine_is_gone() -> None:
    router = balancer()
    home = choose(router, request([1], "c"))
    assert home is not None
    router.loads[home].waiting = int(SLACK)
    assert choose(router, request([2], "c")) == home
    router.loads[home].is_available = False
    other = choose(router, request([3], "c"))
    assert other not in (None, home)
    router.loads[home].is_available = True
    assert choose(router, request([4], "c")) == other
    assert other is not None
    router.forget(other)
    assert choose(router, request([5], "c")) != other


def test_a_conversation_leaves_an_engine_that_is_much_busier_than_the_best() -> None:
    router = balancer()
    home = choose(router, request([1], "c"))
    assert home is not None
    router.loads[home].waiting = int(SLACK) + 1
    other = choose(router, request([2], "c"))
    assert other not in (None, home)
    assert router.route(request([3], "c")).engines[0] == other


@given(st.integers(2, 16), st.integers(100, 400))
@settings(max_examples=20, deadline=None)
def test_one_key_for_all_requests_is_spread_all_the_same(count: int, size: int) -> None:
    router = balancer(count)
    for index in range(size):
        chosen = choose(router, request([index], "everybody's"))
        assert chosen is not None
        router.loads[chosen].in_flight += 1
    taken = [load.in_flight for load in router.loads]
    assert max(taken) <= min(taken) + SLACK + 1


def test_a_route_names_every_engine_once_and_what_was_refused_is_not_remembered() -> None:
    for count in (3, 20):
        router = balancer(count)
        prompt = list(range(8))
        home = choose(router, request(prompt, "c"))
        assert home is not None
        route = router.route(request(prompt, "c"))
        assert route.engines[0] == home
        assert sorted(route.engines) == list(range(count))
        before = [load.waiting for load in router.loads]
        # Its engine is full, and so is the next: the third takes it.
        third = route.engines[2]
        router.record(route, third)
        assert [load.waiting - was for load, was in zip(router.loads, before, strict=True)] == [
            int(index == third) for index in range(count)
        ]
        assert router.route(request(prompt, "c")).engines[0] == third
        assert set(router.route(request(prompt)).engines[:1]) <= {home, third}


def test_half_of_the_prompt_is_half_of_all_its_blocks() -> None:
    router = balancer()
    block = router._block_size
    prefix = list(range(block * FINE_BLOCKS))
    home = choose(router, request(prefix))
    assert home is not None
    turn = router.route(request([0] * block)).engines[0]
    assert turn != home
    tail = [7] * (block * COARSE_BLOCKS)
    for num_groups, expected in ((16, home), (17, turn)):
        assert router.route(request(prefix + tail * num_groups)).engines[0] == expected
    # A longer prompt on the same long one: what lies behind the fine blocks is found again, at any length.
    chosen = choose(router, request(prefix + tail * 17 + [1] * 5 * block))
    router.loads[turn].waiting = 0
    assert chosen == turn
    assert router.route(request(prefix + tail * 20)).engines[0] == turn


def test_a_prompt_goes_where_half_of_it_lies_unless_that_engine_is_much_busier() -> None:
    router = balancer()
    prefix = list(range(100, 108))
    home = choose(router, request(prefix))
    assert home is not None
    for load in router.loads:
        load.waiting = 0
    assert choose(router, request(prefix + [1] * 8)) == home
    # Another salt is another prefix, and less than half is not enough.
    assert choose(router, request(prefix, salt="other")) != home
    assert choose(router, request(prefix + [2] * 12)) != home
    for load in router.loads:
        load.waiting = 0
    router.loads[home].waiting = int(AFFINITY_SLACK) + 1
    assert choose(router, request(prefix + [1] * 8)) != home
    router.loads[home].waiting = 0
    router.forget(home)
    assert router.loads[home].is_available is False


def test_nobody_is_chosen_when_nobody_serves() -> None:
    router = LoadBalancer(2, 16, SLACK)
    assert choose(router, request([1])) is None


def test_memory_is_bounded() -> None:
    router = balancer(2)
    router.loads[1].is_available = False
    for index in range(MAX_REMEMBERED + 50):
        choose(router, request([index] * 8, conversation=str(index)))
    assert len(router._memories[0].prefixes) == MAX_REMEMBERED
    assert len(router._conversations) == MAX_REMEMBERED
