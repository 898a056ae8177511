"""The experts of a layer, by whichever kernel suits the number of tokens; `ExpertIndex.block_t` has made the choice.

Below 512 tokens an expert: `moe_decode`; from there on: `moe_prefill`. `moe_gluon` (no warp specialisation) and
`moe_dense` (a bfloat16 scratch and torch's grouped GEMM) were slower at every size measured; they stay as independent
checks. All need scales that fold: ask `fp4.folds` at load.
"""

from __future__ import annotations

from torch import Tensor

from kernels.triton.moe_decode import moe_decode
from kernels.triton.moe_prefill import moe_prefill
from kernels.triton.router import ExpertIndex

PREFILL_BLOCK_T = 256


def run_experts(
    x: Tensor,
    weights: Tensor,
    index: ExpertIndex,
    gate_up: tuple[Tensor, Tensor, Tensor],
    down: tuple[Tensor, Tensor, Tensor],
    limit: float,
    *,
    act: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run each token through its experts.

    Shapes: x bfloat16 [T, expert_width(H)] in expert order; weights float32 [T, k]; gate_up and down are (blocks as in
    the checkpoint, scales from `prepare_scales`, bias). Returns deltas bfloat16 [T, k, H] and slot weights or None:
    give both to `add_rms_norm(deltas, None, residual, …, slot_weights=…)`. `act` [T · k, expert_width(I)] and `out`
    [T, k, H], zeroed once by the caller, spare the small path its allocations; a graph needs them.
    """
    k = weights.shape[1]
    if index.block_t >= PREFILL_BLOCK_T:
        return moe_prefill(x, k, index, gate_up, down, limit), weights
    return moe_decode(x, weights, index, gate_up, down, limit, act=act, out=out), None
