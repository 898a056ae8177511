"""Made-up gpt-oss weights: for `load_format: dummy`, and for tests and benchmarks that want a checkpoint on disk.

Each tensor is drawn from a generator keyed by (seed, tensor name): any order of loading gives the same model.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import ModelConfig, parse_model_config
from engine.models.gpt_oss_weights import expected_tensors


class DummySource:
    """Tensors of the true names, shapes and dtypes (bfloat16, MXFP4), with values of a plausible size."""

    def __init__(self, model: ModelConfig, seed: int = 0) -> None:
        self._expected = expected_tensors(model)
        self._seed = seed

    def get(self, name: str) -> Tensor:
        want = self._expected[name]
        # One number of 32 bits: torch's CPU generator looks at no more of its seed.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        if name.endswith("_blocks"):
            return torch.randint(0, 256, want.shape, dtype=torch.uint8, generator=generator)
        if name.endswith("_scales"):
            # Nibbles have a mean square of about 8.4: bring a dot product over the columns to about one.
            exponent = 127 - round(math.log2(math.sqrt(8.4 * 32 * want.shape[-1])))
            return torch.randint(exponent - 1, exponent + 2, want.shape, dtype=torch.uint8, generator=generator)
        values = torch.randn(want.shape, generator=generator)
        if name.endswith("norm.weight"):
            values = 1.0 + 0.1 * values
        elif name.endswith("embed_tokens.weight"):
            pass
        elif name.endswith(("bias", "sinks")):
            values *= 0.5
        elif name.endswith(("gate_up_proj", "down_proj")):
            values *= want.shape[-2] ** -0.5
        else:
            values *= want.shape[-1] ** -0.5
        return values.to(torch.bfloat16)


def write_checkpoint(folder: Path, config: Mapping[str, Any], seed: int = 0, *, num_shards: int = 1) -> ModelConfig:
    """Write a made-up checkpoint in Hugging Face layout: config.json and safetensors, with an index when sharded."""
    from safetensors.torch import save_file

    model = parse_model_config(dict(config))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
    source = DummySource(model, seed)
    names = list(expected_tensors(model))
    if num_shards == 1:
        save_file({name: source.get(name) for name in names}, folder / "model.safetensors", {"format": "pt"})
        return model
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        chosen = names[shard::num_shards]
        save_file({name: source.get(name) for name in chosen}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return model
