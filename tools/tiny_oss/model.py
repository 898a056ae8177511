"""The gpt-oss architecture as a compact training model.

Knows: the exact maths of gpt-oss (sinks, alternating window, YaRN, top-k experts, clamped SwiGLU) over packed
rows of documents, and its Hugging Face config and tensor names.
Refuses to know: caches, generation and serving; the engine has its own model for those.

Every expert is computed for every token and weighted by the router (zero when not selected): two plain matrix
products, which at this size beat gather and scatter and run anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.tiny_oss.mxfp4 import fake_quantize

SWIGLU_ALPHA = 1.702

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(q [B, Hq, T, D], k [B, Hkv, T, D], v, sinks [Hq]) -> [B, Hq, T, D]."""


@dataclass(frozen=True)
class TinyOssConfig:
    """Sizes of a gpt-oss model; the defaults are tiny-oss."""

    vocab_size: int
    hidden_size: int = 224
    intermediate_size: int = 288
    num_layers: int = 6
    num_heads: int = 16
    num_kv_heads: int = 2
    head_dim: int = 32
    num_experts: int = 8
    experts_per_token: int = 2
    sliding_window: int = 64
    max_positions: int = 2048
    rope_theta: float = 150000.0
    yarn_factor: float = 4.0
    yarn_original: int = 512
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    swiglu_limit: float = 7.0
    norm_eps: float = 1e-5

    def is_sliding(self, layer: int) -> bool:
        """Say whether a layer attends within the window: the first does, then every other one."""
        return layer % 2 == 0

    def to_hf(self, token_ids: dict[str, int]) -> dict[str, Any]:
        """Return config.json as gpt-oss-20b writes it; `token_ids` maps control token names to ids."""
        kinds = [
            "sliding_attention" if self.is_sliding(layer) else "full_attention" for layer in range(self.num_layers)
        ]
        return {
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "bos_token_id": token_ids["<|startoftext|>"],
            "eos_token_id": token_ids["<|return|>"],
            "experts_per_token": self.experts_per_token,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initial_context_length": self.yarn_original,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "layer_types": kinds,
            "max_position_embeddings": self.max_positions,
            "model_type": "gpt_oss",
            "num_attention_heads": self.num_heads,
            "num_experts_per_tok": self.experts_per_token,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "num_local_experts": self.num_experts,
            "output_router_logits": False,
            "pad_token_id": token_ids["<|endoftext|>"],
            "quantization_config": {
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
                "quant_method": "mxfp4",
            },
            "rms_norm_eps": self.norm_eps,
            "rope_scaling": {
                "beta_fast": self.beta_fast,
                "beta_slow": self.beta_slow,
                "factor": self.yarn_factor,
                "original_max_position_embeddings": self.yarn_original,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": self.rope_theta,
            "router_aux_loss_coef": 0.9,
            "sliding_window": self.sliding_window,
            "swiglu_limit": self.swiglu_limit,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.55.0",
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }


def yarn_tables(config: TinyOssConfig, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return cos and sin, float32 [max_positions, head_dim / 2], already multiplied by the concentration."""
    half = config.head_dim // 2
    steps = torch.arange(half, dtype=torch.float64)
    periods = config.rope_theta ** (2 * steps / config.head_dim)

    def dimension(rotations: float) -> float:
        return half * math.log(config.yarn_original / (rotations * 2 * math.pi)) / math.log(config.rope_theta)

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    ramp = ((steps - low) / (high - low)).clamp(0, 1)
    inv_freq = (1 - ramp) / periods + ramp / (config.yarn_factor * periods)
    angles = torch.outer(torch.arange(config.max_positions, dtype=torch.float32), inv_freq.float())
    concentration = 0.1 * math.log(config.yarn_factor) + 1.0
    return (angles.cos() * concentration).to(device), (angles.sin() * concentration).to(device)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of x [B, H, T, D] by cos and sin [B, 1, T, D/2], in float32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    """RMS norm that multiplies by its weight in float32 before casting back."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with biases and one learned sink logit per query head."""

    def __init__(self, config: TinyOssConfig) -> None:
        super().__init__()
        self.config = config
        wide, narrow = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, wide)
        self.k_proj = nn.Linear(config.hidden_size, narrow)
        self.v_proj = nn.Linear(config.hidden_size, narrow)
        self.o_proj = nn.Linear(wide, config.hidden_size)
        self.sinks = nn.Parameter(torch.zeros(config.num_heads))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        size = self.config.head_dim
        q = self.q_proj(x).unflatten(-1, (-1, size)).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (-1, size)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (-1, size)).transpose(1, 2)
        out = attend(_rotate(q, cos, sin), _rotate(k, cos, sin), v, self.sinks)
        mixed: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return mixed


