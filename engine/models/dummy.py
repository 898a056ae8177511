"""Made-up gpt-oss weights: for `load_format: dummy`, and for tests and benchmarks that want a checkpoint on disk.

The bytes are those of `hlaunch synth` with the same seed (`engine.synthesis.values`): any order of loading gives the
same model, and so does a checkpoint that was written first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import ModelConfig, parse_model_config
from engine.models.gpt_oss_weights import expected_tensors
from engine.models.synthetic import synthetic_rule
from engine.synthesis import values


class DummySource:
    """Tensors of the true names, shapes and dtypes (bfloat16, MXFP4), with values of a plausible size."""

    def __init__(self, model: ModelConfig, seed: int = 0) -> None:
        self._expected = expected_tensors(model)
        self._seed = seed

    def get(self, name: str) -> Tensor:
        want = self._expected[name]
        dtype = torch.uint8 if want.dtypes == ("U8",) else torch.bfloat16
        num_bytes = math.prod(want.shape) * dtype.itemsize
        data = values.make(name, num_bytes, synthetic_rule(name, want.shape), self._seed)
        return torch.from_numpy(data).view(dtype).view(want.shape)


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
