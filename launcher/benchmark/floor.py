"""The least time that physics allows: bytes over bandwidth, or arithmetic over its peak, whichever is longer.

Knows: which bytes a decode step of a mixture of experts must read, what a prefill must compute, bandwidths of GPUs.
Refuses to know: any engine, any measurement. Pure.

Bytes of a decode step of n sequences at context L (checkpoint bytes; activations and KV writes are left out):

    attention, router, norms    all layers, once
    experts                     distinct experts per layer x bytes of one, E * (1 - (1 - k / E)^n) of them under uniform
                                routing, the worst case; or as many as the engine counted
    lm_head                     once; of the embedding only n rows, left out
    keys and values             2 K D values per token and layer; a sliding layer holds at most its window
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from engine.config import MXFP4_BLOCK, ModelConfig

BF16_BYTES = 2


@dataclass(frozen=True, slots=True)
class Device:
    """Limits of one device. Units: bytes per second, FLOP per second (bfloat16, dense, of an 8192³ product).

    `spec` is the maker's figure; `copy` what a device-to-device copy reached, read and write counted.
    """

    name: str
    spec: float | None
    copy: float | None
    flops: float | None

    def bandwidth(self, basis: Literal["spec", "copy"]) -> float | None:
        return self.spec if basis == "spec" else self.copy

    def times(self, count: int) -> Device:
        """So many of it, over which a model is split evenly."""
        if count == 1:
            return self
        spec, copy, flops = (None if limit is None else count * limit for limit in (self.spec, self.copy, self.flops))
        return Device(f"{count} x {self.name}", spec, copy, flops)


# Matched by the first key that the device's own name contains. Copy and peak: measured on H100 SXM and H200.
DEVICES: dict[str, Device] = {
    "H200": Device("H200", 4.8e12, 4.3e12, 798e12),
    "H100 80GB HBM3": Device("H100 SXM", 3.35e12, 3.0e12, 798e12),
    "H100 NVL": Device("H100 NVL", 3.9e12, None, None),
    "H100 PCIe": Device("H100 PCIe", 2.04e12, None, None),
    "A100-SXM4-80GB": Device("A100 SXM 80GB", 2.039e12, None, 312e12),
    "A100-SXM4-40GB": Device("A100 SXM 40GB", 1.555e12, None, 312e12),
    "L40S": Device("L40S", 0.864e12, None, 362e12),
    "A10": Device("A10", 0.6e12, None, 125e12),
    "RTX 4090": Device("RTX 4090", 1.008e12, None, 165e12),
    "RTX 3090": Device("RTX 3090", 0.936e12, None, 71e12),
}


def find_device(name: str) -> Device | None:
    """Find the limits of a device by the name that its driver gives it."""
    return next((device for key, device in DEVICES.items() if key in name), None)


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What one decode step must read, in bytes. `distinct_experts` is per layer."""

    attention_and_router: int
    experts: float
    lm_head: int
    kv: int
    distinct_experts: float

    @property
    def weights(self) -> float:
        return self.attention_and_router + self.experts + self.lm_head

    @property
    def total(self) -> float:
        return self.weights + self.kv


def distinct_experts(num_experts: int, per_token: int, num_tokens: int) -> float:
    """Give the mean number of experts that `num_tokens` independent tokens touch under uniform routing."""
    return num_experts * (1 - (1 - per_token / num_experts) ** num_tokens)


def expert_bytes(model: ModelConfig) -> int:
    """Give the bytes of one expert: three matrices, MXFP4 or bfloat16, and their biases."""
    values = 3 * model.intermediate_size * model.hidden_size
    biases = (2 * model.intermediate_size + model.hidden_size) * BF16_BYTES
    if model.quantization == "mxfp4":
        return values * 17 // MXFP4_BLOCK + biases
    return values * BF16_BYTES + biases


