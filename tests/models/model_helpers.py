"""Small gpt-oss configurations, and transformers' model with the same weights as oracle."""

from __future__ import annotations

from typing import Any

import torch

from engine.config import ModelConfig, parse_model_config
from engine.models.checkpoint import TensorSource
from engine.models.gpt_oss_weights import expected_tensors
from kernels.ops import mxfp4_expand


def small_config(**changes: Any) -> dict[str, Any]:
    """A config.json of gpt-oss in small; `rope_scaling=None` turns YaRN off."""
    config: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size": 331,
        "max_position_embeddings": 1024,
        "initial_context_length": 128,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 128,
            "truncate": False,
        },
        "rms_norm_eps": 1e-5,
        "swiglu_limit": 7.0,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "eos_token_id": 1,
        "pad_token_id": 0,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    }
    config.update(changes)
    if config["layer_types"] is not None and len(config["layer_types"]) != config["num_hidden_layers"]:
        kinds = ["sliding_attention", "full_attention"]
        config["layer_types"] = [kinds[i % 2] for i in range(config["num_hidden_layers"])]
    return {key: value for key, value in config.items() if value is not None}


def transformers_state(source: TensorSource, model: ModelConfig) -> dict[str, torch.Tensor]:
    """The tensors under transformers' names: experts expanded and transposed, float32."""
    state: dict[str, torch.Tensor] = {}
    for name in expected_tensors(model):
        if name.endswith("_scales"):
            continue
        if name.endswith("_blocks"):
            base = name.removesuffix("_blocks")
            expanded = mxfp4_expand(source.get(name), source.get(base + "_scales"), torch.float32)
            state[base] = expanded.transpose(1, 2).contiguous()
        else:
            state[name] = source.get(name).float()
    return state


def transformers_model(config: dict[str, Any], source: TensorSource, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' GptOssForCausalLM with these weights, eager attention and eager experts."""
    from transformers import GptOssConfig, GptOssForCausalLM

    fields = {key: value for key, value in config.items() if key not in ("quantization_config", "architectures")}
    if "rope_scaling" not in fields:
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields["rope_theta"]}
    hf_config = GptOssConfig(**fields, attn_implementation="eager", experts_implementation="eager")
    hf_config.eos_token_id = None
    oracle = GptOssForCausalLM(hf_config)
    oracle.load_state_dict(transformers_state(source, parse_model_config(config)))
    return oracle.to(dtype).eval()
