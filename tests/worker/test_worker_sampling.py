"""The sampler against NumPy in float64 for every option, its statistics, and that neighbours do not matter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.plan import FLAG_NAN, AdmittedRow
from engine.core.sampling_params import SamplingParams
from engine.sampling.random import splitmix64, uniform
from engine.sampling.row import RowSampling
from engine.sampling.sampler import LOGPROB_FLOOR, sample

VOCAB = 50


def row(
    params: SamplingParams,
    tokens: list[int] | None = None,
    num_prompt: int = 3,
    seed: int = 0,
    stop: tuple[int, ...] = (),
) -> RowSampling:
    ids = tokens if tokens is not None else [1, 2, 3]
    return RowSampling(AdmittedRow(0, 0, "r", ids, num_prompt, 0, (), params, seed, stop), VOCAB)


def logits_for(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def oracle_distribution(logits: np.ndarray[Any, Any], state: RowSampling, tokens: list[int], num_prompt: int) -> Any:
    """The distribution that a row's options leave, in float64, written as the documentation says it."""
    params = state.params
    x = logits.astype(np.float64).copy()
    outputs = tokens[num_prompt:]
    for token in set(tokens):
        r = params.repetition_penalty
        x[token] = x[token] / r if x[token] > 0 else x[token] * r
    for token in set(outputs):
        x[token] -= params.frequency_penalty * outputs.count(token) + params.presence_penalty
    for token, bias in params.logit_bias.items():
        x[token] += bias
    if len(outputs) < params.min_tokens and state.bans is not None:
        x[state.bans.numpy()] = -np.inf
    if params.temperature == 0:
        p = np.zeros(VOCAB)
        p[int(x.argmax())] = 1
        return p
    x = x / params.temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    keep = p[order] >= params.min_p * p.max()
    if params.top_k:
        keep[params.top_k :] = False
    q = p[order] * keep
    if params.top_p < 1:
        before = np.cumsum(q) - q
        q = q * (before < params.top_p * q.sum())
    out = np.zeros(VOCAB)
    out[order] = q / q.sum()
    return out


