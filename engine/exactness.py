"""Whether float16 holds a model's weights, told from a few of their values: it decides what a CPU holds beside them.

Knows: safetensors headers, bfloat16 as integers, how made-up weights are spread. Refuses to know: numpy, torch; the
rule itself is `kernels.cpu.packing.half_is_exact`.

A bfloat16 value below 2^-17 lies between two of float16's, by 2^-25 at most. Products bear an error of 2^-22 of the
largest weight, so a matrix whose largest weight is 2^-3 or more is exact for them, and one below is not: among
thousands of weights some are small.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from array import array
from pathlib import Path

from engine.config import EngineConfig, ModelConfig
from engine.cpu_memory import HalfExact

LEAST_MAXIMUM = 2.0**-3
# 2^-3 as the upper half of a float32; positive bfloat16 values have the order of their bits.
_LEAST_BITS = 0x3E00
_SAMPLES, _SAMPLE_BYTES = 8, 32 << 10
_MAX_HEADER_BYTES = 64 << 20
# Largest of 65,536 equally likely quantiles of a normal distribution, in standard deviations.
_LARGEST_QUANTILE = 4.17
_RESIDUAL_DAMPING = 4

_NAMES = {
    "qkv": ("model.layers.0.self_attn.q_proj.weight", "block.0.attn.qkv.weight"),
    "out": ("model.layers.0.self_attn.o_proj.weight", "block.0.attn.out.weight"),
    "head": ("lm_head.weight", "unembedding.weight", "model.embed_tokens.weight", "embedding.weight"),
    "experts": ("model.layers.0.mlp.experts.gate_up_proj",),
}


def half_exact_of(config: EngineConfig, model: ModelConfig, folder: Path | None) -> HalfExact:
    """Tell which weights float16 holds: by the rule of made-up ones, else by the files; none where there are none."""
    if config.load_format == "dummy":
        return half_exact_of_dummies(model)
    return HalfExact() if folder is None else half_exact_of_files(folder)


def half_exact_of_files(folder: Path) -> HalfExact:
    """Look at the first layer of a checkpoint. What cannot be read counts as not exact: that is the larger figure."""
    found: dict[str, bool] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, _MAX_HEADER_BYTES)))
                for kind, names in _NAMES.items():
                    name = next((name for name in names if name in header), None)
                    # The embedding stands in for an lm_head that is tied to it, never for one in another file.
                    if name is None or (kind in found and names.index(name) > 1):
                        continue
                    begin, end = header[name]["data_offsets"]
                    dtype = header[name]["dtype"]
                    found[kind] = dtype == "F16" or (
                        dtype == "BF16" and _has_large(file.fileno(), 8 + length + begin, 8 + length + end)
                    )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError):
            continue
    return HalfExact(**found)


def _has_large(descriptor: int, begin: int, end: int) -> bool:
    """Whether any of a few thousand bfloat16 values in bytes [begin, end) of a file reaches 2^-3."""
    step = max(_SAMPLE_BYTES, (end - begin) // _SAMPLES) & ~1
    for at in range(begin, end, step):
        data = os.pread(descriptor, min(_SAMPLE_BYTES, end - at) & ~1, at)
        values = array("H", data)
        if sys.byteorder == "big":
            values.byteswap()
        if any(value & 0x7FFF >= _LEAST_BITS for value in values):
            return True
    return False


def half_exact_of_dummies(model: ModelConfig) -> HalfExact:
    """Tell it for made-up weights: products bring unit size to unit size, and what adds to the stream is damped."""

    def is_exact(columns: int, damping: int = 1) -> bool:
        largest: float = _LARGEST_QUANTILE * columns**-0.5 / damping
        return largest >= LEAST_MAXIMUM

    hidden = model.hidden_size
    query = model.num_attention_heads * model.head_dim
    return HalfExact(
        qkv=is_exact(hidden),
        out=is_exact(query, _RESIDUAL_DAMPING),
        head=True if model.tie_word_embeddings else is_exact(hidden),
        experts=is_exact(hidden),
    )