def attention_bytes(model: ModelConfig) -> int:
    """Give the bytes of one layer outside its experts: q, k, v, o, router, norms, sinks."""
    query, key = model.num_attention_heads * model.head_dim, model.num_kv_heads * model.head_dim
    values = (model.hidden_size + 1) * (query + 2 * key) + (query + 1) * model.hidden_size
    values += model.num_experts * (model.hidden_size + 1) + 2 * model.hidden_size + model.num_attention_heads
    return values * BF16_BYTES


def kv_bytes(model: ModelConfig, context: int, value_bytes: int = BF16_BYTES) -> int:
    """Give the bytes of keys and values that one sequence reads at `context` tokens, over all layers."""
    per_token = 2 * model.num_kv_heads * model.head_dim * value_bytes
    return sum(per_token * min(context, window or context) for window in model.layer_windows)


def step_bytes(model: ModelConfig, num_seqs: int, context: int, experts: float | None = None) -> StepBytes:
    """Count the bytes of one decode step; `experts` replaces uniform routing's distinct experts per layer."""
    if experts is None:
        experts = distinct_experts(model.num_experts, model.num_experts_per_token, num_seqs)
    return StepBytes(
        attention_and_router=model.num_layers * attention_bytes(model),
        experts=model.num_layers * experts * expert_bytes(model),
        lm_head=model.vocab_size * model.hidden_size * BF16_BYTES,
        kv=num_seqs * kv_bytes(model, context),
        distinct_experts=experts,
    )


def token_flops(model: ModelConfig) -> float:
    """Give the FLOP of one token outside attention's scores and lm_head: projections, router, chosen experts."""
    query, key = model.num_attention_heads * model.head_dim, model.num_kv_heads * model.head_dim
    projections = model.hidden_size * (2 * query + 2 * key)
    experts = model.num_experts_per_token * 3 * model.hidden_size * model.intermediate_size
    return 2.0 * model.num_layers * (projections + experts)


def decode_flops(model: ModelConfig, num_seqs: int, context: int) -> float:
    """Give the FLOP of one decode step."""
    scores = 4 * model.num_attention_heads * model.head_dim
    attended = sum(min(context, window or context) for window in model.layer_windows)
    return num_seqs * (token_flops(model) + scores * attended + 2.0 * model.vocab_size * model.hidden_size)


def prefill_flops(model: ModelConfig, num_seqs: int, length: int) -> float:
    """Give the FLOP of prompts of `length` tokens: causal attention, lm_head on the last token of each."""
    scores = 4 * model.num_attention_heads * model.head_dim
    # A full layer sees half of the prompt on average; a sliding one its window, but for the first tokens.
    attended = sum(length / 2 if window is None else min(window, length / 2) for window in model.layer_windows)
    return num_seqs * (length * (token_flops(model) + scores * attended) + 2.0 * model.vocab_size * model.hidden_size)


def decode_floor_seconds(
    model: ModelConfig,
    num_seqs: int,
    context: int,
    bandwidth: float,
    flops: float | None = None,
    experts: float | None = None,
) -> float:
    """Give the least time of one decode step; `bandwidth` in bytes/s, `flops` in FLOP/s where known."""
    memory = step_bytes(model, num_seqs, context, experts).total / bandwidth
    compute = decode_flops(model, num_seqs, context) / flops if flops else 0.0
    return max(memory, compute)


def prefill_floor_seconds(
    model: ModelConfig, num_seqs: int, length: int, bandwidth: float, flops: float | None = None
) -> float:
    """Give the least time of prompts: their arithmetic, or one read of all weights that they touch."""
    memory = step_bytes(model, num_seqs * length, 0).weights / bandwidth
    compute = prefill_flops(model, num_seqs, length) / flops if flops else 0.0
    return max(memory, compute)


