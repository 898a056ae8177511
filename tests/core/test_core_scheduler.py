"""The scheduler rule by rule: budget, order, gates, preemption, the ends of requests."""

from __future__ import annotations

import pytest
from core_support import Loop, expected_output, make_request

from engine.config import ConfigError, SchedulerConfig
from engine.core.plan import StepResult
from engine.core.request import FinishReason, RequestRejected
from engine.core.scheduler import NAN_MESSAGE, Scheduler, SchedulerError


def prompt(length: int, first: int = 0) -> list[int]:
    """A prompt that shares no prefix with one of another `first`."""
    return [(first + i) % 10 for i in range(length)]


def output_tokens(name: str, tokens: list[int], max_tokens: int) -> list[int]:
    return expected_output(make_request(name, tokens, max_tokens), 10_000)[0]


def rejected(loop: Loop, name: str, tokens: list[int], max_tokens: int = 4) -> str:
    with pytest.raises(RequestRejected) as caught:
        loop.add(make_request(name, tokens, max_tokens))
    assert str(caught.value) == f"{caught.value.code}: {caught.value.message}"
    return caught.value.code


def test_one_budget_serves_decode_and_chunks_in_admission_order() -> None:
    loop = Loop(max_num_batched_tokens=10, windows=(None,))
    loop.add(make_request("a", prompt(4), 8))
    loop.add(make_request("b", prompt(15, 1), 8))
    loop.add(make_request("c", prompt(5, 2), 8))
    for _ in range(3):
        loop.step()
    first, second, third = loop.plans
    assert (first.num_scheduled, first.samples) == ([4, 6], [True, False])
    assert (second.num_scheduled, second.samples) == ([1, 9], [True, True])
    assert (third.num_scheduled, third.samples) == ([1, 1, 5], [True, True, True])
    assert [row.request_id for plan in loop.plans for row in plan.admits] == ["a", "b", "c"]
    loop.run()
    loop.check_outputs()


def test_long_prefill_limit_bounds_a_row_unless_it_is_alone() -> None:
    loop = Loop(max_num_batched_tokens=32, long_prefill_limit=5)
    loop.add(make_request("alone", prompt(20), 3))
    loop.step()
    assert loop.plans[-1].num_scheduled == [20]
    loop.add(make_request("late", prompt(12, 1), 3))
    loop.step()
    assert loop.plans[-1].num_scheduled == [1, 5]
    loop.run()
    assert [plan.num_scheduled for plan in loop.plans][2:] == [[1, 5], [2], [1], [1]]


def test_unchunked_prefill_waits_until_it_fits_whole() -> None:
    loop = Loop(max_num_batched_tokens=16, max_model_len=16, enable_chunked_prefill=False)
    loop.add(make_request("a", prompt(9), 2))
    loop.add(make_request("b", prompt(9, 1), 2))
    loop.run()
    assert [plan.num_scheduled for plan in loop.plans] == [[9], [1, 9], [1]]
    with pytest.raises(ConfigError, match="below max_model_len"):
        Loop(max_num_batched_tokens=15, max_model_len=16, enable_chunked_prefill=False)


def test_rows_are_bounded() -> None:
    loop = Loop(max_num_seqs=2)
    for i in range(4):
        loop.add(make_request(f"r{i}", prompt(3, i), 3))
    loop.step()
    assert (loop.scheduler.stats().num_running, loop.scheduler.stats().num_waiting) == (2, 2)
    loop.run()
    loop.check_outputs()


