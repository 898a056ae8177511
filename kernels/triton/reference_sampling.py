"""Torch twins of the sampling kernels: the meaning, on any device, at any speed."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mix(h: Tensor) -> Tensor:
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _MASK
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Give the noise of each row and token: seeds int64 [B], positions [B]; returns float32 [B, V]."""
    seeds, positions = seeds.long(), positions.long()
    low, high = seeds & _MASK, (seeds >> 32) & _MASK
    key = (_mix(low ^ 0x9E3779B9) + _mix(high ^ 0x7F4A7C15) * 3 + positions * 0x85EBCA77) & _MASK
    key = _mix(key)[:, None]
    token = torch.arange(vocab, device=seeds.device)[None, :]
    h = _mix(_mix((token * 0x9E3779B1 + key) & _MASK) ^ ((key * 0x27D4EB2F + 0x165667B1) & _MASK))
    v = ((h.float() + 0.5) * 2.3283064365386963e-10).clamp(max=0.99999994)
    return -torch.where(v < 1e-3, v + 0.5 * v * v, -torch.log(1.0 - v)).log()


def sample(
    logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, thresholds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample as `sampling.sample` does."""
    scores = torch.where(logits.isnan(), float("-inf"), logits.float())
    nan = logits.isnan().any(-1) | ~scores.amax(-1).isfinite()
    if thresholds is not None:
        scores = torch.where(scores < thresholds[:, None], float("-inf"), scores)
    noise = gumbel_noise(seeds, positions, logits.shape[1])
    hot = temperature > 0
    noisy = scores / torch.where(hot, temperature, 1.0)[:, None] + noise
    return torch.where(hot[:, None], noisy, scores).argmax(-1).int(), nan.int()


def sampling_thresholds(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Find thresholds as `sampling.sampling_thresholds` does, by sorting."""
    out = torch.full((logits.shape[0],), float("-inf"), device=logits.device)
    for row in range(logits.shape[0]):
        heat, k, p, m = float(temperature[row]), int(top_k[row]), float(top_p[row]), float(min_p[row])
        if heat <= 0:
            continue
        values = logits[row].float().sort(descending=True).values
        largest = values[0]
        if 0 < k < values.shape[0]:
            values = values[values >= values[k - 1]]
            out[row] = values[-1]
        if m > 0:
            bound = min(largest, largest + torch.tensor(m).log() * heat)
            values = values[values >= bound]
            out[row] = max(out[row], bound)
        if p < 1:
            mass = ((values - largest).double() / heat).exp().cumsum(0)
            out[row] = values[int((mass < mass[-1] * p).sum())]
    return out


def penalise(
    logits: Tensor, ids: Tensor, counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """Give the logits that `sampling.apply_penalties_` leaves."""
    out = logits.clone().float()
    for row in range(logits.shape[0]):
        keep = ids[row] >= 0
        at, count = ids[row][keep].long(), counts[row][keep].float()
        x = out[row, at]
        x = torch.where(x > 0, x / repetition[row], x * repetition[row])
        out[row, at] = x - frequency[row] * count - presence[row] * (count > 0)
    return out
