"""Twins of the decode kernels in `kernels/cuda`: one function per step, float32, on any device, at any speed.

State as the kernels see it: positions, lengths int32 [B] (0 marks padding), table int32 [B, blocks], rotations float32
[P, D/2, 2] of (cos, sin); RoPE pairs dimension i with i + D/2. Padding rows keep what they held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference import basic, moe
from kernels.reference.attention import attend
from kernels.reference.mxfp4 import E2M1


def cache_slots(table: Tensor, row: int, begin: int, end: int, block_size: int) -> Tensor:
    """Name the slots of a row's positions [begin, end): int64 [end - begin]."""
    keys = torch.arange(begin, end, device=table.device)
    return table[row, keys // block_size].long() * block_size + keys % block_size


def norm_qkv_rope(
    residual: Tensor,
    norm: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    rotations: Tensor,
    positions: Tensor,
    lengths: Tensor,
    table: Tensor,
    block_size: int,
    cache: Tensor,
) -> Tensor:
    """Project the normed residual [B, H] to q, k, v, rotate q and k, write k and v to cache [slots, 2, K, D].

    Shapes: weight [(Hq + 2 K) D, H] in rows q, k, v; returns the queries float32 [B, Hq, D].
    """
    kv_heads, dim = cache.shape[2:]
    normed = basic.rms_norm(residual.float(), norm, epsilon)
    qkv = basic.linear(normed, weight.float(), bias.float()).view(residual.shape[0], -1, dim)
    cos, sin = rotations[positions.long()].unsqueeze(1).unbind(-1)
    first, second = qkv[:, :-kv_heads].chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    query, keys = turned[:, :-kv_heads], turned[:, -kv_heads:]
    for row in range(residual.shape[0]):
        if int(lengths[row]):
            position = int(positions[row])
            slot = cache_slots(table, row, position, position + 1, block_size)
            cache[slot, 0] = keys[row].to(cache.dtype)
            cache[slot, 1] = qkv[row, -kv_heads:].to(cache.dtype)
    return query


def paged_decode_attention(
    query: Tensor,
    cache: Tensor,
    sinks: Tensor,
    lengths: Tensor,
    table: Tensor,
    block_size: int,
    window: int | None,
    scale: float,
) -> Tensor:
    """Attend from one query per row [B, Hq, D] to its last `window` keys, or all; returns float32 [B, Hq · D]."""
    out = torch.zeros(query.shape, device=query.device)
    for row, length in enumerate(lengths.tolist()):
        if length:
            begin = 0 if window is None else max(0, length - window)
            kv = cache[cache_slots(table, row, begin, length, block_size)]
            visible = torch.ones(1, length - begin, dtype=torch.bool, device=query.device)
            out[row] = attend(query[row : row + 1], kv[:, 0], kv[:, 1], sinks, visible, scale)[0]
    return out.flatten(1)


def out_proj_add(attended: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """Return residual + attended weightᵀ + bias, float32 [B, H]."""
    return residual + basic.linear(attended.float(), weight.float(), bias.float())


def norm_router_topk(
    residual: Tensor, norm: Tensor, weight: Tensor, bias: Tensor, epsilon: float, k: int, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Choose experts for the normed residual; returns ids int32 [B, k] (−1 for padding) and weights float32 [B, k]."""
    shares, ids = moe.router_topk(basic.rms_norm(residual, norm, epsilon), weight, bias, k)
    padding = lengths[:, None] == 0
    return ids.masked_fill(padding, -1).int(), shares.masked_fill(padding, 0.0)


def moe_gate_up(
    residual: Tensor,
    norm: Tensor,
    epsilon: float,
    ids: Tensor,
    blocks: Tensor,
    scales: Tensor,
    bias: Tensor,
    limit: float,
) -> Tensor:
    """Apply gate_up and SwiGLU of each row's experts: blocks [E, 2 I, H/32, 16], rows gate, up, gate, up, …

    Returns float32 [B, k, I], zero for padding.
    """
    normed = basic.rms_norm(residual.float(), norm, epsilon)
    out = torch.zeros(*ids.shape, blocks.shape[1] // 2, device=residual.device)
    for expert in _touched(ids):
        rows, slots = torch.where(ids == expert)
        gate_up = normed[rows] @ _expanded(blocks[expert], scales[expert]).T + bias[expert].float()
        out[rows, slots] = moe.swiglu(torch.cat((gate_up[:, 0::2], gate_up[:, 1::2]), dim=1), limit)
    return out


def moe_down_add(
    act: Tensor, ids: Tensor, shares: Tensor, blocks: Tensor, scales: Tensor, bias: Tensor, residual: Tensor
) -> Tensor:
    """Return residual + Σ_slots share · (down(act) + bias), float32 [B, H], summed in slot order."""
    parts = torch.zeros(*ids.shape, blocks.shape[1], device=residual.device)
    for expert in _touched(ids):
        rows, slots = torch.where(ids == expert)
        result = act[rows, slots].float() @ _expanded(blocks[expert], scales[expert]).T + bias[expert].float()
        parts[rows, slots] = result * shares[rows, slots, None]
    return residual + parts.sum(1)


def norm_logits(residual: Tensor, norm: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Project the normed residual on the vocabulary, float32 [B, V]."""
    return basic.rms_norm(residual.float(), norm, epsilon) @ weight.float().T


def _touched(ids: Tensor) -> list[int]:
    return [expert for expert in torch.unique(ids).tolist() if expert >= 0]


def _expanded(blocks: Tensor, scales: Tensor) -> Tensor:
    """Expand one expert's rows to float32 on their own device: blocks [R, B, 16], scales [R, B] to [R, 32 · B]."""
    lut = torch.tensor(E2M1, dtype=torch.float32, device=blocks.device)
    nibbles = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1).flatten(-2)
    return torch.ldexp(lut[nibbles.int()], (scales.int() - 127).unsqueeze(-1)).flatten(-2)
