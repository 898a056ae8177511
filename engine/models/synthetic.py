"""The distribution of made-up weights: one rule per tensor name, for every place that makes such weights.

Knows: which values each tensor of a gpt-oss checkpoint is drawn from. Refuses to know: torch, numpy, random numbers,
files; `engine.synthesis` turns rules into bytes, and a device that draws its own numbers follows the same rules.

Why these values:
- A product brings a vector of unit size to a vector of unit size (standard deviation 1/sqrt(columns)), so activations
  stay finite and of plausible size through any number of layers.
- What a layer adds to the residual stream is damped by 4 (o_proj, down_proj), as trained models start out: experts
  have a mean answer, and undamped it grows with every layer until it decides the routing of the next.
- Biases are small (0.1), those that go into the residual stream damped too. What all tokens have in common grows with
  every layer that adds a bias; with biases of 0.5 it would outweigh what tells tokens apart after a few layers, and a
  batch would be routed to the same few experts.
- Router weights are like any other product's: the scores of a token are independent and of unit size, so routing is
  near uniform, the worst case for the bytes of a step.
- MXFP4 nibbles are any of the 16 codes; the scales of a tensor are three neighbouring exponents around the one that
  gives the product unit size. They stay below 128, so that exact conversions to bfloat16 have room.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# Mean square of the 16 values of E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
E2M1_MEAN_SQUARE = (0.25 + 1 + 2.25 + 4 + 9 + 16 + 36) / 8
# Mean of 4^d over the exponents d = -1, 0, 1 around the centre: how much their spread adds to the mean square.
SPREAD_MEAN_SQUARE = (0.25 + 1 + 4) / 3
BIAS_STD = 0.1
RESIDUAL_DAMPING = 4


@dataclass(frozen=True, slots=True)
class SyntheticRule:
    """What one tensor's values are drawn from.

    `normal`: bfloat16 of a normal distribution of `mean` and `std`. `codes`: bytes, all 256 equally likely (two MXFP4
    nibbles each). `scales`: bytes, `centre - 1`, `centre` and `centre + 1` with 85, 86 and 85 of 256 chances.
    """

    kind: Literal["normal", "codes", "scales"]
    mean: float = 0.0
    std: float = 1.0
    centre: int = 0


def synthetic_rule(name: str, shape: Sequence[int]) -> SyntheticRule:
    """Give the rule of a tensor by its Hugging Face name and its shape in the checkpoint."""
    if name.endswith("_blocks"):
        return SyntheticRule("codes")
    if name.endswith("_scales"):
        damping = RESIDUAL_DAMPING if _adds_to_residual(name) else 1
        return SyntheticRule("scales", centre=_scale_centre(32 * shape[-1] * damping**2))
    if name.endswith("norm.weight"):
        return SyntheticRule("normal", mean=1.0, std=0.1)
    if name.endswith(("embed_tokens.weight", "sinks")):
        return SyntheticRule("normal")
    if name.endswith("bias"):
        return SyntheticRule("normal", std=BIAS_STD / (RESIDUAL_DAMPING if _adds_to_residual(name) else 1))
    # Expanded experts are stored [E, columns, rows]; every other product is [rows, columns].
    columns = shape[-2] if name.endswith(("gate_up_proj", "down_proj")) else shape[-1]
    damping = RESIDUAL_DAMPING if _adds_to_residual(name) else 1
    return SyntheticRule("normal", std=columns**-0.5 / damping)


def _adds_to_residual(name: str) -> bool:
    return "o_proj" in name or "down_proj" in name


def _scale_centre(columns: int) -> int:
    """Give the biased exponent at which a dot product over `columns` MXFP4 values has unit size."""
    return 127 - round(math.log2(math.sqrt(columns * E2M1_MEAN_SQUARE * SPREAD_MEAN_SQUARE)))
