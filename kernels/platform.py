"""What a kernel may ask about the machine: device kind, dtype, which optional backends torch was built with."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class Platform:
    """Where ops will run. `has_onednn_linear`: torch can run a linear on weights packed by oneDNN.

    `has_flash_attention`: torch has its fused CPU attention that also returns the log-sum-exp.
    """

    device: Literal["cpu", "cuda"]
    dtype: torch.dtype
    has_onednn_linear: bool = False
    has_flash_attention: bool = False

    def __str__(self) -> str:
        return f"{self.device}/{str(self.dtype).removeprefix('torch.')}"


def probe(device: Literal["cpu", "cuda"], dtype: torch.dtype) -> Platform:
    """Describe this machine for one device kind and dtype."""
    if device != "cpu":
        return Platform(device, dtype)
    return Platform(device, dtype, _onednn_linear_works(), _flash_attention_works())


@cache
def _onednn_linear_works() -> bool:
    """Try the packed linear once: the ops are internal to torch, so their presence is probed, never assumed."""
    try:
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.eye(16), 4)
        out = torch.ops.mkldnn._linear_pointwise(torch.ones(4, 16), weight, None, "none", [], "")
        return bool(torch.equal(out, torch.ones(4, 16)))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


@cache
def _flash_attention_works() -> bool:
    """Try torch's fused CPU attention once, in the form that the CPU spec uses."""
    try:
        query, mask = torch.ones(1, 2, 3, 8), torch.zeros(1, 1, 1, 4)
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8), 0.0, False, attn_mask=mask, scale=0.0
        )
        expected = torch.full((1, 2, 3), 4.0).log()
        return bool(torch.allclose(out, query) and torch.allclose(log_sum, expected))
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False


@cache
def fbgemm_serial_works() -> bool:
    """Try FBGEMM's float16 product in its older form once: a plain function, which torch means to remove."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            packed = torch.fbgemm_pack_gemm_matrix_fp16(torch.eye(16))
            x = torch.full((3, 16), 1.0 + 2**-20)
            with_bias = torch.fbgemm_linear_fp16_weight_fp32_activation(x, packed, torch.ones(16))
            without = torch.fbgemm_linear_fp16_weight_fp32_activation(x, packed, None)
        return bool(torch.equal(with_bias, x + 1) and torch.equal(without, x))
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False


@cache
def fbgemm_half_works() -> bool:
    """Try FBGEMM's product of float32 activations with float16 weights once."""
    try:
        packed = torch.ops.quantized.linear_prepack_fp16(torch.eye(16), torch.ones(16))
        out = torch.ops.quantized.linear_dynamic_fp16(torch.full((3, 16), 1.0 + 2**-20), packed)
        return bool(torch.equal(out, torch.full((3, 16), 2.0 + 2**-20)))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
