"""Write a trained model as a Hugging Face folder, and read one back for more training.

Knows: gpt-oss tensor names, dtypes and file names.
Refuses to know: how the weights were trained.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tools.tiny_oss.model import TinyOss
from tools.tiny_oss.mxfp4 import expand, quantize

QUANTIZED = ("gate_up_proj", "down_proj")


def checkpoint_tensors(model: TinyOss) -> dict[str, torch.Tensor]:
    """Return the checkpoint: experts as MXFP4 blocks and scales, everything else bf16."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().cpu()
        if name.rsplit(".", 1)[-1] in QUANTIZED:
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = quantize(value)
        else:
            tensors[name] = value.to(torch.bfloat16).contiguous()
    return tensors


def export(model: TinyOss, control_ids: dict[str, int], folder: Path) -> int:
    """Write config.json, generation_config.json and model.safetensors; return the bytes of weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_hf(control_ids)
    generation = {
        "bos_token_id": control_ids["<|startoftext|>"],
        "do_sample": True,
        "eos_token_id": [control_ids[name] for name in ("<|return|>", "<|endoftext|>", "<|call|>")],
        "pad_token_id": control_ids["<|endoftext|>"],
        "transformers_version": config["transformers_version"],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    path = folder / "model.safetensors"
    save_file(checkpoint_tensors(model), str(path), metadata={"format": "pt"})
    return path.stat().st_size


def save_checkpoint(model: TinyOss, path: Path) -> None:
    """Write the training weights as they are, in float32."""
    save_file({name: value.detach().cpu().contiguous() for name, value in model.named_parameters()}, str(path))


def load_weights(model: TinyOss, path: Path) -> None:
    """Load an exported model.safetensors, or a training checkpoint, into the training model."""
    stored = load_file(str(path))
    state: dict[str, torch.Tensor] = {}
    for name, value in stored.items():
        if name.endswith("_blocks"):
            base = name.removesuffix("_blocks")
            state[base] = expand(value, stored[f"{base}_scales"])
        elif not name.endswith("_scales"):
            state[name] = value.float()
    model.load_state_dict(state)