class Experts(nn.Module):
    """All experts of a layer; even rows of gate_up are gate, odd rows are up."""

    def __init__(self, config: TinyOssConfig) -> None:
        super().__init__()
        self.limit = config.swiglu_limit
        experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, hidden) * hidden**-0.5)
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(experts, 2 * inner))
        self.down_proj = nn.Parameter(
            torch.randn(experts, hidden, inner) * inner**-0.5 * (2 * config.num_layers) ** -0.5
        )
        self.down_proj_bias = nn.Parameter(torch.zeros(experts, hidden))
        self.is_quantized = False

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Mix the experts of x [N, h] by router weights [N, E], zero where not selected."""
        gate_up_proj: Tensor = self.gate_up_proj
        down_proj: Tensor = self.down_proj
        if self.is_quantized:
            gate_up_proj, down_proj = fake_quantize(gate_up_proj), fake_quantize(down_proj)
        hidden = F.linear(x, gate_up_proj.flatten(0, 1), self.gate_up_proj_bias.flatten())
        hidden = hidden.view(len(x), weights.shape[-1], -1)
        gate = hidden[..., 0::2].clamp(max=self.limit)
        up = hidden[..., 1::2].clamp(-self.limit, self.limit)
        mixed = gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1) * weights.unsqueeze(-1).to(x.dtype)
        # Summing over experts is part of the product: its inner axis is (expert, unit).
        down = down_proj.permute(0, 2, 1).flatten(0, 1)
        bias = weights.to(x.dtype) @ self.down_proj_bias.to(x.dtype)
        return mixed.flatten(1) @ down.to(mixed.dtype) + bias


class MoE(nn.Module):
    """Router and experts; remembers the balance loss of its last forward pass."""

    def __init__(self, config: TinyOssConfig) -> None:
        super().__init__()
        self.top_k = config.experts_per_token
        self.router = nn.Linear(config.hidden_size, config.num_experts)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed output [B, T, h] and the load-balancing loss (1 when perfectly even)."""
        flat = x.flatten(0, 1)
        with torch.autocast(x.device.type, enabled=False):
            weight = self.router.weight
            # The checkpoint holds the router in bf16; training on the rounded value leaves nothing to lose.
            weight = weight + (weight.bfloat16().float() - weight).detach()
            logits = F.linear(flat.float(), weight, self.router.bias)
        top, chosen = logits.topk(self.top_k, dim=-1)
        weights = torch.zeros_like(logits).scatter(-1, chosen, top.softmax(-1))
        share = (weights > 0).float().mean(0) * (logits.shape[-1] / self.top_k)
        balance = (share * logits.softmax(-1).mean(0)).sum()
        return self.experts(flat, weights).view_as(x), balance


class Block(nn.Module):
    """One layer: attention, then experts, each on a normalised residual stream."""

    def __init__(self, config: TinyOssConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MoE(config)

    def forward(self, x: Tensor, keep: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        x = x + _drop(self.self_attn(self.input_layernorm(x), cos, sin, attend), keep)
        out, balance = self.mlp(self.post_attention_layernorm(x))
        return x + _drop(out, keep), balance


def _drop(x: Tensor, keep: Tensor) -> Tensor:
    """Drop elements of x [B, T, h] with a keep probability per token, keep [B, T, 1]."""
    return x * (torch.rand_like(x) < keep).to(x.dtype) / keep.to(x.dtype)


class _Decoder(nn.Module):
    """The part whose tensors are named `model.*`."""

    def __init__(self, config: TinyOssConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class TinyOss(nn.Module):
    """gpt-oss with parameter names equal to the checkpoint's (experts unpacked)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TinyOssConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        cos, sin = yarn_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Scale the output projections down by depth so that the residual stream starts small."""
        depth = (2 * self.config.num_layers) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                gain = depth if name.endswith("o_proj") else 1.0
                nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.model.embed_tokens.weight, std=0.5)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def set_quantized(self, is_quantized: bool) -> None:
        """Turn straight-through MXFP4 of the experts on or off."""
        for module in self.modules():
            if isinstance(module, Experts):
                module.is_quantized = is_quantized

    def forward(
        self, tokens: Tensor, positions: Tensor, keep: Tensor, attends: tuple[Attend, Attend]
    ) -> tuple[Tensor, Tensor]:
        """Return final hidden states [B, T, h] and the mean balance loss.

        Shapes: tokens, positions int64 [B, T]; keep float [B, T, 1], 1 for no dropout;
        attends: attention of a full layer and of a sliding layer.
        """
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        x = _drop(self.model.embed_tokens(tokens), keep)
        balances = []
        for index, block in enumerate(self.model.layers):
            x, balance = block(x, keep, cos, sin, attends[self.config.is_sliding(index)])
            balances.append(balance)
        return self.model.norm(x), torch.stack(balances).mean()
