"""Mixture of experts: the router, SwiGLU, the weighted sum. The reference, one expert at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.experts import ExpertWeights

SWIGLU_ALPHA = 1.702


def router_topk(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Choose k experts per token and weigh them: softmax over the chosen k, not over all.

    Shapes: x [T, H], weight [E, H], bias [E]; returns weights float32 [T, k] and ids int64 [T, k], best first.
    Among equal logits the lower id wins.
    """
    scores = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    values, ids = scores.sort(dim=-1, descending=True, stable=True)
    return values[:, :k].softmax(-1), ids[:, :k]


def swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """Combine gates [T, 0:I] and ups [T, I:2I] to [T, I].

    Maths: g := min(g, limit); u := clamp(u, −limit, limit); g · sigmoid(1.702 g) · (u + 1). g has no lower clamp.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    up = up.clamp(-limit, limit)
    return gate * torch.sigmoid(gate * SWIGLU_ALPHA) * (up + 1)


def moe_add(
    x: Tensor,
    router: Tensor,
    router_bias: Tensor,
    top_k: int,
    experts: ExpertWeights,
    limit: float,
    residual: Tensor,
) -> Tensor:
    """Return residual + the weighted outputs of each token's top-k experts; `residual` may be overwritten.

    Shapes: x [T, H], router [E, H], router_bias [E], residual [T, H].
    Maths: Σ_slots w · (down(swiglu(gate_up(x) + b₁)) + b₂), summed in float32 in slot order; slots of experts that are
    not in `experts` add nothing.
    """
    weights, ids = router_topk(x, router, router_bias, top_k)
    outputs = torch.zeros(*ids.shape, x.shape[1], dtype=torch.float32)
    for index in (torch.unique(ids) - experts.first).tolist():
        if not 0 <= index < experts.num_experts:
            continue
        tokens, slots = torch.where(ids == index + experts.first)
        gate_up, down = experts.expert(index)
        hidden = swiglu(torch.nn.functional.linear(x[tokens], gate_up, experts.gate_up_bias[index]), limit)
        result = torch.nn.functional.linear(hidden, down, experts.down_bias[index])
        outputs[tokens, slots] = weights[tokens, slots, None] * result.float()
    return residual.add_(outputs.sum(1).to(residual.dtype))
