"""Bytes and counts as people read them. Pure; knows no field of anything."""

from __future__ import annotations

GIB = 1 << 30
_UNITS = (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10))


def size(num_bytes: float) -> str:
    """Write bytes with one decimal in their unit: `13.0 GiB`, `9.4 MiB`, `64.0 KiB`, `12 bytes`."""
    for unit, scale in _UNITS:
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def counted(number: int, noun: str) -> str:
    """Write a number of things: `1 rank`, `2 ranks`, `0 ranks`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
