"""Plans made ahead of results: placeholders, ends known ahead and ends seen late, rows that are still in flight."""

from __future__ import annotations

import pytest
from core_support import Loop, expected_output, make_request

from engine.core.plan import ExecutionPlan
from engine.core.request import FinishReason


def prompt(length: int, first: int = 0) -> list[int]:
    return [(first + i) % 10 for i in range(length)]


def plan_ahead(loop: Loop) -> ExecutionPlan | None:
    """Make and run one plan without taking any result."""
    plan = loop.scheduler.plan(0.0)
    if plan is not None:
        loop.in_flight.append(loop.worker.execute(plan))
        loop.plans.append(plan)
    loop.scheduler.check_integrity()
    return plan


@pytest.mark.parametrize("max_model_len", [64, 10])
def test_length_and_context_end_cost_no_extra_step(max_model_len: int) -> None:
    loop = Loop(depth=2, max_model_len=max_model_len)
    loop.add(make_request("a", prompt(6), 4))
    loop.run()
    loop.check_outputs()
    assert [plan.num_tokens for plan in loop.plans] == [6, 1, 1, 1]


def test_stop_id_is_seen_one_step_late_and_the_extra_token_dropped() -> None:
    tokens, _ = expected_output(make_request("a", prompt(6), 12), 64)
    stop = tokens[3]
    plain, overlapped = Loop(depth=1), Loop(depth=2)
    for loop in (plain, overlapped):
        loop.add(make_request("a", prompt(6), 12, stop=(stop,)))
        loop.run()
        loop.check_outputs()
        assert loop.reason("a") == FinishReason.STOP
    assert len(overlapped.plans) == len(plain.plans) + 1
    loop.check_idle()


def test_nothing_is_planned_while_the_last_token_is_in_flight() -> None:
    loop = Loop(depth=2)
    loop.add(make_request("a", prompt(6), 1))
    assert plan_ahead(loop) is not None
    assert plan_ahead(loop) is None
    assert loop.scheduler.has_unfinished
    # Its blocks are already back: ranks run plans in order, so a later plan may write to them.
    assert loop.scheduler.stats().num_used_blocks == 0
    assert loop.collect()[0].finish_reason == FinishReason.LENGTH
    loop.check_idle()


def test_preempted_with_a_step_in_flight_keeps_the_token_of_that_step() -> None:
    loop = Loop(depth=2, num_blocks=9, windows=(None,), max_num_batched_tokens=32)
    loop.add(make_request("a", prompt(4), 20))
    loop.add(make_request("b", prompt(4, 1), 20))
    while not loop.scheduler.stats().num_preemptions:
        if len(loop.in_flight) == 2:
            loop.collect()
        plan_ahead(loop)
    made = len(loop.tokens("b"))
    loop.collect()
    assert len(loop.tokens("b")) == made + 1
    loop.run()
    loop.check_outputs()


def test_preempted_request_is_not_readmitted_before_its_token_arrives() -> None:
    loop = Loop(depth=3, num_blocks=9, windows=(None,), max_num_batched_tokens=32)
    loop.add(make_request("a", prompt(4), 14))
    loop.add(make_request("b", prompt(4, 1), 20))
    while not loop.scheduler.stats().num_preemptions:
        if len(loop.in_flight) == 2:
            loop.collect()
        plan_ahead(loop)
    loop.scheduler.abort("a")
    assert len(loop.in_flight) == 2
    assert plan_ahead(loop) is None, "b has room but not all its token ids"
    loop.collect()
    plan = plan_ahead(loop)
    assert plan is not None
    assert plan.admits[0].token_ids == prompt(4, 1) + loop.tokens("b")
    loop.run()
    loop.check_outputs(["a"])


def test_stop_id_may_arrive_after_preemption() -> None:
    tokens, _ = expected_output(make_request("b", prompt(4, 1), 20), 64)
    for stop in tokens:
        loop = Loop(depth=2, num_blocks=9, windows=(None,), max_num_batched_tokens=32)
        loop.add(make_request("a", prompt(4), 20))
        loop.add(make_request("b", prompt(4, 1), 20, stop=(stop,)))
        loop.run()
        loop.check_outputs()
        loop.check_idle()


def test_abort_with_a_step_in_flight_drops_its_token_and_cools_its_row() -> None:
    loop = Loop(depth=2, max_num_seqs=1)
    loop.add(make_request("a", prompt(6), 9))
    loop.add(make_request("b", prompt(6, 1), 3))
    plan_ahead(loop)
    assert loop.scheduler.abort("a")
    assert loop.scheduler.stats().num_used_blocks == 0
    assert plan_ahead(loop) is None, "the only row is still in flight"
    assert loop.collect() == []
    plan = plan_ahead(loop)
    assert plan is not None
    assert (plan.released, plan.admits[0].row, plan.admits[0].generation) == ([0], 0, 2)
    loop.run()
    loop.check_outputs(["a"])


def test_row_without_a_step_in_flight_is_reused_at_once() -> None:
    loop = Loop(depth=1, max_num_seqs=1)
    loop.add(make_request("a", prompt(6), 1))
    loop.add(make_request("b", prompt(6, 1), 1))
    loop.run()
    second = loop.plans[1]
    assert (second.released, second.admits[0].row, second.admits[0].generation) == ([0], 0, 2)


def test_same_id_may_return_while_its_former_tokens_are_in_flight() -> None:
    loop = Loop(depth=2)
    loop.add(make_request("a", prompt(6), 9))
    plan_ahead(loop)
    loop.scheduler.abort("a")
    loop.add(make_request("a", prompt(6, 5), 3))
    loop.run()
    loop.check_outputs()


def test_blocks_are_hashed_only_when_their_ids_are_known() -> None:
    loop = Loop(depth=2, block_size=2, windows=(None,))
    loop.add(make_request("a", prompt(3), 12))
    for _ in range(8):
        plan_ahead(loop)
        request = loop.scheduler._requests["a"]
        known = len(request.token_ids) // 2
        assert all(loop.scheduler._kv.pool.hashes[block] is None for block in request.tables[0][known:])
        if len(loop.in_flight) == 2:
            loop.collect()
    loop.run()
    loop.add(make_request("b", prompt(3) + loop.tokens("a")[:9], 2))
    loop.run()
    assert loop.outputs["b"][0].num_cached_tokens == 10
    loop.check_outputs()


def test_plain_and_overlapped_loops_are_twins() -> None:
    for num_blocks in (20, 26, 200):
        results = []
        for depth in (1, 2, 3):
            loop = Loop(depth=depth, num_blocks=num_blocks, max_num_batched_tokens=12, max_model_len=32)
            for i in range(9):
                loop.add(make_request(f"r{i}", prompt(5 + i, i % 3), 12, stop=(7,)))
            loop.run()
            results.append([(loop.tokens(f"r{i}"), loop.reason(f"r{i}")) for i in range(9)])
        assert results[0] == results[1] == results[2]
