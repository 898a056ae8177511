"""`config.json` of models that people plan for before they have the files: numbers only.

Source: the `config.json` files of openai/gpt-oss-20b and openai/gpt-oss-120b on Hugging Face (Apache-2.0).
Refuses to know: anything more of a model whose files are on disk; those are read instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.config import ConfigError, ModelConfig, load_model_config, parse_model_config
from launcher.errors import PreflightError
from launcher.plan.weights import find_model_files
from launcher.registry.types import ResolvedEntry


def _gpt_oss(num_layers: int, num_experts: int) -> dict[str, Any]:
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "eos_token_id": 200002,
        "head_dim": 64,
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * (num_layers // 2),
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": 8,
        "num_local_experts": num_experts,
        "pad_token_id": 199999,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    }


KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "openai/gpt-oss-20b": _gpt_oss(num_layers=24, num_experts=32),
    "openai/gpt-oss-120b": _gpt_oss(num_layers=36, num_experts=128),
}


def known_model(model: str) -> ModelConfig | None:
    """Return the shape of a known Hugging Face id, or None."""
    config = KNOWN_CONFIGS.get(model)
    return None if config is None else parse_model_config(config, f"{model} (built-in table)")


def shape_of(entry: ResolvedEntry, environ: Mapping[str, str]) -> ModelConfig:
    """Return the shape of an entry's model: of its files if they are here, else as known.

    Raises: PreflightError when the files cannot be read, or when nothing tells.
    """
    files = find_model_files(entry.model, entry.text_or_none("revision"), environ, entry.registry.parent)
    if files.folder is None:
        known = known_model(entry.model)
        if known is None:
            raise files.absent()
        return known
    try:
        return load_model_config(files.folder)
    except ConfigError as error:
        raise PreflightError(str(error), hint=error.hint) from error