def decode_report(
    model: ModelConfig,
    num_seqs: int,
    context: int,
    tokens_per_second: float,
    device: Device,
    experts: float | None = None,
) -> dict[str, Any]:
    """Hold a measured decode rate against the floors of a device, for a JSON document.

    `fraction_spec` and `fraction_copy` are None where the device's figure is unknown. `experts` is what the engine
    counted; uniform routing stands in for it, and `experts_counted` says which.
    """
    bytes_read = step_bytes(model, num_seqs, context, experts)
    report: dict[str, Any] = {
        "context": context,
        "bytes": {key: round(value, 2) for key, value in asdict(bytes_read).items()},
        "experts_counted": experts is not None,
    }
    for basis in _BASES:
        bandwidth = device.bandwidth(basis)
        seconds = (
            None
            if bandwidth is None
            else decode_floor_seconds(model, num_seqs, context, bandwidth, device.flops, experts)
        )
        report[f"floor_ms_{basis}"] = None if seconds is None else round(1e3 * seconds, 4)
        report[f"floor_tokens_per_second_{basis}"] = None if seconds is None else round(num_seqs / seconds, 1)
        report[f"fraction_{basis}"] = None if seconds is None else round(tokens_per_second * seconds / num_seqs, 4)
    return report


def prefill_report(
    model: ModelConfig, num_seqs: int, length: int, tokens_per_second: float, device: Device
) -> dict[str, Any]:
    """Hold a measured prefill rate against the floor; None where the device's figures are unknown."""
    bandwidth = device.spec or device.copy
    if bandwidth is None or device.flops is None:
        return {"floor_tokens_per_second": None, "fraction": None}
    seconds = prefill_floor_seconds(model, num_seqs, length, bandwidth, device.flops)
    floor = num_seqs * length / seconds
    return {"floor_tokens_per_second": round(floor, 1), "fraction": round(tokens_per_second / floor, 4)}


_BASES: Sequence[Literal["spec", "copy"]] = ("spec", "copy")


def op_bytes(model: ModelConfig, name: str, num_seqs: int, context: int, experts: float | None = None) -> float | None:
    """Give the bytes that an op, or a fused GPU stage, must read in one decode step; None for names without weights."""
    query, key = model.num_attention_heads * model.head_dim, model.num_kv_heads * model.head_dim
    whole = step_bytes(model, num_seqs, context, experts)
    qkv = model.num_layers * (model.hidden_size + 1) * (query + 2 * key) * BF16_BYTES
    out = model.num_layers * (query + 1) * model.hidden_size * BF16_BYTES
    router = model.num_layers * model.num_experts * (model.hidden_size + 1) * BF16_BYTES
    return {
        "qkv_project": qkv,
        "norm_qkv_rope": qkv,
        "linear_add": out,
        "out_proj_add": out,
        "paged_attention": whole.kv,
        "paged_decode_attention": whole.kv,
        "moe_add": router + whole.experts,
        "norm_router_topk": router,
        "moe_gate_up": whole.experts * 2 / 3,
        "moe_down_add": whole.experts / 3,
        "logits": whole.lm_head,
        "norm_logits": whole.lm_head,
        "decode_layers": whole.attention_and_router + whole.experts + whole.kv,
        "router_topk": router,
        "moe_decode": whole.experts,
        # Beyond 16 rows, where all three products of a GPU step are cuBLAS's.
        "cuBLAS": qkv + out + whole.lm_head,
    }.get(name)


def add_bytes(
    profile: dict[str, Any],
    model: ModelConfig,
    num_seqs: int,
    context: int,
    device: Device,
    experts: float | None = None,
) -> None:
    """Add `bytes` and `fraction` of the floor to each op of a profile, and to the whole step.

    The bandwidth is the maker's figure, or the measured copy where there is none.
    """
    bandwidth = device.spec or device.copy
    whole = step_bytes(model, num_seqs, context, experts).total
    timed = [(op, op_bytes(model, op["name"], num_seqs, context, experts), op["seconds"]) for op in profile["ops"]]
    for target, amount, seconds in (*timed, (profile, whole, profile["step_seconds"])):
        target["bytes"] = amount
        known = amount is not None and bandwidth is not None and seconds > 0
        target["fraction"] = amount / bandwidth / seconds if known else None  # type: ignore[operator]
