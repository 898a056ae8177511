"""The public ops: the only door of this package.

Each name below is an `Op`: call it for the checked door, or take the functions chosen for a platform from `Ops`, once.
What an op means is written at its reference in `kernels/reference/`; faster specs register at the end of this file.
`explain()` says which spec serves a platform, and why not the others.
"""

from __future__ import annotations

import copy
from typing import Any

from kernels.cpu.register import register as _register_cpu
from kernels.experts import ExpertWeights, gates_first
from kernels.paging import PagedBatch, Prefill
from kernels.platform import Platform, probe
from kernels.reference import attention as _attention
from kernels.reference import basic as _basic
from kernels.reference import moe as _moe
from kernels.reference import mxfp4 as _mxfp4
from kernels.reference import rope as _rope
from kernels.reference.mxfp4 import MAX_SCALE, mxfp4_quantize
from kernels.reference.rope import YarnScaling, inverse_frequencies, pair_order, rope_table
from kernels.registry import Candidate, Op
from kernels.triton.register import register as _register_triton

__all__ = [
    "ALL_OPS",
    "MAX_SCALE",
    "ExpertWeights",
    "Op",
    "Ops",
    "PagedBatch",
    "Platform",
    "Prefill",
    "YarnScaling",
    "add_rms_norm",
    "copy_slots",
    "embedding",
    "explain",
    "gates_first",
    "gelu_tanh",
    "inverse_frequencies",
    "kv_write",
    "linear",
    "linear_add",
    "logits",
    "moe_add",
    "mxfp4_expand",
    "mxfp4_quantize",
    "paged_attention",
    "pair_order",
    "probe",
    "qkv_project",
    "rms_norm",
    "rope_table",
    "rotate_",
    "router_topk",
    "silu_mul",
    "swiglu",
]

rms_norm = Op(_basic.rms_norm, {"x": "float [T, H]", "weight": "float [H]?"})
add_rms_norm = Op(_basic.add_rms_norm, {"x": "float [T, H]", "residual": "float [T, H]", "weight": "float [H]?"})
linear = Op(_basic.linear, {"x": "float [T, N]", "weight": "float [M, N]", "bias": "float [M]?"})
linear_add = Op(
    _basic.linear_add,
    {"x": "float [T, N]", "weight": "float [M, N]", "bias": "float [M]", "residual": "float [T, M]"},
)
logits = Op(_basic.logits, {"x": "float [B, H]", "weight": "float [V, H]"})
embedding = Op(_basic.embedding, {"ids": "int64 [T]", "table": "float [V, H]"})
silu_mul = Op(_basic.silu_mul, {"gate_up": "float [T, N]"})
gelu_tanh = Op(_basic.gelu_tanh, {"x": "float [T, N]"})
rotate_ = Op(_rope.rotate_, {"x": "float [T, N, D]", "rotation": "complex64 [T, 1, D/2]"})
qkv_project = Op(
    _rope.qkv_project,
    {"x": "float [T, H]", "weight": "float [Q, H]", "bias": "float [Q]", "rotation": "complex64 [T, 1, _]"},
)
kv_write = Op(_attention.kv_write, {"cache": "float [S, 2, K, D]", "slots": "int64 [T]", "kv": "float [T, 2, K, D]"})
copy_slots = Op(_attention.copy_slots, {"cache": "float [S, 2, K, D]", "source": "int64 [N]", "target": "int64 [N]"})
paged_attention = Op(
    _attention.paged_attention, {"query": "float [T, H, D]", "cache": "float [S, 2, K, D]", "sinks": "float32 [H]"}
)
router_topk = Op(_moe.router_topk, {"x": "float [T, H]", "weight": "float [E, H]", "bias": "float [E]"})
swiglu = Op(_moe.swiglu, {"gate_up": "float [T, N]"})
moe_add = Op(
    _moe.moe_add,
    {"x": "float [T, H]", "router": "float [E, H]", "router_bias": "float [E]", "residual": "float [T, H]"},
)
mxfp4_expand = Op(_mxfp4.mxfp4_expand, {"blocks": "uint8 [E, R, B, 16]", "scales": "uint8 [E, R, B]"})

ALL_OPS: tuple[Op[..., Any], ...] = (
    rms_norm,
    add_rms_norm,
    linear,
    linear_add,
    logits,
    embedding,
    silu_mul,
    gelu_tanh,
    rotate_,
    qkv_project,
    kv_write,
    copy_slots,
    paged_attention,
    router_topk,
    swiglu,
    moe_add,
    mxfp4_expand,
)


_register_cpu({op.name: op for op in ALL_OPS})
_register_triton({op.name: op for op in ALL_OPS})


class Ops:
    """The functions chosen for one platform, with what they keep between calls (packed weights, buffers).

    Not for two threads at once. `checked()` gives the same functions behind their contracts.
    """

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.rms_norm = rms_norm.bind(platform)
        self.linear_add = linear_add.bind(platform)
        self.logits = logits.bind(platform)
        self.embedding = embedding.bind(platform)
        self.qkv_project = qkv_project.bind(platform)
        self.kv_write = kv_write.bind(platform)
        self.paged_attention = paged_attention.bind(platform)
        self.moe_add = moe_add.bind(platform)

    def checked(self) -> Ops:
        """Put the contracts in front: for shapes that have not passed them yet."""
        door = copy.copy(self)
        for op in ALL_OPS:
            function = getattr(self, op.name, None)
            if function is not None:
                setattr(door, op.name, op.behind_contract(function))
        return door


def explain(platform: Platform, op: str | None = None) -> list[Candidate]:
    """Say which spec of each op (or of one) runs on a platform, and why the others do not."""
    return [line for item in ALL_OPS if op in (None, item.name) for line in item.explain(platform)]