def test_first_chunk_comes_within_the_oracle_bound() -> None:
    loop = Loop(max_num_seqs=64, max_num_batched_tokens=16, num_blocks=2000)
    for i in range(20):
        loop.add(make_request(f"r{i}", prompt(7 + i % 5, i), 1))
    bound = -(-sum(7 + i % 5 for i in range(20)) // 16)
    loop.run()
    assert max(step for step, plan in enumerate(loop.plans) if plan.admits) < bound


def test_fcfs_preempts_the_last_admitted_and_admits_nobody_in_that_step() -> None:
    loop = Loop(num_blocks=9, windows=(None,), max_num_batched_tokens=32, max_num_seqs=3)
    for i, name in enumerate("abc"):
        loop.add(make_request(name, prompt(4, i), 16))
    before = 0
    while not loop.scheduler.stats().num_preemptions:
        before = len(loop.plans)
        loop.step()
    plan = loop.plans[before]
    assert len(plan.released) == 1
    assert not plan.admits
    last_admitted = [row.row for earlier in loop.plans[:before] for row in earlier.admits][-1]
    assert plan.released == [last_admitted]
    loop.run()
    loop.check_outputs()
    loop.check_idle()


def test_recompute_keeps_the_outputs_made_so_far() -> None:
    loop = Loop(num_blocks=9, windows=(None,), max_num_batched_tokens=32, enable_prefix_caching=False)
    loop.add(make_request("a", prompt(4), 20))
    loop.add(make_request("b", prompt(4, 1), 20))
    loop.run()
    readmitted = [row for plan in loop.plans for row in plan.admits if row.request_id == "b"][1]
    assert readmitted.num_prompt_tokens == 4
    assert readmitted.num_computed_tokens == 0
    made = readmitted.token_ids[4:]
    assert made == loop.tokens("b")[: len(made)] != []
    loop.check_outputs()


def test_priority_preempts_the_worst_even_when_it_was_already_scheduled() -> None:
    loop = Loop(
        num_blocks=9, windows=(None,), max_num_batched_tokens=32, policy="priority", enable_prefix_caching=False
    )
    loop.add(make_request("worst", prompt(5), 14, priority=2))
    loop.step()
    loop.add(make_request("best", prompt(4, 1), 20, priority=0))
    loop.add(make_request("middle", prompt(4, 2), 8, priority=1))
    while not loop.scheduler.stats().num_preemptions:
        loop.step()
    plan = loop.plans[-1]
    assert plan.released == [0], "row 0 is the worst, admitted first"
    assert 0 not in plan.rows
    assert all(row != 0 for row, _, _ in plan.new_blocks)
    loop.run()
    loop.check_outputs()


@pytest.mark.parametrize(("num_blocks", "middle"), [(23, 16), (18, 0)])
def test_preempting_a_chunk_already_scheduled_undoes_it(num_blocks: int, middle: int) -> None:
    # "worst" is admitted first and takes 3 tokens a step; "best" outgrows the reserve before that prefill is done.
    budget = 5 if middle else 6
    loop = Loop(
        num_blocks=num_blocks,
        windows=(None,),
        max_num_batched_tokens=budget,
        long_prefill_limit=3,
        policy="priority",
    )
    loop.add(make_request("worst", prompt(60), 2, priority=2))
    loop.step()
    loop.add(make_request("best", prompt(3, 1), 30, priority=0))
    if middle:
        loop.add(make_request("middle", prompt(middle, 2), 4, priority=1))
    while not loop.scheduler.stats().num_preemptions:
        loop.step()
    before, plan = loop.plans[-2:]
    assert before.num_scheduled == ([3, 1, 1] if middle else [3, 1])
    assert plan.released == [0]
    # The budget of the victim serves the row after it.
    assert (plan.rows, plan.num_scheduled) == (([1, 2], [1, 2]) if middle else ([1], [1]))
    # Of the victim only what earlier plans computed is findable.
    computed = sum(p.num_scheduled[p.rows.index(0)] for p in loop.plans if 0 in p.rows)
    worst = loop.scheduler._requests["worst"]
    assert len(worst.block_hashes) == computed // 4
    loop.run()
    loop.check_outputs()


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    loop = Loop(num_blocks=9, windows=(None,), max_num_seqs=2, policy="priority", max_num_batched_tokens=32)
    loop.add(make_request("worst", prompt(14), 10, priority=2))
    loop.add(make_request("best", prompt(8, 1), 20, priority=0))
    loop.step()
    loop.add(make_request("small", prompt(2, 2), 2, priority=1))
    while not loop.scheduler.stats().num_preemptions:
        loop.step()
    # "small" has a row and blocks now, and heads the queue.
    assert loop.plans[-1].admits == []
    loop.step()
    assert [row.request_id for row in loop.plans[-1].admits] == ["small"]
    loop.run()
    loop.check_outputs()


def test_priority_orders_admission_by_priority_then_arrival() -> None:
    loop = Loop(max_num_seqs=1, policy="priority")
    loop.add(make_request("late", prompt(3), 1, priority=1, arrival=2.0))
    loop.add(make_request("early", prompt(3, 1), 1, priority=1, arrival=1.0))
    loop.add(make_request("urgent", prompt(3, 2), 1, priority=0, arrival=3.0))
    loop.run()
    assert [row.request_id for plan in loop.plans for row in plan.admits] == ["urgent", "early", "late"]


def test_gate_counts_the_whole_sequence_not_the_first_chunk() -> None:
    # 12 usable blocks. "a" will hold 8 for its prompt; "b" needs 5: its first chunk alone would fit.
    loop = Loop(num_blocks=13, windows=(None,), max_num_batched_tokens=8, long_prefill_limit=4)
    loop.add(make_request("a", prompt(32), 1))
    loop.add(make_request("b", prompt(20, 1), 1))
    loop.step()
    assert [row.request_id for row in loop.plans[0].admits] == ["a"]
    loop.run()
    assert loop.scheduler.stats().num_preemptions == 0
    loop.check_outputs()


def test_watermark_leaves_a_block_per_running_row() -> None:
    # 4 usable blocks: "a" holds 1, "b" would need 3, and then "a" could not grow.
    loop = Loop(num_blocks=5, windows=(None,), max_num_batched_tokens=16)
    loop.add(make_request("a", prompt(3), 5))
    loop.add(make_request("b", prompt(10, 1), 2))
    loop.step()
    assert [row.request_id for row in loop.plans[0].admits] == ["a"]
    loop.run()
    assert loop.scheduler.stats().num_preemptions == 0
    loop.check_outputs()


def test_refusals_name_their_reason_and_leave_nothing() -> None:
    loop = Loop(max_queue=2, max_model_len=64, num_blocks=20, max_num_batched_tokens=64)
    assert rejected(loop, "empty", []) == "empty_prompt"
    assert rejected(loop, "long", prompt(64)) == "too_long"
    assert rejected(loop, "odd", [3, -1]) == "bad_token"
    assert rejected(loop, "odd", [2**31]) == "bad_token"
    assert rejected(loop, "large", prompt(50), 14) == "never_fits"
    loop.add(make_request("a", prompt(4), 4))
    assert rejected(loop, "a", prompt(4)) == "duplicate_id"
    loop.add(make_request("b", prompt(4), 4))
    assert rejected(loop, "c", prompt(4)) == "queue_full"
    assert loop.scheduler.stats().num_waiting == 2
    loop.run()
    loop.add(make_request("a", prompt(4), 4))
    loop.run()
    loop.check_idle()


def test_queue_is_bounded_by_tokens_too() -> None:
    loop = Loop(num_blocks=17, windows=(None,), max_queue=100, max_model_len=64)
    for i in range(2):
        assert loop.scheduler.can_queue(60)
        loop.add(make_request(f"r{i}", prompt(60, i), 2))
    assert not loop.scheduler.can_queue(60)
    assert rejected(loop, "more", prompt(60)) == "queue_full"
    assert loop.scheduler.can_queue(8)
    # Who lengthens the queue means tokens too: the offline face hands over everything at once.
    loop = Loop(num_blocks=17, windows=(None,), max_queue=1 << 30, max_model_len=64)
    for i in range(50):
        loop.add(make_request(f"r{i}", prompt(60, i), 2))
    loop.run()
    loop.check_outputs()


def test_ends_by_length_by_context_and_without_a_step() -> None:
    loop = Loop(max_model_len=16)
    loop.add(make_request("length", prompt(4), 3))
    loop.add(make_request("context", prompt(10), 100))
    loop.add(make_request("nothing", prompt(16), 0))
    assert loop.outputs["nothing"][0].finish_reason == FinishReason.LENGTH
    assert loop.outputs["nothing"][0].new_token_ids == []
    loop.run()
    loop.check_outputs()
    assert len(loop.tokens("context")) == 6


def test_stop_id_ends_and_is_named_but_not_before_min_tokens() -> None:
    tokens = output_tokens("x", prompt(6), 12)
    stop = tokens[4]
    loop = Loop()
    loop.add(make_request("stop", prompt(6), 12, stop=(stop,)))
    loop.run()
    last = loop.outputs["stop"][-1]
    assert (last.finish_reason, last.stop_token_id, last.new_token_ids) == (FinishReason.STOP, stop, [stop])
    assert len(loop.tokens("stop")) == tokens.index(stop) + 1

    # A worker that does not ban stop ids before min_tokens must not end the request either.
    loop.add(make_request("forced", [1, 2, 3], 6, stop=(5,), min_tokens=4))
    made = 0
    while loop.scheduler.has_unfinished:
        plan = loop.scheduler.plan(0.0)
        assert plan is not None
        loop.scheduler.advance(StepResult(plan.step_id, plan.rows, [5], [0]))
        made += 1
    assert made == 4


def test_nan_ends_only_its_request_and_its_blocks_are_not_found_again() -> None:
    loop = Loop(max_num_batched_tokens=64)
    loop.worker.poisoned.add("bad")
    loop.add(make_request("bad", prompt(20), 4))
    loop.add(make_request("good", prompt(20, 1), 4))
    loop.run()
    output = loop.outputs["bad"][0]
    assert (output.finish_reason, output.error, output.new_token_ids) == (FinishReason.ERROR, NAN_MESSAGE, [])
    loop.check_outputs(["bad"])
    loop.add(make_request("again", prompt(20), 4))
    loop.add(make_request("good again", prompt(20, 1), 4))
    loop.run()
    assert loop.outputs["again"][0].num_cached_tokens == 0
    assert loop.outputs["good again"][0].num_cached_tokens == 16
    loop.check_outputs(["bad"])


def test_abort_works_in_every_status_and_is_idempotent() -> None:
    loop = Loop(num_blocks=9, windows=(None,), max_num_batched_tokens=32, max_num_seqs=2)
    for i, name in enumerate("abc"):
        loop.add(make_request(name, prompt(4, i), 20))
    while not loop.scheduler.stats().num_preemptions:
        loop.step()
    assert loop.scheduler.stats().num_waiting == 2
    for name in "abc":
        assert loop.scheduler.abort(name)
        assert not loop.scheduler.abort(name)
        loop.scheduler.check_integrity()
    loop.check_idle()
    assert loop.scheduler.plan(0.0) is None


def test_results_must_come_in_plan_order() -> None:
    loop = Loop()
    with pytest.raises(SchedulerError, match="expected none"):
        loop.scheduler.advance(StepResult(0, [], [], []))
    loop.add(make_request("a", prompt(3), 4))
    plan = loop.scheduler.plan(0.0)
    assert plan is not None
    for result in (StepResult(plan.step_id + 1, plan.rows, [1], [0]), StepResult(plan.step_id, [3], [1], [0])):
        with pytest.raises(SchedulerError):
            loop.scheduler.advance(result)
    loop.scheduler.advance(StepResult(plan.step_id, plan.rows, [1], [0]))


def test_stats_count_what_happened() -> None:
    loop = Loop(max_num_batched_tokens=64)
    loop.add(make_request("a", prompt(20), 5))
    loop.run()
    loop.add(make_request("b", prompt(20), 5))
    loop.run()
    stats = loop.scheduler.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (40, 10)
    assert (stats.prefix_queries_tokens, stats.prefix_hits_tokens) == (40, 16)
    assert stats.num_steps == len(loop.plans) == 10
    assert stats.num_blocks == 64
    assert stats.num_cached_blocks > 0


def test_no_request_can_be_accepted_and_never_end() -> None:
    """The smallest pool that takes a request also finishes it, at any chunk size and window."""
    for windows in ((None,), (5, None), (3,), (9, None, 9, None)):
        for budget in (3, 8, 48):
            for num_blocks in range(2, 60):
                config = SchedulerConfig(max_num_batched_tokens=budget, max_num_seqs=3)
                loop = Loop(config, num_blocks=num_blocks, windows=windows, max_model_len=48)
                try:
                    loop.add(make_request("a", prompt(20), 20))
                except RequestRejected:
                    continue
                loop.add(make_request("b", prompt(20, 1), 20))
                loop.run()
                loop.check_outputs()
                break
            else:
                raise AssertionError(f"no pool below 60 blocks takes 40 tokens with {windows}")


def test_scheduler_is_built_from_plain_values() -> None:
    scheduler = Scheduler(
        SchedulerConfig(), num_blocks=2, block_size=16, group_windows=(None,), max_model_len=16, hash_seed=b""
    )
    assert scheduler.plan(1.5) is None
    assert (scheduler.has_unfinished, scheduler.num_in_flight) == (False, 0)
    scheduler.check_integrity()
