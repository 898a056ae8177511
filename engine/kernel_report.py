"""`python -m engine.kernel_report`: which kernel serves each op, and why not the others, as one JSON line.

    in   {"device": "cpu" | "cuda", "dtype": "float32" | "bfloat16", "model": config.json or null, "op": name or null}
    out  {"event": "kernels", "platform", "probes", "ops": [{"op", "meaning", "shape", "candidates": [...]}]}; or error;
         for cuda also "bands" and "stages": the fused kernels that gpt-oss runs there, by the tokens of a step

Needs torch, which the launcher never loads. Knows: `kernels.registry`, and which sizes a model gives an op's symbols.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

import torch

from engine.config import ConfigError, ModelConfig, parse_model_config
from kernels.contract import KernelError
from kernels.ops import ALL_OPS, Op, Platform, probe
from kernels.stages import BANDS, STAGES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def kernel_report(platform: Platform, model: ModelConfig | None = None, op: str | None = None) -> dict[str, Any]:
    """Explain the choice of every op (or of one) on a platform; with a model, the sizes that it calls them with.

    Raises: KeyError naming the ops when `op` is none of them.
    """
    chosen = [item for item in ALL_OPS if op in (None, item.name)]
    if not chosen:
        raise KeyError(f"no such op: {op}; ops: {', '.join(item.name for item in ALL_OPS)}")
    return {
        "platform": str(platform),
        "probes": {
            item.name: getattr(platform, item.name) for item in fields(platform) if item.name.startswith("has_")
        },
        "ops": [
            {
                "op": item.name,
                "meaning": (item.__doc__ or "").strip().partition("\n")[0],
                "shape": None if model is None else shape_of(item, model),
                "candidates": [
                    {"kernel": line.name, "band": line.band.name, "selected": line.is_selected, "reason": line.reason}
                    for line in item.explain(platform)
                ],
            }
            for item in chosen
        ],
    }


def stage_report() -> dict[str, Any]:
    """Explain gpt-oss's fused stages on a GPU: bands of tokens with their reasons, and each stage's kernel in each."""
    return {
        "bands": [{"name": band.name, "low": band.low, "high": band.high, "why": band.why} for band in BANDS],
        "stages": [
            {
                "stage": stage.name,
                "twin": stage.twin,
                "kernels": [{"kernel": name, "language": language} for name, language in stage.kernels],
            }
            for stage in STAGES
        ],
    }


def shape_of(op: Op[..., Any], model: ModelConfig) -> dict[str, str]:
    """Write an op's tensors with a model's sizes where its contract names them; T and B stay letters."""
    sizes = _sizes(op.name, model)
    written = {}
    for name, contract in op.contract.tensors.items():
        dims = [str(sizes.get(dim, dim)) for dim in contract.dims]
        written[name] = f"[{', '.join(dims)}]"
    return written


def _sizes(op: str, model: ModelConfig) -> Mapping[str, int]:
    """What the letters of a contract stand for in this model; one letter may mean different things in two ops."""
    query, key = model.num_attention_heads * model.head_dim, model.num_kv_heads * model.head_dim
    sizes = {
        "H": model.hidden_size,
        "V": model.vocab_size,
        "E": model.num_experts,
        "K": model.num_kv_heads,
        "D": model.head_dim,
    }
    own: dict[str, dict[str, int]] = {
        "qkv_project": {"Q": query + 2 * key},
        "linear_add": {"N": query, "M": model.hidden_size},
        "paged_attention": {"H": model.num_attention_heads},
        "swiglu": {"N": 2 * model.intermediate_size},
    }
    return sizes | own.get(op, {})


def main() -> int:
    request = json.load(sys.stdin)
    try:
        model = None if request.get("model") is None else parse_model_config(request["model"])
        device = cast(Any, request["device"])
        report = kernel_report(probe(device, DTYPES[request["dtype"]]), model, request.get("op"))
    except (KernelError, ConfigError, KeyError) as error:
        message = str(error.args[0] if isinstance(error, KeyError) else error)
        print(json.dumps({"event": "error", "kind": type(error).__name__, "message": message, "hint": ""}))
        return 1
    if device == "cuda":
        report |= stage_report()
    print(json.dumps({"event": "kernels", **report}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
