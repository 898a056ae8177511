"""Optimizers: Muon for matrices, AdamW for everything else.

Knows: how the parameters of a tiny-oss model are split between the two.
Refuses to know: schedules; the learning rate is scaled from outside, per step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Quintic iteration that pushes singular values toward 1 fast rather than exactly (K. Jordan, "Muon", 2024).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NUM_STEPS = 5


def orthogonalize(update: Tensor) -> Tensor:
    """Return the nearest semi-orthogonal matrix, roughly; batched over leading axes."""
    a, b, c = _NEWTON_SCHULZ
    x = update.bfloat16() if update.is_cuda else update.float()
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_NUM_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = (x.mT if is_tall else x).to(update.dtype)
    return result


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for matrices and stacks of matrices."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum: Tensor = state["momentum"]
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalize(parameter.grad.lerp(momentum, group["momentum"]))
                # Match the size of an AdamW update whatever the shape.
                scale = 0.2 * max(parameter.shape[-2:]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)


def make_optimizers(model: nn.Module, lr: float, decay: float) -> list[torch.optim.Optimizer]:
    """Return Muon over hidden matrices and AdamW over embeddings, head, router, norms, biases and sinks.

    Frozen parameters are left out; an optimizer with nothing to do is, too.
    """
    matrices, tables, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or name.endswith("_bias"):
            vectors.append(parameter)
        elif "embed_tokens" in name or "lm_head" in name or "router" in name:
            tables.append(parameter)
        else:
            matrices.append(parameter)
    groups = [{"params": tables, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(Muon(matrices, lr=lr, decay=decay))
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-10))
    return optimizers
