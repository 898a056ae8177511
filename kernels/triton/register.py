"""Which ops of the registry Triton serves. Imports Triton only when one is bound."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from kernels.platform import Platform
from kernels.registry import Band, Op


def register(ops: dict[str, Op[..., Any]]) -> None:
    """Add the Triton specs to their ops, by name."""
    for name in ("silu_mul", "gelu_tanh"):
        ops[name].register("triton", Band.OPTIMIZED, _from("kernels.triton.activation", name), _unfit)
    ops["copy_slots"].register("triton", Band.OPTIMIZED, _from("kernels.triton.cache", "copy_slots"), _unfit)


def _from(module: str, name: str) -> Callable[[Platform], Callable[..., Any]]:
    def create(_: Platform) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function

    return create


def _unfit(platform: Platform) -> str | None:
    if platform.device != "cuda":
        return f"for CUDA devices, not {platform.device}"
    return None if importlib.util.find_spec("triton") else "Triton is not installed"
