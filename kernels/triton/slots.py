"""The experts' deltas of each token summed over its slots, where ranks sum them further before they are added.

Reference: the sum over slots in `add_rms_norm`, which does the same on its way where one rank has everything.
"""

# Device code has no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sum_kernel(
    deltas_ptr, weights_ptr, out_ptr, width, num_slots: tl.constexpr, has_weights: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    total = tl.zeros([block], tl.float32)
    for slot in tl.static_range(num_slots):
        at = deltas_ptr + (row * num_slots + slot) * width + column
        if has_weights:
            # A slot of no expert weighs 0, and nobody wrote its delta.
            weight = tl.load(weights_ptr + row * num_slots + slot)
            total += weight * tl.load(at, mask=inside & (weight != 0.0), other=0.0).to(tl.float32)
        else:
            total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + column, total.to(tl.bfloat16), mask=inside)


def sum_slots(deltas: Tensor, slot_weights: Tensor | None = None) -> Tensor:
    """Sum deltas bf16 [T, k, H] over slots, weighed by float32 [T, k] where given: bf16 [T, H]."""
    tokens, slots, width = deltas.shape
    out = torch.empty((tokens, width), dtype=torch.bfloat16, device=deltas.device)
    if tokens:
        _sum_kernel[(tokens,)](
            deltas,
            deltas if slot_weights is None else slot_weights,
            out,
            width,
            num_slots=slots,
            has_weights=slot_weights is not None,
            block=triton.next_power_of_2(width),
            num_warps=8,
        )
    return out
