"""Counter-based uniforms: a pure function of (seed, token position).

Neither batching nor preemption nor run-ahead can change a draw, since nothing is carried from one draw to the next.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> int:
    """Mix 64 bits (Steele, Lea and Flood, 2014): the finaliser of Java's SplittableRandom."""
    z = (state + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def uniform(seed: int, position: int) -> float:
    """Draw from [0, 1) for the token at `position` of a request with this seed; 53 bits.

    The seed is mixed before the position joins it, so that neighbouring seeds share no shifted sequence.
    """
    return (splitmix64(splitmix64(seed & _MASK) ^ (position & _MASK)) >> 11) * 2.0**-53
