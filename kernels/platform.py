"""What a kernel may ask about the machine: device kind, dtype, which optional backends torch was built with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class Platform:
    """Where ops will run. `has_onednn_linear`: torch can run a linear on weights packed by oneDNN."""

    device: Literal["cpu", "cuda"]
    dtype: torch.dtype
    has_onednn_linear: bool = False

    def __str__(self) -> str:
        return f"{self.device}/{str(self.dtype).removeprefix('torch.')}"


def probe(device: Literal["cpu", "cuda"], dtype: torch.dtype) -> Platform:
    """Describe this machine for one device kind and dtype."""
    return Platform(device, dtype, has_onednn_linear=device == "cpu" and _onednn_linear_works())


@cache
def _onednn_linear_works() -> bool:
    """Try the packed linear once: the ops are internal to torch, so their presence is probed, never assumed."""
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.eye(16), 4)
        out = torch.ops.mkldnn._linear_pointwise(torch.ones(4, 16), weight, None, "none", [], "")
        return bool(torch.equal(out, torch.ones(4, 16)))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
