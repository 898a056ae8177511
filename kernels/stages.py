"""Which kernel serves each stage of gpt-oss on a Hopper GPU, by the number of tokens of a step: the table to read.

Knows: the stages, their float32 twins, the bands, and why each band has its kernels. Refuses to know: how to run them
(`kernels.gpu` is the door). Needs neither Triton nor a GPU, so that any machine can explain another.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.cuda.decode import BATCH_SIZES
from kernels.cuda.layers import FASTEST_ROWS

LARGEST_SMALL = BATCH_SIZES[-1]
PREFILL_TOKENS_PER_EXPERT = 512  # as kernels.triton.router.choose_block_t


@dataclass(frozen=True, slots=True)
class Band:
    """Steps of `low` to `high` tokens (None: any more); `why` these kernels serve them and not those beside."""

    name: str
    low: int
    high: int | None
    why: str


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: its twin as a dotted path, and for each band the kernel's name and language."""

    name: str
    twin: str
    kernels: tuple[tuple[str, str], ...]


BANDS = (
    Band(
        "one launch", 1, FASTEST_ROWS,
        "all layers in one persistent kernel: six launches a layer leave the memory idle 4 to 7 us at each edge",
    ),
    Band(
        "small", FASTEST_ROWS + 1, LARGEST_SMALL,
        "six launches a layer, each starting before the last has ended; every touched expert is read once",
    ),
    Band(
        "decode", LARGEST_SMALL + 1, 256,
        "experts with several rows each: token tiles for the tensor cores; projections by cuBLAS",
    ),
    Band(
        "prefill", 257, None,
        f"compute-bound; from {PREFILL_TOKENS_PER_EXPERT} tokens an expert on, tiles of 256 tokens (moe_prefill)",
    ),
)  # fmt: skip

# What a profiler calls the kernels: Triton's names are those of its functions, cuBLAS's start as its families do.
_DEVICE_NAMES = (
    (("nvjet", "cublas", "cutlass", "sm80_xmma", "sm90_xmma", "gemv", "gemmSN", "splitKreduce"), "cuBLAS"),
    (("_decode_kernel",), "paged_decode_attention"),
    (("_expert_kernel",), "moe_decode"),
    (("_norm_kernel",), "rms_norm"),
    (("_rope_kernel",), "rope_kv_write"),
    (("_slots_kernel",), "decode_slots"),
    (("_router_kernel",), "router_topk"),
    (("_index_kernel", "_sort_kernel"), "expert_index"),
    (("_partial_kernel", "_final_kernel", "_adjust_kernel"), "sample"),
    (("_threshold_kernel",), "sampling_thresholds"),
    (("Memcpy", "Memset", "memcpy"), "copies"),
    (("at::native", "cub::"), "torch"),
)


def stage_of(device_name: str) -> str:
    """Name the stage that a kernel of a decode step computes, from its name on the device; ours keep theirs."""
    for parts, stage in _DEVICE_NAMES:
        if any(part in device_name for part in parts):
            return stage
    return device_name


_CUDA, _TRITON, _GLUON, _CUBLAS, _TORCH = "CUDA C++", "Triton", "Gluon", "cuBLAS", "torch"
_LAYERS = ("decode_layers", _CUDA)
_DECODE = "kernels.reference.decode"


def _stage(name: str, twin: str, *kernels: tuple[str, str]) -> Stage:
    return Stage(name, twin, kernels)


STAGES = (
    _stage("embedding", "kernels.reference.basic.embedding",
           ("embed", _CUDA), ("embed", _CUDA), ("index_select", _TORCH), ("index_select", _TORCH)),
    _stage("norm and qkv", f"{_DECODE}.norm_qkv_rope",
           _LAYERS, ("norm_qkv_rope", _CUDA), ("linear", _CUBLAS), ("linear", _CUBLAS)),
    _stage("rope, cache write", f"{_DECODE}.norm_qkv_rope",
           _LAYERS, ("norm_qkv_rope", _CUDA), ("rope_kv_write", _TRITON), ("rope_kv_write", _TRITON)),
    _stage("attention", f"{_DECODE}.paged_decode_attention",
           _LAYERS, ("paged_decode_attention", _CUDA), ("paged_decode_attention", _TRITON),
           ("paged_prefill_attention", _TRITON)),
    _stage("output projection", f"{_DECODE}.out_proj_add",
           _LAYERS, ("out_proj_add", _CUDA), ("linear", _CUBLAS), ("linear", _CUBLAS)),
    _stage("residual and norm", "kernels.reference.basic.rms_norm",
           _LAYERS, ("out_proj_add", _CUDA), ("add_rms_norm", _TRITON), ("add_rms_norm", _TRITON)),
    _stage("router", f"{_DECODE}.norm_router_topk",
           _LAYERS, ("norm_router_topk", _CUDA), ("router_topk", _TRITON), ("router_topk", _TRITON)),
    _stage("experts", f"{_DECODE}.moe_gate_up",
           _LAYERS, ("moe_gate_up, moe_down_add", _CUDA), ("moe_decode", _GLUON), ("moe_decode, moe_prefill", _GLUON)),
    _stage("logits", f"{_DECODE}.norm_logits",
           ("norm_logits", _CUDA), ("norm_logits", _CUDA), ("widening_linear", _CUBLAS), ("widening_linear", _CUBLAS)),
    _stage("sampling", "kernels.triton.reference_sampling.sample",
           ("sample_advance", _CUDA), ("sample_advance", _CUDA), ("sample", _TRITON), ("sample", _TRITON)),
    _stage("top-k, top-p, min-p", "kernels.triton.reference_sampling.sampling_thresholds",
           *((("sampling_thresholds", _TRITON),) * len(BANDS))),
)  # fmt: skip
