"""Keys and values copied from slot to slot of a paged cache, in place.

Reference: `kernels.reference.attention.copy_slots`.
"""

# Device code has no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _copy_kernel(cache_ptr, source_ptr, target_ptr, width, block: tl.constexpr):
    pair = tl.program_id(0)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < width
    source = tl.load(source_ptr + pair).to(tl.int64) * width
    target = tl.load(target_ptr + pair).to(tl.int64) * width
    tl.store(cache_ptr + target + at, tl.load(cache_ptr + source + at, mask=inside), mask=inside)


def copy_slots(cache: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy slot source[i] to target[i]: cache [S, 2, K, D] contiguous, both int64 [N]; see the reference."""
    width = cache[0].numel()
    if source.numel():
        _copy_kernel[(source.numel(), triton.cdiv(width, 1024))](cache, source, target, width, block=1024, num_warps=4)
