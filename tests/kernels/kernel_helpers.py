"""Random inputs for the ops, at the shapes that the models' tests and tiny-oss use."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.ops import ExpertWeights, PagedBatch, Platform, Prefill, probe

CPU = probe("cpu", torch.float32)
REFERENCE_ONLY = Platform("cpu", torch.float32)


def experts(num: int, hidden: int, inter: int, generator: torch.Generator) -> ExpertWeights:
    def draw(*shape: int, scale: float) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    return ExpertWeights(
        gate_up_bias=draw(num, 2 * inter, scale=0.5),
        down_bias=draw(num, hidden, scale=0.5),
        gate_up=draw(num, 2 * inter, hidden, scale=2 * hidden**-0.5),
        down=draw(num, hidden, inter, scale=inter**-0.5),
    )


def paged_case(
    lengths: list[tuple[int, int]], window: int | None, generator: torch.Generator, *, heads: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor, PagedBatch]:
    """Rows with (context, new tokens) each, on scattered slots: query, cache, sinks and the batch.

    All slots that no row owns hold NaN, and so do those below a row's window: reading one is seen in the result.
    """
    num_heads, num_kv_heads, head_dim = heads
    capacity = max(context + new for context, new in lengths)
    num_slots = 1 + len(lengths) * capacity + 7
    order = torch.randperm(num_slots - 1, generator=generator) + 1
    table = torch.zeros(len(lengths), capacity + 1, dtype=torch.int64)
    cache = torch.full((num_slots, 2, num_kv_heads, head_dim), float("nan"))
    cache[0] = 0
    rows = sorted(range(len(lengths)), key=lambda row: lengths[row][1] > 1)
    decode = [row for row in rows if lengths[row][1] == 1]
    prefills, slots, token = [], [], 0
    for row in rows:
        context, new = lengths[row]
        own = order[row * capacity : row * capacity + context + new]
        table[row, 1 : 1 + context + new] = own
        first = 0 if window is None else max(0, context - window + 1)
        cache[own[first:]] = torch.randn(len(own) - first, 2, num_kv_heads, head_dim, generator=generator)
        if new > 1:
            prefills.append(Prefill(row, token, new, context))
        slots.append(own[context:])
        token += new
    batch = PagedBatch(window, table, torch.cat(slots), decode, [lengths[row][0] for row in decode], prefills)
    query = torch.randn(token, num_heads, head_dim, generator=generator)
    return query, cache, torch.randn(num_heads, generator=generator), batch