params_strategy = st.builds(
    SamplingParams,
    max_tokens=st.just(16),
    min_tokens=st.integers(0, 6),
    temperature=st.sampled_from([0.0, 0.01, 0.5, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    top_k=st.sampled_from([0, 1, 3, 20, 500]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    presence_penalty=st.sampled_from([0.0, 1.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-20, 20), max_size=4),
)


@settings(max_examples=250, deadline=None)
@given(
    params=st.lists(params_strategy, min_size=1, max_size=4),
    tokens=st.lists(st.integers(0, VOCAB - 1), min_size=4, max_size=12),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_every_option_matches_the_oracle(params: list[SamplingParams], tokens: list[int], seed: int) -> None:
    """The token is the first whose cumulative share exceeds the row's uniform, in the order that the row walks."""
    logits = logits_for(len(params), seed % 97)
    rows = [row(p, tokens, 3, seed + i if seed < 0 else seed - i, (5, 6)) for i, p in enumerate(params)]
    raw = logits.numpy().copy()
    found = sample(logits, rows)
    for i, state in enumerate(rows):
        p = oracle_distribution(raw[i], state, tokens, 3)
        assert p[found.token_ids[i]] > 0, "a token that the filters cut off"
        if state.params.is_greedy:
            assert p[found.token_ids[i]] == 1
            continue
        order = np.argsort(-p, kind="stable") if state.params.has_filters else np.arange(VOCAB)
        cumulative = np.cumsum(p[order])
        u = uniform(state.seed, len(tokens))
        near = np.abs(cumulative - u).min() < 1e-6
        assert near or order[int(np.searchsorted(cumulative, u, side="right"))] == found.token_ids[i]


def test_frequencies_follow_the_distribution() -> None:
    """Chi-square over 40,000 draws for three filters; false-alarm probability 1e-6 for all three together."""
    draws, logits = 40_000, logits_for(1, 3)
    for params in (
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.8, top_k=12),
        SamplingParams(temperature=1.5, top_p=0.8, min_p=0.01),
    ):
        state = row(params)
        expected = oracle_distribution(logits[0].numpy(), state, [1, 2, 3], 3) * draws
        rows = [row(params, seed=seed) for seed in range(2000)]
        counts = np.zeros(VOCAB)
        for position in range(draws // 2000):
            for one in rows:
                one.num_tokens = 3 + position
            np.add.at(counts, sample(logits.repeat(2000, 1), rows).token_ids, 1)
        assert counts[expected == 0].sum() == 0
        pooled = expected < 5
        groups = [(counts[i], expected[i]) for i in np.flatnonzero(~pooled)]
        if expected[pooled].sum() > 0:
            groups.append((counts[pooled].sum(), expected[pooled].sum()))
        statistic = sum((found - wanted) ** 2 / wanted for found, wanted in groups)
        # Wilson and Hilferty: (χ²/n)^(1/3) is normal; 4.97 standard deviations leave 3.3e-7 on one side.
        n = len(groups) - 1
        limit = n * (1 - 2 / (9 * n) + 4.97 * math.sqrt(2 / (9 * n))) ** 3
        assert statistic < limit


def test_uniforms_are_uniform_and_reproducible() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # first output of the published generator seeded with 0
    assert uniform(7, 3) == uniform(7, 3)
    assert len({uniform(seed, position) for seed in range(-20, 20) for position in range(40)}) == 1600
    values = np.array([uniform(seed, position) for seed in range(200) for position in range(200)])
    assert values.min() >= 0
    assert values.max() < 1
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    # Chi-square with 19 degrees of freedom exceeds 75 with probability 1e-8.
    assert ((counts - 2000) ** 2 / 2000).sum() < 75
    # Neighbouring seeds and positions are uncorrelated: |r| < 6/√n, false alarm 2e-9.
    grid = values.reshape(200, 200)
    for a, b in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), (grid[1:, :-1], grid[:-1, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 6 / math.sqrt(a.size)


def test_a_row_does_not_see_its_neighbours() -> None:
    options = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.9, top_p=0.7),
        SamplingParams(temperature=1.2, top_k=7, repetition_penalty=1.4),
        SamplingParams(temperature=0.0, presence_penalty=1.0, logprobs=2),
        SamplingParams(temperature=1.0, min_p=0.1, logit_bias={4: 5.0}),
    ]
    logits = logits_for(len(options), 8)
    rows = [row(p, seed=i) for i, p in enumerate(options)]
    together = sample(logits.clone(), rows).token_ids
    alone = [sample(logits[i : i + 1].clone(), [rows[i]]).token_ids[0] for i in range(len(rows))]
    backwards = sample(logits.flip(0), rows[::-1]).token_ids[::-1]
    assert together == alone == backwards


def test_seed_and_position_decide_alone() -> None:
    params = SamplingParams(temperature=1.0)
    logits = torch.zeros(1, VOCAB)
    first = [sample(logits.clone(), [row(params, seed=s)]).token_ids[0] for s in range(60)]
    assert first == [sample(logits.clone(), [row(params, seed=s)]).token_ids[0] for s in range(60)]
    assert len(set(first)) > 20
    state = row(params, seed=1)
    sequence = []
    for _ in range(30):
        sequence.append(sample(logits.clone(), [state]).token_ids[0])
        state.append(sequence[-1])
    assert len(set(sequence)) > 10
    # A row admitted again with its outputs goes on where it stopped.
    again = row(params, [1, 2, 3, *sequence[:11]], 3, seed=1)
    assert sample(logits.clone(), [again]).token_ids[0] == sequence[11]


def test_penalties_count_outputs_and_repetition_also_the_prompt() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [7, 8, 9]] = torch.tensor([2.0, 1.9, 1.8])
    state = row(SamplingParams(temperature=0.0, frequency_penalty=0.15), [7, 7, 7], 3)
    order = []
    for _ in range(6):
        order.append(sample(logits.clone(), [state]).token_ids[0])
        state.append(order[-1])
    assert order == [7, 8, 7, 9, 8, 7]
    repetition = SamplingParams(temperature=0.0, repetition_penalty=1.2)
    assert sample(logits.clone(), [row(repetition, [7, 1, 1], 3)]).token_ids == [8]
    presence = SamplingParams(temperature=0.0, presence_penalty=2.0)
    assert sample(logits.clone(), [row(presence, [7, 1, 1], 3)]).token_ids == [7]
    assert sample(logits.clone(), [row(presence, [1, 1, 1, 7], 3)]).token_ids == [8]


def test_min_tokens_bans_stop_ids_until_reached() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 6], logits[0, 9] = 9.0, 8.0, 7.0
    params = SamplingParams(temperature=0.0, min_tokens=2, max_tokens=9)
    for outputs, expected in (([], 9), ([9], 9), ([9, 9], 5)):
        assert sample(logits.clone(), [row(params, [1, 2, 3, *outputs], 3, stop=(5, 6, 4000))]).token_ids == [expected]


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = logits_for(3, 5)
    logits[1, 10] = float("-inf")
    raw = logits.double().log_softmax(-1)
    rows = [
        row(SamplingParams(temperature=0.0, logprobs=3, logit_bias={11: 50.0})),
        row(SamplingParams(temperature=1.8, top_k=4, logprobs=20)),
        row(SamplingParams(temperature=0.0, logprobs=0)),
    ]
    found = sample(logits.clone(), rows)
    assert found.logprobs is not None
    assert found.token_ids[0] == 11
    for i, count in enumerate((3, 20, 0)):
        entry = found.logprobs[i]
        assert entry is not None
        assert entry.logprob == pytest.approx(float(raw[i, found.token_ids[i]]), abs=1e-4)
        top = raw[i].topk(count)
        assert entry.top_ids == top.indices.tolist()
        assert entry.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-4)
    everything = sample(logits[1:2].clone(), [row(SamplingParams(temperature=0.0, logprobs=20, logit_bias={10: 3.0}))])
    assert everything.logprobs is not None
    forced = torch.full((1, VOCAB), float("-inf"))
    forced[0, 3] = 1.0
    entry = sample(forced, [row(SamplingParams(temperature=1.0, logprobs=2))]).logprobs[0]  # type: ignore[index]
    assert entry is not None
    assert (entry.logprob, entry.top_ids[0], entry.top_logprobs[1]) == (0.0, 3, LOGPROB_FLOOR)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_flagged_alone(bad: float, temperature: float) -> None:
    logits = logits_for(3, 6)
    logits[1, 17] = bad
    params = SamplingParams(temperature=temperature, top_p=0.9, logprobs=1, repetition_penalty=1.1)
    clean = sample(logits_for(3, 6), [row(params, seed=i) for i in range(3)])
    found = sample(logits, [row(params, seed=i) for i in range(3)])
    assert found.flags == [0, FLAG_NAN, 0]
    assert 0 <= found.token_ids[1] < VOCAB
    assert [found.token_ids[i] for i in (0, 2)] == [clean.token_ids[i] for i in (0, 2)]


def test_extreme_temperatures_and_ties_stay_finite() -> None:
    logits = logits_for(1, 7) * 1000
    best = int(logits.argmax())
    assert sample(logits.clone(), [row(SamplingParams(temperature=1e-5))]).token_ids == [best]
    assert sample(torch.zeros(1, VOCAB), [row(SamplingParams(temperature=0.0))]).token_ids == [0]
    tokens = {sample(torch.zeros(1, VOCAB), [row(SamplingParams(top_k=2), seed=s)]).token_ids[0] for s in range(40)}
    assert tokens == {0, 1}
