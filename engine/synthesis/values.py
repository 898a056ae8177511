"""From a rule to bytes, without ever depending on the machine, on threads or on the order of reading.

Each tensor has a stream of its own: Philox4x64-10 under a 128-bit key made of the seed and the tensor's name. Byte i
of the stream belongs to counter i // 32 (plus the one that Philox adds before its first output), so any part can be
made alone. One byte of the stream makes one byte of the tensor:

    normal   two bytes are an index i into 65,536 quantiles: bfloat16(mean + std * quantile((i + 0.5) / 65536))
    codes    the byte itself
    scales   centre - 1 for 0..84, centre for 85..170, centre + 1 for 171..255

Knows: this definition (`FORMAT`). Refuses to know: files, torch. NumPy promises the stream of Philox for ever, and no
other function of its random module is relied on: `integers` over all 64 bits hands the stream through, and a test
holds it against `random_raw`, which is the promise itself but keeps the interpreter lock.
"""

from __future__ import annotations

import hashlib
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from engine.models.synthetic import SyntheticRule

FORMAT = 1
# A multiple of Philox's 32 bytes a counter: large enough that Python's share is nothing, small enough for a cache.
PIECE_BYTES = 1 << 20
_UINT64_MAX = (1 << 64) - 1


def tensor_key(seed: int, name: str) -> NDArray[np.uint64]:
    """Give the 128-bit Philox key of a tensor as two words, low word first."""
    digest = hashlib.blake2b(f"hlaunch {FORMAT} {seed} {name}".encode(), digest_size=16).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def fill(target: NDArray[np.uint8], offset: int, rule: SyntheticRule, key: NDArray[np.uint64]) -> None:
    """Write bytes [offset, offset + len(target)) of a tensor into `target`.

    Units:  `offset` counts bytes and is a multiple of 32; so is the length, but at the tensor's end.
    """
    if offset % 32:
        raise ValueError(f"offset {offset} is not a multiple of 32")
    for begin in range(0, len(target), PIECE_BYTES):
        piece = target[begin : begin + PIECE_BYTES]
        _convert(_stream(key, offset + begin, len(piece)), rule, piece)


def make(name: str, num_bytes: int, rule: SyntheticRule, seed: int) -> NDArray[np.uint8]:
    """Make one whole tensor, as bytes in little-endian order."""
    data = np.empty(num_bytes, dtype=np.uint8)
    fill(data, 0, rule, tensor_key(seed, name))
    return data


def _stream(key: NDArray[np.uint64], offset: int, length: int) -> NDArray[np.uint8]:
    counter = np.array([offset // 32, 0, 0, 0], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
    words = generator.integers(0, _UINT64_MAX, -(-length // 8), dtype=np.uint64, endpoint=True)
    return words.astype("<u8", copy=False).view(np.uint8)[:length]


def _convert(stream: NDArray[np.uint8], rule: SyntheticRule, target: NDArray[np.uint8]) -> None:
    if rule.kind == "codes":
        target[:] = stream
    elif rule.kind == "scales":
        np.take(_scale_table(rule.centre), stream, out=target, mode="wrap")
    else:
        values = np.take(_normal_table(rule.mean, rule.std), stream.view("<u2"), mode="wrap")
        target[:] = values.astype("<u2", copy=False).view(np.uint8)


@cache
def _scale_table(centre: int) -> NDArray[np.uint8]:
    return np.repeat(np.array([centre - 1, centre, centre + 1], dtype=np.uint8), [85, 86, 85])


@cache
def _normal_table(mean: float, std: float) -> NDArray[np.uint16]:
    """Give the bfloat16 bit pattern of every quantile of one normal distribution."""
    return _bfloat16_bits((mean + std * _quantiles()).astype(np.float32))


@cache
def _quantiles() -> NDArray[np.float64]:
    """Give 65,536 quantiles of the standard normal distribution; the outermost lie at 4.3."""
    upper = NormalDist()
    half = np.array([upper.inv_cdf((i + 0.5) / 65536) for i in range(32768, 65536)])
    return np.concatenate((-half[::-1], half))


def _bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to bfloat16, ties to even, and give the bit patterns; values are finite."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded.astype(np.uint16)
