"""The router of a mixture of experts, and the index from experts to the tokens they got.

Reference: `kernels.reference.moe.router_topk`. The index needs no host: experts' lists lie one after another, in order
of the flat slot id token · k + slot, so results do not depend on timing.
"""

# Device code has no Python types.
# ruff: noqa: ANN001, ANN202, C408
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
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


@triton.jit
def _index_kernel(ids_ptr, order_ptr, offsets_ptr, total, num_experts, block: tl.constexpr):
    expert = tl.program_id(0)
    lane = tl.arange(0, block)
    before = tl.zeros([block], tl.int32)
    mine = tl.zeros([block], tl.int32)
    for start in range(0, total, block):
        ids = tl.load(ids_ptr + start + lane, mask=start + lane < total, other=-1)
        before += ((ids >= 0) & (ids < expert)).to(tl.int32)
        mine += (ids == expert).to(tl.int32)
    base = tl.sum(before, axis=0)
    tl.store(offsets_ptr + expert, base)
    if expert == num_experts - 1:
        tl.store(offsets_ptr + num_experts, base + tl.sum(mine, axis=0))
    for start in range(0, total, block):
        ids = tl.load(ids_ptr + start + lane, mask=start + lane < total, other=-1)
        hit = (ids == expert).to(tl.int32)
        rank = tl.cumsum(hit, axis=0)
        tl.store(order_ptr + base + rank - 1, start + lane, mask=hit > 0)
        base += tl.sum(hit, axis=0)


def expert_index(ids: Tensor, num_experts: int, *, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """List the flat slots (token · k + slot) of each expert.

    Shapes: ids int32 [T, k], -1 for none; returns order int32 [T · k] and offsets int32 [E + 1]: expert e owns
    order[offsets[e] : offsets[e + 1]], ascending. Entries of `order` past offsets[E] are not written.
    """
    total = ids.numel()
    if out is None:
        order = torch.empty(total, dtype=torch.int32, device=ids.device)
        offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=ids.device)
    else:
        order, offsets = out
    block = min(4096, max(128, triton.next_power_of_2(total)))
    _index_kernel[(num_experts,)](
        ids, order, offsets, total, num_experts, block=block, num_warps=4 if block <= 1024 else 8
    )
    return order, offsets
