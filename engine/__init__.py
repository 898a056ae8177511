"""The engine: serves one model. `from engine import LLM, SamplingParams` is its offline face.

Names are loaded when first used, so that importing `engine.config` stays cheap and free of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.core.sampling_params import SamplingParams
    from engine.llm import LLM, Completion, GenerationResult

__all__ = ["LLM", "Completion", "GenerationResult", "SamplingParams"]

_HOMES = {
    "LLM": "engine.llm",
    "Completion": "engine.llm",
    "GenerationResult": "engine.llm",
    "SamplingParams": "engine.core.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
