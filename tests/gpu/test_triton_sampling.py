"""The distribution of the Triton samplers: temperature, top-k, min-p, top-p, the far tail, the whole vocabulary.

Each chi-square limit is the quantile at 5 standard deviations (Wilson-Hilferty): a false alarm in 3.5 million checks.
Draws come from one seed at many positions, or from many seeds at one position: both must be independent.
"""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

HAS_GPU = importlib.util.find_spec("triton") is not None and torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device and triton")]
DEVICE = "cuda"


def draw(
    logits: torch.Tensor,
    draws: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    is_by_seed: bool = False,
) -> torch.Tensor:
    """Sample one row of logits [V] `draws` times; returns how often each token came, float64 [V]."""
    from kernels.triton import sampling

    def full(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((draws,), value, dtype=dtype, device=DEVICE)

    rows = logits.expand(draws, -1)
    temperatures, counter = full(temperature, torch.float32), torch.arange(draws, device=DEVICE)
    seeds = counter * 7919 + 2**33 if is_by_seed else full(1234, torch.int64)
    positions = full(17, torch.int32) if is_by_seed else counter.int()
    thresholds = None
    if top_k or top_p < 1 or min_p:
        ints, floats = torch.int32, torch.float32
        options = ((temperature, floats), (top_k, ints), (top_p, floats), (min_p, floats))
        one = [full(value, dtype)[:1] for value, dtype in options]
        thresholds = sampling.sampling_thresholds(rows[:1], *one).expand(draws).contiguous()
    ids, nan = sampling.sample(rows, temperatures, seeds, positions, thresholds=thresholds)
    assert not nan.any()
    return torch.bincount(ids.long(), minlength=len(logits)).double()


def expected_shares(
    logits: torch.Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """Give the distribution to be sampled: top-k and min-p, then top-p of what these left, renormalised; float64."""
    shares = (logits.double() / temperature).softmax(-1)
    values, order = shares.sort(descending=True)
    keep = values >= min_p * values[0]
    if top_k:
        keep &= torch.arange(len(values), device=DEVICE) < top_k
    values = values * keep
    before = values.cumsum(0) - values
    values = values * ((before < top_p * values.sum()) | (top_p >= 1))
    return torch.zeros_like(shares).scatter_(0, order, values / values.sum())


def assert_fits(found: torch.Tensor, shares: torch.Tensor) -> None:
    """Compare counts with shares by chi-square; tokens that are expected fewer than 10 times are pooled."""
    draws = found.sum()
    assert not found[shares == 0].any(), "a token was sampled that had been cut off"
    expected = shares * draws
    is_rare = expected < 10
    found = torch.cat((found[~is_rare], found[is_rare].sum()[None]))
    expected = torch.cat((expected[~is_rare], expected[is_rare].sum()[None]))
    if expected[-1] < 10:
        # Too few to be normal: a Poisson count this far out has a chance below 1e-7.
        assert found[-1] <= expected[-1] + 6 * math.sqrt(float(expected[-1]) + 1) + 6
        found, expected = found[:-1], expected[:-1]
    degrees = len(expected) - 1
    statistic = float(((found - expected) ** 2 / expected).sum())
    limit = degrees * (1 - 2 / (9 * degrees) + 5 * math.sqrt(2 / (9 * degrees))) ** 3
    assert statistic < limit, f"chi-square {statistic:.1f} with {degrees} degrees of freedom, limit {limit:.1f}"


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(300, generator=torch.Generator().manual_seed(5)).to(DEVICE) * 2


@pytest.mark.parametrize("is_by_seed", [False, True])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature(logits: torch.Tensor, temperature: float, is_by_seed: bool) -> None:
    found = draw(logits, 1 << 20, temperature=temperature, is_by_seed=is_by_seed)
    assert_fits(found, expected_shares(logits, temperature=temperature))


@pytest.mark.parametrize(
    "cuts",
    [
        {"top_k": 1}, {"top_k": 7}, {"top_p": 0.1}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 40, "top_p": 0.7},
        {"min_p": 0.02, "top_p": 0.9}, {"top_k": 30, "min_p": 0.05, "top_p": 0.6},
    ],
)  # fmt: skip
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_cuts(logits: torch.Tensor, cuts: dict[str, float], temperature: float) -> None:
    found = draw(logits, 1 << 18, temperature=temperature, **cuts)  # type: ignore[arg-type]
    shares = expected_shares(logits, temperature=temperature, **cuts)  # type: ignore[arg-type]
    if int((shares > 0).sum()) == 1:
        assert int(found.argmax()) == int(shares.argmax())
        assert int((found > 0).sum()) == 1
    else:
        assert_fits(found, shares)


def test_far_tail() -> None:
    """Tokens with shares down to 3e-6 come as often as they should, in 2^23 draws."""
    shares = torch.tensor([1.0, 1e-3, 1e-4, 3e-5, 1e-5, 3e-6], dtype=torch.float64, device=DEVICE)
    found = torch.zeros(6, dtype=torch.float64, device=DEVICE)
    logits = shares.log().float()
    for is_by_seed in (False, True):
        found += draw(logits, 1 << 22, is_by_seed=is_by_seed)
    assert_fits(found, shares / shares.sum())


def test_whole_vocabulary() -> None:
    """201,088 tokens, counted in 128 groups of scattered ids."""
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(201088, generator=generator).to(DEVICE)
    group = torch.randint(0, 128, (201088,), generator=generator).to(DEVICE)
    found = sum(draw(logits + 0.0, 1 << 13, is_by_seed=bool(i)) for i in range(2))
    assert isinstance(found, torch.Tensor)
    counts = torch.zeros(128, dtype=torch.float64, device=DEVICE).index_add_(0, group, found)
    shares = torch.zeros_like(counts).index_add_(0, group, expected_shares(logits))
    assert_fits(counts, shares)


def test_tokens_of_one_request_do_not_repeat_those_of_another() -> None:
    """Two seeds agree no more often than chance has it: 2^16 pairs of draws over 16 equal tokens, limit 6 sigma."""
    from kernels.triton import sampling

    draws = 1 << 16
    rows = torch.zeros(16, device=DEVICE).expand(draws, -1)
    ones, positions = torch.ones(draws, device=DEVICE), torch.arange(draws, device=DEVICE, dtype=torch.int32)
    first, second = (
        sampling.sample(rows, ones, torch.full((draws,), seed, device=DEVICE), positions)[0] for seed in (6, 7)
    )
    agree = int((first == second).sum())
    assert abs(agree - draws / 16) < 6 * math.sqrt(draws * 15 / 256)
    # Neither does a draw say anything about the next one.
    repeats = int((first[1:] == first[:-1]).sum())
    assert abs(repeats - draws / 16) < 6 * math.sqrt(draws * 15 / 256)


def test_rows_without_a_finite_maximum_are_flagged() -> None:
    from kernels.triton import sampling

    logits = torch.zeros(4, 5000, device=DEVICE)
    logits[0] = float("-inf")
    logits[1, 4000] = float("inf")
    logits[2, 4999] = float("nan")
    assert sampling.greedy(logits)[1].tolist() == [1, 1, 1, 0]
