"""What the persistent kernel of `layers.cu` is handed: each layer's pointers in a table, and the step's buffers.

Knows: the layouts of `Layer` (whole.cuh) and `Step` (layers.cu), and which shapes the kernel serves. Refuses to know:
how it is compiled and launched; see decode.py.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.cuda.exchange import exchange_type

if TYPE_CHECKING:
    from kernels.cuda.decode import DecodeShape, LayerWeights

MAX_ROWS = 8
FASTEST_ROWS = 4  # above, six launches a layer are faster: see docs/performance-log.md
GROUPS = 2  # of warps in a block, each with its share of the block's work
_WEIGHTS = (
    "qkv",
    "qkv_bias",
    "sinks",
    "out",
    "out_bias",
    "post_norm",
    "router",
    "router_bias",
    "gate_up_blocks",
    "gate_up_scales",
    "gate_up_bias",
    "down_blocks",
    "down_scales",
    "down_bias",
)
_BUFFERS = (
    "layers",
    "rotations",
    "positions",
    "lengths",
    "residual",
    "scaled",
    "first_squares",
    "squares",
    "query",
    "parts",
    "tickets",
    "attended",
    "expert_input",
    "expert_squares",
    "logits",
    "inverse",
    "ids",
    "shares",
    "act",
    "active",
    "counters",
)


@cache
def step_type(ranks: int) -> Any:
    """Give `Step` of layers.cu, passed by value, for a number of ranks that sum inside."""

    class StepArguments(ctypes.Structure):
        _fields_ = (
            *((name, ctypes.c_void_p) for name in _BUFFERS),
            ("num_layers", ctypes.c_int),
            ("first_count", ctypes.c_int),
            ("epsilon", ctypes.c_float),
            ("limit", ctypes.c_float),
            ("attention_scale", ctypes.c_float),
            *((("exchange", exchange_type(ranks)),) if ranks > 1 else ()),
        )

    return StepArguments


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One layer of a step: weights, its cache bf16 [slots, 2, K, D] and block table int32 [>= rows, M].

    `next_norm` float32 [H] is the norm that the stream meets after the layer; `window` counts keys, None means all.
    """

    weights: LayerWeights
    cache: Tensor
    table: Tensor
    window: int | None
    next_norm: Tensor

    def words(self) -> list[int]:
        pointers = [getattr(self.weights, name).data_ptr() for name in _WEIGHTS]
        pointers += [tensor.data_ptr() for tensor in (self.next_norm, self.cache, self.table)]
        return [*pointers, self.table.stride(0), self.window or 0]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Layers to run in one launch; holds their tensors. `active_experts` int32 [L]: what the last run touched."""

    calls: tuple[LayerCall, ...]
    table: Tensor
    active_experts: Tensor
    counters: Tensor

    @classmethod
    def create(cls, calls: Sequence[LayerCall], counters_per_layer: int, device: torch.device | str) -> LayerPlan:
        table = torch.tensor([call.words() for call in calls], dtype=torch.int64, device=device)
        active = torch.zeros(len(calls), dtype=torch.int32, device=device)
        counters = torch.zeros(len(calls) * counters_per_layer + 32, dtype=torch.int32, device=device)
        return cls(tuple(calls), table, active, counters)


def layers_unfit(shape: DecodeShape, rows: int, multiprocessors: int) -> str | None:
    """Say why the persistent kernel does not serve a shape on a device of so many multiprocessors, or None."""

    def group_share(total: int) -> int:
        return math.ceil(math.ceil(total / multiprocessors) / GROUPS)

    if rows > MAX_ROWS:
        return f"more than {MAX_ROWS} rows"
    if group_share((shape.heads + 2 * shape.kv_heads) * shape.head_dim // 2) > 16 or group_share(shape.hidden) > 16:
        return f"too large for {multiprocessors} multiprocessors"
    if rows * shape.kv_heads > GROUPS * multiprocessors:
        return "more rows and KV heads than groups of warps"
    if rows > multiprocessors:
        return "more rows than multiprocessors"
    return None
