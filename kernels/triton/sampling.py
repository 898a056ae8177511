"""Sampling without a sort: argmax, Gumbel noise from a counter-based hash, thresholds by radix search, penalties.

A sampled token is argmax(logit / T + g), g = -log(-log u) with u a hash of (seed, position, token id) alone: the same
request gives the same tokens in any batch and at any row. Top-k, min-p and top-p, in this order, become one threshold
on the logits; ties at the threshold all stay in. Twins in torch: `reference_sampling.py`.
"""

# Device code has no Python types.
# ruff: noqa: ANN001, ANN202, C408
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 8192


@triton.jit
def _mix(h):
    """Avalanche 32 bits: the finaliser of MurmurHash3."""
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    h ^= h >> 16
    return h


@triton.jit
def _gumbel(key, token):
    """Standard Gumbel noise of (key, token). The upper tail keeps full resolution: small v are exact in float32."""
    h = _mix(_mix(token.to(tl.uint32) * 0x9E3779B1 + key) ^ (key * 0x27D4EB2F + 0x165667B1))
    v = (h.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    v = tl.minimum(v, 0.99999994)
    exponential = tl.where(v < 1e-3, v + 0.5 * v * v, -tl.log(1.0 - v))
    return -tl.log(exponential)


@triton.jit(do_not_specialize=["vocab", "chunks"])
def _partial_kernel(
    logits_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    thresholds_ptr,
    scores_ptr,
    ids_ptr,
    flags_ptr,
    vocab,
    row_stride,
    chunks,
    is_greedy: tl.constexpr,
    has_threshold: tl.constexpr,
    chunk: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    token = part * chunk + tl.arange(0, chunk)
    inside = token < vocab
    score = tl.load(logits_ptr + row * row_stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    is_nan = score != score
    flag = tl.max(is_nan.to(tl.int32), axis=0)
    score = tl.where(is_nan, float("-inf"), score)
    if not is_greedy:
        if has_threshold:
            score = tl.where(score < tl.load(thresholds_ptr + row), float("-inf"), score)
        temperature = tl.load(temperature_ptr + row)
        if temperature > 0.0:
            seed = tl.load(seeds_ptr + row)
            position = tl.load(positions_ptr + row).to(tl.uint32)
            low = (seed & 0xFFFFFFFF).to(tl.uint32)
            high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
            key = _mix(_mix(low ^ 0x9E3779B9) + _mix(high ^ 0x7F4A7C15) * 3 + position * 0x85EBCA77)
            score = score / temperature + _gumbel(key, token)
    best = tl.max(score, axis=0)
    best_id = tl.min(tl.where((score == best) & inside, token, 2147483647), axis=0)
    tl.store(scores_ptr + row * chunks + part, best)
    tl.store(ids_ptr + row * chunks + part, best_id)
    tl.store(flags_ptr + row * chunks + part, flag)


@triton.jit(do_not_specialize=["vocab", "chunks"])
def _final_kernel(scores_ptr, ids_ptr, flags_ptr, out_ptr, nan_ptr, vocab, chunks, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, block)
    inside = lane < chunks
    score = tl.load(scores_ptr + row * chunks + lane, mask=inside, other=float("-inf"))
    ids = tl.load(ids_ptr + row * chunks + lane, mask=inside, other=2147483647)
    flag = tl.load(flags_ptr + row * chunks + lane, mask=inside, other=0)
    best = tl.max(score, axis=0)
    best_id = tl.min(tl.where(score == best, ids, 2147483647), axis=0)
    tl.store(out_ptr + row, tl.minimum(best_id, vocab - 1))
    # No finite maximum: every logit -inf, or one +inf.
    is_bad = (best == float("-inf")) | (best == float("inf"))
    tl.store(nan_ptr + row, tl.maximum(tl.max(flag, axis=0), is_bad.to(tl.int32)))


@dataclass(frozen=True, slots=True)
class SampleWorkspace:
    """Partial results of the chunks of a row."""

    scores: Tensor
    ids: Tensor
    flags: Tensor

    @classmethod
    def allocate(cls, rows: int, vocab: int, device: torch.device | str) -> SampleWorkspace:
        """Make room for `rows` rows of `vocab` logits."""
        size = rows * triton.cdiv(vocab, _CHUNK)
        return cls(
            torch.empty(size, dtype=torch.float32, device=device),
            torch.empty(size, dtype=torch.int32, device=device),
            torch.empty(size, dtype=torch.int32, device=device),
        )


def _sample(
    logits: Tensor,
    noise: tuple[Tensor, Tensor, Tensor] | None,
    thresholds: Tensor | None,
    out: tuple[Tensor, Tensor] | None,
    workspace: SampleWorkspace | None,
) -> tuple[Tensor, Tensor]:
    rows, vocab = logits.shape
    if out is None:
        ids = torch.empty(rows, dtype=torch.int32, device=logits.device)
        nan = torch.empty(rows, dtype=torch.int32, device=logits.device)
    else:
        ids, nan = out
    work = SampleWorkspace.allocate(rows, vocab, logits.device) if workspace is None else workspace
    chunks = triton.cdiv(vocab, _CHUNK)
    temperature, seeds, positions = (logits, logits, logits) if noise is None else noise
    _partial_kernel[(rows, chunks)](
        logits,
        temperature,
        seeds,
        positions,
        logits if thresholds is None else thresholds,
        work.scores,
        work.ids,
        work.flags,
        vocab,
        logits.stride(0),
        chunks,
        is_greedy=noise is None,
        has_threshold=thresholds is not None,
        chunk=_CHUNK,
        num_warps=8,
    )
    block = triton.next_power_of_2(chunks)
    _final_kernel[(rows,)](work.scores, work.ids, work.flags, ids, nan, vocab, chunks, block=block, num_warps=1)
    return ids, nan


def greedy(
    logits: Tensor, *, out: tuple[Tensor, Tensor] | None = None, workspace: SampleWorkspace | None = None
) -> tuple[Tensor, Tensor]:
    """Take the largest logit of each row, the lower id among equals.

    Shapes: logits float32 or bfloat16 [B, V]; returns ids int32 [B] and int32 [B], 1 where the row holds a NaN
    or its largest logit is not finite.
    """
    return _sample(logits, None, None, out, workspace)


def sample(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    thresholds: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    workspace: SampleWorkspace | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample a token per row; rows of temperature 0 are greedy.

    Shapes: logits float32 or bfloat16 [B, V], temperature float32 [B], seeds int64 [B], positions int32 [B] (of the
    token to be), thresholds float32 [B] (from `sampling_thresholds`: smaller logits cannot win); returns as `greedy`.
    """
    return _sample(logits, (temperature, seeds, positions), thresholds, out, workspace)


@triton.jit
def _ordered(x):
    """Map float32 to uint32 so that the order stays."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _search(row_ptr, vocab, target, floor, largest, inverse, is_mass: tl.constexpr, block: tl.constexpr):
    """Find the largest key t with Σ_{key >= t} w >= target, three bits a pass; w is 1, or exp((x - largest) / T).

    Elements under the key `floor` weigh nothing.
    """
    lane = tl.arange(0, block)
    found = tl.full([], 0, tl.uint32)
    for step in range(11):
        shift = tl.maximum(29 - 3 * step, 0).to(tl.uint32)
        one = tl.full([], 1, tl.uint32) << shift
        s1 = tl.zeros([block], tl.float32)
        s2 = tl.zeros([block], tl.float32)
        s3 = tl.zeros([block], tl.float32)
        s4 = tl.zeros([block], tl.float32)
        s5 = tl.zeros([block], tl.float32)
        s6 = tl.zeros([block], tl.float32)
        s7 = tl.zeros([block], tl.float32)
        for start in range(0, vocab, block):
            x = tl.load(row_ptr + start + lane, mask=start + lane < vocab, other=float("-inf")).to(tl.float32)
            x = tl.where(x != x, float("-inf"), x)
            key = _ordered(x)
            if is_mass:
                weight = tl.exp((x - largest) * inverse)
            else:
                weight = tl.full([block], 1.0, tl.float32)
            weight = tl.where((key >= floor) & (start + lane < vocab), weight, 0.0)
            s1 += tl.where(key >= found + one, weight, 0.0)
            s2 += tl.where(key >= found + one * 2, weight, 0.0)
            s3 += tl.where(key >= found + one * 3, weight, 0.0)
            s4 += tl.where(key >= found + one * 4, weight, 0.0)
            s5 += tl.where(key >= found + one * 5, weight, 0.0)
            s6 += tl.where(key >= found + one * 6, weight, 0.0)
            s7 += tl.where(key >= found + one * 7, weight, 0.0)
        digit = (tl.sum(s1, axis=0) >= target).to(tl.uint32)
        digit += (tl.sum(s2, axis=0) >= target).to(tl.uint32)
        digit += (tl.sum(s3, axis=0) >= target).to(tl.uint32)
        # The last pass has two bits left; a digit above 3 would repeat the pass before, which said no.
        digit += (tl.sum(s4, axis=0) >= target).to(tl.uint32)
        digit += (tl.sum(s5, axis=0) >= target).to(tl.uint32)
        digit += (tl.sum(s6, axis=0) >= target).to(tl.uint32)
        digit += (tl.sum(s7, axis=0) >= target).to(tl.uint32)
        found += digit * one
    return found


@triton.jit(do_not_specialize=["vocab"])
def _threshold_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, out_ptr, vocab, row_stride, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    cuts_k = (top_k > 0) & (top_k < vocab)
    cuts_p = top_p < 1.0
    threshold = tl.full([], float("-inf"), tl.float32)
    if (temperature > 0.0) & (cuts_k | cuts_p | (min_p > 0.0)):
        row_ptr = logits_ptr + row * row_stride
        lane = tl.arange(0, block)
        most = tl.full([block], float("-inf"), tl.float32)
        for start in range(0, vocab, block):
            x = tl.load(row_ptr + start + lane, mask=start + lane < vocab, other=float("-inf")).to(tl.float32)
            most = tl.maximum(most, tl.where(x != x, float("-inf"), x))
        largest = tl.max(most, axis=0)
        inverse = 1.0 / temperature
        floor = tl.full([], 0, tl.uint32)
        if cuts_k:
            floor = _search(row_ptr, vocab, top_k.to(tl.float32), floor, largest, inverse, False, block)
        if min_p > 0.0:
            floor = tl.maximum(floor, _ordered(tl.minimum(largest + tl.log(min_p) * temperature, largest)))
        if cuts_p:
            mass = tl.zeros([block], tl.float32)
            for start in range(0, vocab, block):
                x = tl.load(row_ptr + start + lane, mask=start + lane < vocab, other=float("-inf")).to(tl.float32)
                x = tl.where(x != x, float("-inf"), x)
                mass += tl.where(_ordered(x) >= floor, tl.exp((x - largest) * inverse), 0.0)
            # At least the most likely token stays, whatever top_p says; it weighs 1.
            target = tl.maximum(tl.sum(mass, axis=0) * top_p, 1e-30)
            floor = _search(row_ptr, vocab, target, floor, largest, inverse, True, block)
        bits = tl.where(floor >> 31 == 1, floor & 0x7FFFFFFF, floor ^ 0xFFFFFFFF)
        threshold = tl.minimum(bits.to(tl.float32, bitcast=True), largest)
    tl.store(out_ptr + row, threshold)


def sampling_thresholds(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Find the smallest logit of each row that may be sampled: top-k and min-p, then top-p of what these left.

    Shapes: logits [B, V]; temperature, top_p (1: off) and min_p (0: off) float32 [B], top_k int32 [B] (0: off); returns
    float32 [B], -inf where nothing is cut. Rows that cut nothing cost nothing.
    """
    rows, vocab = logits.shape
    if out is None:
        out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _threshold_kernel[(rows,)](
        logits, temperature, top_k, top_p, min_p, out, vocab, logits.stride(0), block=4096, num_warps=16
    )
    return out


@triton.jit(do_not_specialize=["entries"])
def _adjust_kernel(
    logits_ptr,
    ids_ptr,
    counts_ptr,
    bias_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    entries,
    row_stride,
    has_counts: tl.constexpr,
    has_bias: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * block + tl.arange(0, block)
    token = tl.load(ids_ptr + row * entries + entry, mask=entry < entries, other=-1)
    inside = token >= 0
    at = logits_ptr + row * row_stride + token
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if has_counts:
        count = tl.load(counts_ptr + row * entries + entry, mask=inside, other=0).to(tl.float32)
        repetition = tl.load(repetition_ptr + row)
        x = tl.where(x > 0, x / repetition, x * repetition)
        x -= tl.load(frequency_ptr + row) * count
        x -= tl.where(count > 0, tl.load(presence_ptr + row), 0.0)
    if has_bias:
        x += tl.load(bias_ptr + row * entries + entry, mask=inside, other=0.0)
    tl.store(at, x.to(logits_ptr.dtype.element_ty), mask=inside)


def apply_penalties_(
    logits: Tensor, ids: Tensor, counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """Penalise tokens that a row has seen, in place.

    Shapes: logits [B, V]; ids int32 [B, M], each token once per row, -1 pads; counts int16 or int32 [B, M], how often
    the token was generated (0: it stands in the prompt only, so that repetition applies alone); the rest float32 [B].
    """
    rows, entries = ids.shape
    _adjust_kernel[(rows, triton.cdiv(entries, 256))](
        logits, ids, counts, logits, repetition, presence, frequency, entries, logits.stride(0),
        has_counts=True, has_bias=False, block=256, num_warps=4,
    )  # fmt: skip


def apply_logit_bias_(logits: Tensor, ids: Tensor, values: Tensor) -> None:
    """Add values float32 [B, M] to the logits of ids int32 [B, M] (each once per row, -1 pads), in place."""
    rows, entries = ids.shape
    _adjust_kernel[(rows, triton.cdiv(entries, 256))](
        logits, ids, ids, values, values, values, values, entries, logits.stride(0),
        has_counts=False, has_bias=True, block=256, num_warps=4,
    )  # fmt: skip
