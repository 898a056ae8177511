"""What one key is: name, kind, default, unit, range, aliases, meaning; and how its value reads.

Refuses to know: which keys there are (the tables beside this module), how values are parsed, merged or used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType
from typing import Any

from engine.config import EngineConfig
from launcher.registry.types import Value
from launcher.registry.values import MAX_QUANTITY, format_duration, format_size


class Kind(Enum):
    """How a value is written and what it becomes."""

    TEXT = auto()
    """str"""
    CHOICE = auto()
    """str, one of `choices`"""
    BOOLEAN = auto()
    """bool; only `true` and `false`"""
    INTEGER = auto()
    """int; `1e6` is read as a number"""
    NUMBER = auto()
    """float"""
    TOKENS = auto()
    """int of tokens, or "auto"; accepts `128k`, `auto`, `-1`"""
    SIZE = auto()
    """int of bytes; accepts `4GiB`"""
    DURATION = auto()
    """float of seconds; accepts `15m`"""
    SECRET = auto()
    """SecretRef"""
    TEXTS = auto()
    """tuple of str; one text counts as a list of one"""
    VARIABLES = auto()
    """mapping of environment variables; only `env`"""
    ADDRESS = auto()
    """str: an IPv4 or IPv6 address in its canonical form, never a name"""
    SUBNET = auto()
    """str: a network such as 192.168.100.0/24"""
    PORT_RANGE = auto()
    """(int, int): first and last port, both included"""


@dataclass(frozen=True, slots=True)
class KeySpec:
    """One key. `default` None means that the engine or the model decides; `automatic` then says how.

    `low` is inclusive unless `is_low_open`; `high` is inclusive. `is_fixed`: no override from outside the file.
    A dot nests: `ready.timeout` is `timeout` inside `ready:`. `refused` are choices that load, since other programs
    have them, and that every plan refuses: no schema offers them. `refusal` says why; without `choices` it is said of
    every value.
    """

    key: str
    kind: Kind
    summary: str
    default: Value | tuple[int, int] = None
    automatic: str = ""
    unit: str = ""
    choices: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    refusal: str = ""
    values: tuple[int, ...] = ()
    low: float | None = None
    high: float | None = None
    is_low_open: bool = False
    pattern: str | None = None
    pattern_hint: str = ""
    aliases: tuple[str, ...] = ()
    is_required: bool = False
    is_fixed: bool = False
    is_launcher_only: bool = False

    @property
    def environment(self) -> str:
        """The variable that overrides this key: `HLAUNCH_MAX_NUM_SEQS`."""
        return variable_name(self.key)

    def refusal_of(self, value: str) -> str | None:
        """Return why no device serves this value; None when some does, or nothing is known against it."""
        return self.refusal if self.refusal and (not self.choices or value in self.refused) else None

    def describe_default(self) -> str:
        """The default as a reader sees it."""
        if self.is_required:
            return "required"
        if self.default is None:
            return self.automatic or "unset"
        return show_value(self, self.default)

    def describe_range(self) -> str:
        """The accepted values in a few words, empty when any value of the kind goes."""
        if self.choices:
            return " | ".join(choice for choice in self.choices if choice not in self.refused)
        if self.values:
            return " | ".join(str(value) for value in self.values)
        if self.kind is Kind.BOOLEAN:
            return "true | false"
        low = "" if self.low is None else f"{'>' if self.is_low_open else '>='} {self._bound(self.low)}"
        high = "" if self.high is None or self.high == MAX_QUANTITY else f"<= {self._bound(self.high)}"
        return ", ".join(part for part in (low, high) if part)

    def _bound(self, value: float) -> str:
        return show_value(self, value) if self.kind in (Kind.SIZE, Kind.DURATION) else f"{value}"


def variable_name(spelling: str) -> str:
    """Return the variable of a key or of one of its aliases."""
    return "HLAUNCH_" + re.sub(r"[-.]", "_", spelling).upper()


def show_value(spec: KeySpec, value: Value | tuple[int, int]) -> str:
    """Write a value the way the registry takes it back."""
    if value is None:
        return spec.automatic or "unset"
    if isinstance(value, bool):
        return "true" if value else "false"
    if spec.kind is Kind.SIZE and isinstance(value, (int, float)):
        return format_size(int(value))
    if spec.kind is Kind.DURATION and isinstance(value, (int, float)):
        return format_duration(float(value))
    if isinstance(value, tuple):
        return "[" + ", ".join(str(item) for item in value) + "]"
    return str(value)


ENGINE: Mapping[str, Any] = MappingProxyType(
    {name: item.default for name, item in EngineConfig.__dataclass_fields__.items()}
)
"""The engine's own defaults, by field."""

FROM_MODEL = "this version takes it from the model"
"""Why a value is refused that other programs let a user choose."""
NAME_HINT = "use letters, digits, '.', '_', '-', '/' and ':'; it cannot start with '-'"
NAME = r"[A-Za-z0-9_][A-Za-z0-9._:/+-]*"
PATHLIKE = r"[A-Za-z0-9_./~][^\x00-\x1f\x7f]*"


class KeyTable:
    """The keys that one kind of mapping may hold, in the order of documentation. Frozen after making.

    A dotted key stands inside a mapping: `ready.timeout` is `timeout` inside the group `ready`. An aliased key of the
    group `fabric` is aliased inside it.
    """

    def __init__(self, *parts: tuple[KeySpec, ...], without: frozenset[str] = frozenset()) -> None:
        specs = [spec for part in parts for spec in part if spec.key not in without]
        self.specs: Mapping[str, KeySpec] = MappingProxyType({spec.key: spec for spec in specs})
        self.dashed: Mapping[str, str] = MappingProxyType(
            {name: spec.key for spec in specs for name in (spec.key, *spec.aliases)}
        )
        """Every spelling worth proposing -> canonical key."""
        self.spellings: Mapping[str, str] = MappingProxyType(
            {spelling: key for name, key in self.dashed.items() for spelling in (name, name.replace("-", "_"))}
        )
        """Every accepted spelling -> canonical key."""
        groups: dict[str, list[str]] = {}
        for spec in specs:
            group, dot, leaf = spec.key.partition(".")
            if dot:
                groups.setdefault(group, []).append(leaf)
        self.groups: Mapping[str, tuple[str, ...]] = MappingProxyType(
            {group: tuple(leaves) for group, leaves in groups.items()}
        )
        """Keys that hold a mapping of further keys: `ready` -> (`path`, `timeout`, …)."""
