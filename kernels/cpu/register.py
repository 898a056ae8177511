"""Which CPU specs exist, and when each is unfit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernels.cpu import attention, basic, moe, rope
from kernels.platform import Platform
from kernels.registry import Band, Op


def register(ops: dict[str, Op[..., Any]]) -> None:
    """Add the CPU specs to their ops, by name."""
    ops["rms_norm"].register("cpu_f32", Band.OPTIMIZED, basic.create_rms_norm, _needs())
    ops["rotate_"].register("cpu_complex", Band.OPTIMIZED, lambda _: rope.rotate_, _needs())
    packed = _needs("has_onednn_linear", "torch was built without oneDNN's packed linear")
    ops["linear"].register("cpu_packed", Band.OPTIMIZED, basic.create_linear, packed)
    ops["linear_add"].register("cpu_packed", Band.OPTIMIZED, basic.create_linear_add, packed)
    ops["logits"].register("cpu_packed", Band.OPTIMIZED, basic.create_logits, packed)
    ops["qkv_project"].register("cpu_packed", Band.OPTIMIZED, rope.create_qkv_project, packed)
    ops["moe_add"].register("cpu_packed", Band.SPECIALIZED, moe.create_moe_add, packed)
    fused = _needs("has_flash_attention", "torch has no fused attention for CPUs")
    ops["paged_attention"].register("cpu_flash", Band.OPTIMIZED, attention.create_paged_attention, fused)


def _needs(flag: str = "", reason: str = "") -> Callable[[Platform], str | None]:
    def unfit(platform: Platform) -> str | None:
        if platform.device != "cpu":
            return f"for CPUs, not {platform.device}"
        if platform.dtype != torch.float32:
            return f"float32 only, not {str(platform.dtype).removeprefix('torch.')}"
        return reason if flag and not getattr(platform, flag) else None

    return unfit
