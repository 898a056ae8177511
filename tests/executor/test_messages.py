"""Plans and results survive the wire, and stay small."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.plan import AdmittedRow, ExecutionPlan, StepResult
from engine.core.request import TokenLogprobs
from engine.core.sampling_params import SamplingParams
from engine.executor import messages
from engine.executor.messages import (
    FaultReport,
    Kind,
    MessageError,
    PhaseReport,
    PlanDecoder,
    PlanEncoder,
    SampledTokens,
    pack_ints,
)

ids = st.integers(0, 2**31 - 1)
admitted = st.builds(
    AdmittedRow,
    row=st.integers(0, 300),
    generation=ids,
    request_id=st.text(max_size=20),
    token_ids=st.lists(ids, min_size=1, max_size=40),
    num_prompt_tokens=st.integers(1, 40),
    num_computed_tokens=st.integers(0, 40),
    block_ids=st.tuples(st.lists(ids, max_size=5), st.lists(ids, max_size=5)),
    params=st.builds(
        SamplingParams,
        temperature=st.floats(0, 2),
        logit_bias=st.dictionaries(st.integers(0, 9), st.floats(-9, 9), max_size=3),
        stop=st.tuples(st.text(min_size=1, max_size=3)),
        logprobs=st.none() | st.integers(0, 5),
    ),
    seed=st.integers(0, 2**63 - 1),
    stop_token_ids=st.lists(ids, max_size=3).map(tuple),
)


@st.composite
def plans(draw: st.DrawFn) -> ExecutionPlan:
    count = draw(st.integers(0, 6))
    columns = st.lists(st.integers(0, 300), min_size=count, max_size=count)
    return ExecutionPlan(
        draw(ids),
        draw(columns),
        draw(columns),
        draw(st.lists(st.booleans(), min_size=count, max_size=count)),
        draw(st.lists(admitted, max_size=2)),
        draw(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 3), st.lists(ids, max_size=4)), max_size=4)),
        draw(st.lists(st.integers(0, 300), max_size=4)),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(plans(), min_size=1, max_size=6))
def test_plans_arrive_as_they_were_made(made: list[ExecutionPlan]) -> None:
    encoder, decoder = PlanEncoder(), PlanDecoder()
    for plan in made:
        for same in (plan, plan):
            assert decoder.decode(encoder.encode(same))[0] == same


def test_sampled_tokens_come_with_the_next_plan() -> None:
    body = PlanEncoder().encode(
        ExecutionPlan(1, [0], [1], [True]), SampledTokens(pack_ints([3, 4]), pack_ints([70_000, 1]))
    )
    assert PlanDecoder().decode(body)[1] == [(3, 70_000), (4, 1)]


def test_a_plan_is_a_small_delta() -> None:
    encoder = PlanEncoder()
    rows = list(range(256))
    plan = ExecutionPlan(1_000_000, rows, [1] * 256, [True] * 256)
    encoder.encode(plan)
    assert len(encoder.encode(plan)) <= 64
    plan.new_blocks = [(row, row % 2, [40_000 + row]) for row in rows]
    assert len(encoder.encode(plan)) <= 8192


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), ids, st.integers(0, 1)), max_size=5),
    st.none() | st.builds(TokenLogprobs, st.floats(-9999, 0), st.lists(ids, max_size=2), st.just([-1.5])),
)
def test_results_arrive_as_they_were_made(rows: list[tuple[int, int, int]], logprobs: TokenLogprobs | None) -> None:
    columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[], [], []]
    result = StepResult(7, *columns, None if logprobs is None else [logprobs] * len(rows), 0.25)
    assert messages.decode_result(messages.encode_result(result)) == result


@pytest.mark.parametrize(
    "report", [PhaseReport(1, "load", 0.5, "layer 3"), FaultReport(2, "step", "E", "m", "h", True)]
)
def test_reports_arrive_as_they_were_made(report: messages.Report) -> None:
    kind, body = messages.encode_report(report)
    assert messages.decode_report(kind, body) == report


def test_noise_is_refused_not_believed() -> None:
    for _ in range(200):
        noise = os.urandom(30)
        with pytest.raises(MessageError):
            messages.decode_report(99, noise)
        for decode in (messages.decode_result, PlanDecoder().decode, lambda b: messages.decode_report(Kind.FAULT, b)):
            with pytest.raises(MessageError):
                decode(b"\xc1" + noise)
