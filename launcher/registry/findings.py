"""What a rule between keys finds, and how rules look at values.

Knows: the shape of a finding, which of several keys to blame. Refuses to know: the rules (`launcher.registry.rules`,
`launcher.registry.placement_rules`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from launcher.errors import Severity
from launcher.registry.types import Layer, ResolvedValue


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken rule. `key` is the value to blame: its position is where the user looks."""

    severity: Severity
    code: str
    key: str
    message: str
    hint: str


NO_PLACE = frozenset({"context-too-long", "heads-tp", "layers-pp", "rank-spread", "world-exceeds-gpus"})
"""Codes of an entry that asks for more than its hardware or its model has: no mistake of the file's other entries."""

Values = Mapping[str, ResolvedValue]
Rule = Callable[[Values], Iterator[Finding]]

_ORDER = {layer: index for index, layer in enumerate(Layer)}


def highest(values: Values, *keys: str) -> str:
    """Of several keys, the one set by the highest layer: the one the user touched last."""
    return max(keys, key=lambda key: _ORDER[values[key].origin.layer])


def whole(values: Values, key: str) -> int:
    """The value of a key as a number; 0 when it is none."""
    value = values[key].value
    return value if isinstance(value, int) else 0
