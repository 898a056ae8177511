"""The door to the GPU's fused kernels, beside `kernels.ops`: whole stages of gpt-oss, each with a float32 twin.

Small batches run on CUDA C++ (`kernels.cuda`), everything else on Triton (`kernels.triton`). Importing this needs
Triton, hence a build of torch for CUDA; compiling needs no GPU, running does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.build import KernelBuildError
from kernels.cuda.all_reduce import AllReduce, all_reduce_bytes
from kernels.cuda.decode import (
    BATCH_SIZES,
    LARGEST_SCALE,
    DecodeKernels,
    DecodeShape,
    DecodeState,
    LayerWeights,
    prebuild,
)
from kernels.cuda.exchange import Exchange, mail_bytes
from kernels.cuda.layers import LayerCall, LayerPlan
from kernels.cuda.peers import PeerMemory, can_reach
from kernels.cuda.tokens import TokenExchange
from kernels.triton.attention_decode import DecodeWorkspace, paged_decode_attention
from kernels.triton.attention_prefill import paged_prefill_attention
from kernels.triton.moe import run_experts
from kernels.triton.moe_gluon import prepare_scales
from kernels.triton.norm import add_rms_norm, rms_norm
from kernels.triton.permute import expert_width
from kernels.triton.rope import decode_slots, rope_kv_write
from kernels.triton.router import expert_index, router_topk
from kernels.triton.sampling import SampleWorkspace, sample, sampling_thresholds
from kernels.triton.slots import sum_slots
from kernels.triton.warm import compile_all, use_cache

__all__ = [
    "AllReduce",
    "BATCH_SIZES",
    "LARGEST_SCALE",
    "DecodeKernels",
    "DecodeShape",
    "DecodeState",
    "DecodeWorkspace",
    "Exchange",
    "KernelBuildError",
    "LayerCall",
    "LayerPlan",
    "LayerWeights",
    "PeerMemory",
    "SampleWorkspace",
    "TokenExchange",
    "add_rms_norm",
    "all_reduce_bytes",
    "can_reach",
    "compile_all",
    "decode_slots",
    "expert_index",
    "expert_width",
    "mail_bytes",
    "paged_decode_attention",
    "paged_prefill_attention",
    "prebuild",
    "prepare_scales",
    "rms_norm",
    "rope_kv_write",
    "router_topk",
    "run_experts",
    "sample",
    "sampling_thresholds",
    "sum_slots",
    "use_cache",
    "widening_linear",
]


def widening_linear(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply bf16 x [T, K] by weight [N, K] transposed, keeping the sums: float32 [T, N]."""
    if out is None:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
