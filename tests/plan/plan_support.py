"""Shapes and hosts that the planning tests share."""

from __future__ import annotations

from dataclasses import replace

from engine.config import ModelConfig
from engine.placement import Device, HostSpec
from launcher.plan.known_models import known_model


def shape(name: str = "gpt-oss-20b") -> ModelConfig:
    model = known_model(f"openai/{name}")
    assert model is not None
    return model


def small(layers: int, kv_heads: int, group: int, units: int, experts: int, vocab: int = 1000) -> ModelConfig:
    """A shape with the given counts; layers alternate between sliding and full attention."""
    return replace(
        shape(),
        num_layers=layers,
        layer_windows=tuple(None if i % 2 else 128 for i in range(layers)),
        num_kv_heads=kv_heads,
        num_attention_heads=kv_heads * group,
        intermediate_size=units * 32,
        num_experts=experts,
        vocab_size=vocab,
    )


def gpu_hosts(*counts: int, cpus: int = 0) -> tuple[HostSpec, ...]:
    """Hosts n0, n1, … with that many GPUs each, and `cpus` CPU ranks."""
    return tuple(
        HostSpec(
            f"n{i}",
            (*(Device(f"cuda:{k}") for k in range(count)), *(Device(f"cpu:{k}", k, (4 * k,)) for k in range(cpus))),
        )
        for i, count in enumerate(counts)
    )
