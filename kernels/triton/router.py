"""The router of a mixture of experts, and the index from experts to the tokens they got.

Reference: `kernels.reference.moe.router_topk`. The index needs no host: experts' lists lie one after another, in order
of the flat slot id token · k + slot, so results do not depend on timing.
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


@triton.jit(do_not_specialize=["tokens"])
def _router_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    real_ptr,
    ids_ptr,
    weights_ptr,
    tokens,
    width,
    num_experts: tl.constexpr,
    experts: tl.constexpr,
    k: tl.constexpr,
    has_real: tl.constexpr,
    block_t: tl.constexpr,
    block_k: tl.constexpr,
    stages: tl.constexpr,
):
    token = tl.program_id(0) * block_t + tl.arange(0, block_t)
    expert = tl.arange(0, experts)
    column = tl.arange(0, block_k)
    inside = token < tokens
    x_rows = x_ptr + token[:, None].to(tl.int64) * width + column[None, :]
    w_rows = weight_ptr + expert[None, :] * width + column[:, None]
    logits = tl.zeros([block_t, experts], tl.float32)
    for start in tl.range(0, width, block_k, num_stages=stages):
        left = width - start
        x = tl.load(x_rows + start, mask=inside[:, None] & (column[None, :] < left), other=0.0)
        w = tl.load(w_rows + start, mask=(expert[None, :] < num_experts) & (column[:, None] < left), other=0.0)
        logits = tl.dot(x, w, logits)
    bias = tl.load(bias_ptr + expert, mask=expert < num_experts, other=0.0).to(tl.float32)
    logits = tl.where(expert[None, :] < num_experts, logits + bias[None, :], float("-inf"))

    is_real = inside
    if has_real:
        is_real = is_real & (tl.load(real_ptr + token, mask=inside, other=0) > 0)
    best = tl.max(logits, axis=1)
    total = tl.zeros([block_t], tl.float32)
    slot = tl.arange(0, k)[None, :]
    chosen_ids = tl.zeros([block_t, k], tl.int32)
    chosen = tl.zeros([block_t, k], tl.float32)
    for s in tl.static_range(k):
        top = tl.max(logits, axis=1)
        # The lowest id among equals; a row of NaN finds none and is kept inside the range.
        top_id = tl.min(tl.where(logits == top[:, None], expert[None, :], experts), axis=1)
        top_id = tl.minimum(top_id, num_experts - 1)
        weight = tl.exp(top - best)
        total += weight
        chosen_ids = tl.where(slot == s, top_id[:, None], chosen_ids)
        chosen = tl.where(slot == s, weight[:, None], chosen)
        logits = tl.where(expert[None, :] == top_id[:, None], float("-inf"), logits)
    chosen = tl.where(is_real[:, None], chosen / total[:, None], 0.0)
    chosen_ids = tl.where(is_real[:, None], chosen_ids, -1)
    target = token[:, None] * k + slot
    tl.store(ids_ptr + target, chosen_ids, mask=inside[:, None])
    tl.store(weights_ptr + target, chosen, mask=inside[:, None])


def router_topk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    *,
    real: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose k experts per token (a power of two) and weigh them by softmax over the chosen.

    Shapes: x bfloat16 [T, H], weight bfloat16 [E, H], bias [E]; `real` integer [T] or None: tokens where it is 0 are
    padding (a decode batch passes seq_lens). Returns ids int32 [T, k], best first, the lower id first among equals, and
    weights float32 [T, k]; padding gets id -1 and weight 0.
    """
    tokens, width = x.shape
    num_experts = weight.shape[0]
    if out is None:
        ids = torch.empty((tokens, k), dtype=torch.int32, device=x.device)
        weights = torch.empty((tokens, k), dtype=torch.float32, device=x.device)
    else:
        ids, weights = out
    if tokens == 0:
        return ids, weights
    block_t = 16 if tokens <= 2048 else 64
    block_k = 128 if block_t == 64 else 256
    _router_kernel[(triton.cdiv(tokens, block_t),)](
        x,
        weight,
        bias,
        ids if real is None else real,
        ids,
        weights,
        tokens,
        width,
        num_experts=num_experts,
        experts=max(16, triton.next_power_of_2(num_experts)),
        k=k,
        has_real=real is not None,
        block_t=block_t,
        block_k=block_k,
        stages=4 if num_experts <= 32 else 2,
        num_warps=4,
    )
    return ids, weights


