"""Paged attention: specs against dense attention with a mask, window edges, sinks, and that nothing else is read."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import CPU, REFERENCE_ONLY, paged_case
from torch import Tensor

from kernels.cpu import attention as cpu_attention
from kernels.ops import Ops, PagedBatch, copy_slots

SPECS = {"reference": Ops(REFERENCE_ONLY), "cpu": Ops(CPU)}
HEADS = (16, 2, 32)


def dense(query: Tensor, cache: Tensor, sinks: Tensor, batch: PagedBatch, scale: float) -> Tensor:
    """Attention in float64 over whole rows with an explicit mask and an explicit sink column."""
    out = []
    rows = [(row, 1, position) for row, position in zip(batch.decode_rows, batch.decode_positions, strict=True)]
    rows += [(item.row, item.count, item.position) for item in batch.prefills]
    token = 0
    for row, count, position in rows:
        end = position + count
        kv = cache[batch.slot_table[row, 1 : end + 1]].double().nan_to_num(0.0)
        group = query.shape[1] // kv.shape[2]
        key, value = kv.repeat_interleave(group, dim=2).unbind(1)
        scores = torch.einsum("thd,lhd->htl", query[token : token + count].double(), key) * scale
        i, j = torch.arange(position, end)[:, None], torch.arange(end)
        mask = j <= i if batch.window is None else (j <= i) & (j > i - batch.window)
        scores = scores.masked_fill(~mask, float("-inf"))
        column = sinks.double()[:, None, None].expand(-1, count, 1)
        weights = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
        out.append(torch.einsum("htl,lhd->thd", weights, value).flatten(1))
        token += count
    return torch.cat(out).float()


CASES = {
    "one row": [(40, 1)],
    "one row, its first token": [(0, 1)],
    "two rows": [(3, 1), (200, 1)],
    "rows up to the loop's limit": [(i * 31, 1) for i in range(cpu_attention.SINGLE_ROWS)],
    "rows at once, unequal": [(i * 23 % 150, 1) for i in range(9)],
    "rows at once, all past the window": [(150, 1)] * 6,
    "whole prompt": [(0, 300)],
    "chunk after a prefix": [(130, 70)],
    "decode and chunks mixed": [(0, 20), (64, 1), (5, 1), (40, 33), (0, 2)],
    "several tiles": [(17, 2 * cpu_attention.QUERY_TILE + 3)],
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("window", [None, 1, 24, 128])
@pytest.mark.parametrize("case", CASES)
def test_matches_dense_attention_and_reads_nothing_else(spec: str, window: int | None, case: str) -> None:
    generator = torch.Generator().manual_seed(len(case))
    query, cache, sinks, batch = paged_case(CASES[case], window, generator, heads=HEADS)
    found = SPECS[spec].checked().paged_attention(query, cache, sinks, batch, 32**-0.5)
    assert float((found - dense(query, cache, sinks, batch, 32**-0.5)).abs().max()) <= 1e-5


def test_rows_too_long_to_gather_together_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = CASES["rows at once, unequal"]
    generator = torch.Generator().manual_seed(0)
    query, cache, sinks, batch = paged_case(lengths, None, generator, heads=HEADS)
    longest = max(length for length, _ in lengths) + 1
    needed = len(lengths) * longest * 2 * HEADS[1] * HEADS[2] * 4
    calls: list[int] = []
    together = cpu_attention._decode

    def counted(query: Tensor, cache: Tensor, sinks: Tensor, batch: PagedBatch, scale: float) -> Tensor:
        calls.append(len(batch.decode_rows))
        return together(query, cache, sinks, batch, scale)

    monkeypatch.setattr(cpu_attention, "_decode", counted)
    found = []
    for limit in (needed, needed - 1):
        monkeypatch.setattr(cpu_attention, "MAX_GATHERED_BYTES", limit)
        batch.derived.clear()
        found.append(SPECS["cpu"].checked().paged_attention(query, cache, sinks, batch, 32**-0.5))
    assert calls == [len(lengths)]
    assert float((found[0] - found[1]).abs().max()) <= 1e-5


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("length", [127, 128, 129, 130])
def test_the_window_holds_the_query_and_127_before_it(spec: str, length: int) -> None:
    """Only key 0 carries a value: the last query sees it iff 128 tokens are there at most."""
    generator = torch.Generator().manual_seed(length)
    for context, new in ((length - 1, 1), (0, length)):
        query, cache, sinks, batch = paged_case([(context, new)], 128, generator, heads=HEADS)
        cache[:, 1] = 0
        cache[batch.slot_table[0, 1], :] = 1.0
        out = SPECS[spec].paged_attention(query, cache.nan_to_num(0.0), sinks, batch, 32**-0.5)[-1]
        assert bool((out > 0).all() if length <= 128 else (out == 0).all())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("lengths", [[(30, 1)], [(30, 1)] * 7, [(0, 30)]], ids=["one", "many", "prefill"])
def test_sink_identities(spec: str, lengths: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(1)
    query, cache, _, batch = paged_case(lengths, None, generator, heads=HEADS)

    def run(sink: float) -> Tensor:
        return SPECS[spec].paged_attention(query, cache, torch.full((16,), sink), batch, 32**-0.5)

    none = dense(query, cache, torch.full((16,), float("-inf")), batch, 32**-0.5)
    assert float((run(float("-inf")) - none).abs().max()) <= 1e-6
    assert float(run(200.0).abs().max()) <= 1e-6


def test_lse_form_equals_column_form() -> None:
    generator = torch.Generator().manual_seed(2)
    scores, value = torch.randn(5, 9, generator=generator).double(), torch.randn(9, 4, generator=generator).double()
    sink = torch.randn(5, 1, generator=generator).double()
    column = torch.cat((scores, sink), -1).softmax(-1)[:, :-1] @ value
    factor = torch.sigmoid(scores.logsumexp(-1, keepdim=True) - sink)
    assert float((column - scores.softmax(-1) @ value * factor).abs().max()) <= 1e-12


@pytest.mark.parametrize("spec", SPECS)
def test_bfloat16_cache_under_float32_queries(spec: str) -> None:
    generator = torch.Generator().manual_seed(3)
    for lengths in ([(40, 1)], [(40, 1)] * 6, [(10, 30)]):
        query, cache, sinks, batch = paged_case(lengths, 24, generator, heads=HEADS)
        small = cache.to(torch.bfloat16)
        found = SPECS[spec].paged_attention(query, small, sinks, batch, 0.2)
        assert float((found - dense(query, small.float(), sinks, batch, 0.2)).abs().max()) <= 1e-5


def test_copied_slots_hold_what_their_sources_hold() -> None:
    cache = torch.randn(40, 2, 3, 8, generator=torch.Generator().manual_seed(4))
    before, source, target = cache.clone(), torch.tensor([3, 17, 39]), torch.tensor([20, 4, 5])
    copy_slots(cache, source, target)
    assert torch.equal(cache[target], before[source])
    rest = [slot for slot in range(40) if slot not in target]
    assert torch.equal(cache[rest], before[rest])