@triton.jit(do_not_specialize=["total", "num_experts", "max_tiles", "block_t"])
def _index_kernel(
    ids_ptr,
    order_ptr,
    offsets_ptr,
    tiles_ptr,
    total,
    num_experts,
    max_tiles,
    block_t,
    experts: tl.constexpr,
    block: tl.constexpr,
):
    expert = tl.program_id(0)
    lane = tl.arange(0, block)
    other = tl.arange(0, experts)
    counts = tl.zeros([experts], tl.int32)
    for start in range(0, total, block):
        ids = tl.load(ids_ptr + start + lane, mask=start + lane < total, other=-1)
        counts += tl.histogram(ids, experts, mask=ids >= 0)
    before = other < expert
    base = tl.sum(tl.where(before, counts, 0), axis=0)
    mine = tl.sum(tl.where(other == expert, counts, 0), axis=0)
    tiles = (counts + block_t - 1) // block_t
    first = tl.sum(tl.where(before, tiles, 0), axis=0)
    end = base + mine
    tl.store(offsets_ptr + expert, base)
    row = tl.arange(0, 128)
    for start in range(0, (mine + block_t - 1) // block_t, 128):
        tile = start + row
        begin = base + tile * block_t
        target = tiles_ptr + (first + tile) * 4
        tl.store(target, tl.zeros([128], tl.int32) + expert, mask=begin < end)
        tl.store(target + 1, begin, mask=begin < end)
        tl.store(target + 2, tl.zeros([128], tl.int32) + end, mask=begin < end)
    if expert == num_experts - 1:
        tl.store(offsets_ptr + num_experts, end)
        tl.store(tiles_ptr + 3, tl.sum(tiles, axis=0))
        for start in range(tl.sum(tiles, axis=0), max_tiles, 128):
            tl.store(tiles_ptr + (start + row) * 4, tl.full([128], -1, tl.int32), mask=start + row < max_tiles)
    for start in range(0, total, block):
        ids = tl.load(ids_ptr + start + lane, mask=start + lane < total, other=-1)
        hit = (ids == expert).to(tl.int32)
        rank = tl.cumsum(hit, axis=0)
        tl.store(order_ptr + base + rank - 1, start + lane, mask=hit > 0)
        base += tl.sum(hit, axis=0)


@dataclass(frozen=True, slots=True)
class ExpertIndex:
    """Which flat slots (token · k + slot) each expert serves.

    Expert e owns order[offsets[e] : offsets[e + 1]], ascending; entries of `order` past offsets[E] are not written.
    `tiles` int32 [max tiles, 4] cuts the experts' lists into pieces of at most `block_t`: expert (-1: no more), begin,
    end of the expert's list; tiles[0, 3] counts them.
    """

    order: Tensor
    offsets: Tensor
    tiles: Tensor
    block_t: int

    @classmethod
    def allocate(
        cls, tokens: int, k: int, num_experts: int, device: torch.device | str, block_t: int | None = None
    ) -> ExpertIndex:
        """Make room for the index of `tokens` tokens; `block_t` defaults to what suits their number."""
        slots = tokens * k
        block_t = choose_block_t(tokens, k, num_experts) if block_t is None else block_t
        return cls(
            torch.empty(slots, dtype=torch.int32, device=device),
            torch.empty(num_experts + 1, dtype=torch.int32, device=device),
            torch.empty((min(num_experts, slots) + slots // block_t, 4), dtype=torch.int32, device=device),
            block_t,
        )


def choose_block_t(tokens: int, k: int, num_experts: int) -> int:
    """Size the token tile: room for nearly every expert's load at decode, then what was measured fastest."""
    mean = tokens * k / num_experts
    for block_t in (16, 32):
        if mean * 1.6 <= block_t:
            return block_t
    return 64 if mean < 512 else 256


def expert_index(
    ids: Tensor, num_experts: int, *, block_t: int | None = None, out: ExpertIndex | None = None
) -> ExpertIndex:
    """Index the slots of each expert. Shapes: ids int32 [T, k], -1 for none."""
    index = ExpertIndex.allocate(ids.shape[0], ids.shape[1], num_experts, ids.device, block_t) if out is None else out
    total = ids.numel()
    block = 1024 if total <= 1024 else 4096
    _index_kernel[(num_experts,)](
        ids,
        index.order,
        index.offsets,
        index.tiles,
        total,
        num_experts,
        index.tiles.shape[0],
        index.block_t,
        experts=triton.next_power_of_2(num_experts),
        block=block,
        num_warps=4 if block <= 1024 else 8,
    )
    return index
