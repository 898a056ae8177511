"""The registry's values: what a loaded file and a resolved entry are.

Knows: names, settings, where each came from. Refuses to know: how YAML is read or layers are merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias, TypeVar

from launcher.errors import Issue
from launcher.registry.cluster import Cluster
from launcher.registry.values import AUTO, SecretRef

_T = TypeVar("_T")

NO_CLUSTER = "none"
"""As the value of `cluster`: this host alone, whatever a lower layer says."""

Value: TypeAlias = bool | int | float | str | tuple[str, ...] | SecretRef | None
"""A validated value. None: nobody set it, the engine or the model decides."""


class Layer(StrEnum):
    """Where a value can come from, lowest first."""

    BUILT_IN = "built-in"
    PLATFORM = "platform"
    DEFAULTS = "defaults"
    EXTENDS = "extends"
    MODEL = "model"
    OVERRIDES = "overrides"
    PROFILE = "profile"
    CLUSTER = "cluster"
    NODE = "node"
    ENVIRONMENT = "environment"
    FLAG = "flag"


class Mark(NamedTuple):
    """A position in a file, counted from 1. A tuple: a file near the limits makes 200,000 of them."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Origin:
    """Where one value came from. `source` is the file, `$HLAUNCH_<KEY>` or `--set`; None for a built-in.

    `name` says which one of several: the base of `extends`, the profile, the platform, the cluster, the node.
    """

    layer: Layer
    source: str | None = None
    line: int | None = None
    column: int | None = None
    name: str = ""

    def __str__(self) -> str:
        layer = f"{self.layer} {self.name}".rstrip()
        if self.source is None:
            return layer
        where = self.source if self.line is None else f"{self.source}:{self.line}:{self.column}"
        return f"{layer} ({where})"

    def brief(self) -> str:
        """As `str`, but a file that lies elsewhere is named without its folder, for which a table has no room."""
        path = PurePath(self.source or "")
        return str(replace(self, source=path.name)) if self.line is not None and path.is_absolute() else str(self)


BUILT_IN = Origin(Layer.BUILT_IN)


@dataclass(frozen=True, slots=True)
class Setting:
    """One validated value in a file, and where its text stands."""

    value: Value
    mark: Mark


@dataclass(frozen=True, slots=True)
class Options:
    """The settings of `defaults` or of one model: canonical dashed key -> setting; `env` variables apart.

    In `env`, a setting of None removes the variable that a lower layer set, or that the engine would inherit.
    """

    settings: Mapping[str, Setting] = field(default_factory=lambda: MappingProxyType({}))
    env: Mapping[str, Setting] = field(default_factory=lambda: MappingProxyType({}))


def _nothing() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model of the registry, validated, not yet resolved.

    `bases` are the entries it extends, all generations, lowest first. `profiles` are its own, by name; `overrides` are
    by platform.
    """

    name: str
    mark: Mark
    options: Options
    profiles: Mapping[str, Options] = field(default_factory=_nothing)
    overrides: Mapping[str, Options] = field(default_factory=_nothing)
    bases: tuple[ModelEntry, ...] = ()

    @property
    def model(self) -> str:
        """What to serve, its own or its nearest base's; empty only in a registry that is refused for it."""
        for entry in (self, *reversed(self.bases)):
            if (setting := entry.options.settings.get("model")) is not None:
                return str(setting.value)
        return ""

    @property
    def description(self) -> str:
        setting = self.options.settings.get("description")
        return str(setting.value) if setting is not None else ""

    @property
    def aliases(self) -> tuple[str, ...]:
        return self.names("aliases")

    @property
    def tags(self) -> tuple[str, ...]:
        return self.names("tags")

    def names(self, key: str) -> tuple[str, ...]:
        """The entry's own list under `key`, empty when it has none."""
        setting = self.options.settings.get(key)
        return setting.value if setting is not None and isinstance(setting.value, tuple) else ()


@dataclass(frozen=True, slots=True)
class DeclaredCluster:
    """One cluster as the file has it: the values, and where each stands.

    `marks` maps a path below the cluster (`("nodes", "0", "ip")`) to the marks of its key and its value. `env` and
    `node_env` keep empty values as None.
    """

    name: str
    mark: Mark
    cluster: Cluster
    env: Mapping[str, Setting] = field(default_factory=_nothing)
    node_env: Mapping[str, Mapping[str, Setting]] = field(default_factory=_nothing)
    marks: Mapping[tuple[str, ...], tuple[Mark, Mark]] = field(default_factory=lambda: MappingProxyType({}))

    def find(self, *path: str, is_key: bool = False) -> Mark:
        """Return the position of a value (or of its key), or of what is nearest above it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.marks:
                key, value = self.marks[path[:length]]
                return key if is_key or length < len(path) else value
        return self.mark


@dataclass(frozen=True, slots=True)
class Registry:
    """A registry file without errors but for entries that find no place on their cluster: who names one is told.

    `issues` are those, warnings and notes; `source` is its path as one typed it.
    """

    path: Path
    source: str
    defaults: Options
    models: Mapping[str, ModelEntry]
    issues: tuple[Issue, ...] = ()
    profiles: Mapping[str, Options] = field(default_factory=_nothing)
    clusters: Mapping[str, DeclaredCluster] = field(default_factory=_nothing)


@dataclass(frozen=True, slots=True)
class ResolvedValue:
    """One value with its origin, and the origins that it hides, lowest first."""

    key: str
    value: Value
    origin: Origin
    shadowed: tuple[ResolvedValue, ...] = ()


@dataclass(frozen=True, slots=True)
class ResolvedEntry:
    """One model, every key of the schema present with its origin. Frozen.

    `values` maps canonical dashed keys (`max-num-seqs`, `ready.timeout`) to values; `env` maps variable names, to None
    for one that the engine must not see. `platform` is None when nobody said what the nodes are.
    The typed getters raise KeyError for a key that the schema lacks and TypeError for the wrong type: both our bugs.
    """

    name: str
    registry: Path
    values: Mapping[str, ResolvedValue]
    env: Mapping[str, ResolvedValue]
    issues: tuple[Issue, ...] = ()
    profiles: tuple[str, ...] = ()
    platform: str | None = None

    @property
    def cluster_name(self) -> str | None:
        """The cluster to run on; None for this host alone."""
        name = self.text_or_none("cluster")
        return None if name == NO_CLUSTER else name

    def __getitem__(self, key: str) -> Value:
        return self.values[key].value

    def is_set(self, key: str) -> bool:
        """Say whether somebody set `key`; a built-in value and a platform's preset are nobody's."""
        return self.values[key].origin.layer not in (Layer.BUILT_IN, Layer.PLATFORM)

    def origin(self, key: str) -> Origin:
        return self.values[key].origin

    @property
    def model(self) -> str:
        return self.text("model")

    def text(self, key: str) -> str:
        """Return a text; the key must have a default or be required."""
        return self._typed(key, str)

    def text_or_none(self, key: str) -> str | None:
        return None if self[key] is None else self.text(key)

    def integer(self, key: str) -> int:
        """Return a whole number (bytes for a size)."""
        return self._typed(key, int)

    def integer_or_none(self, key: str) -> int | None:
        """Return a whole number; None when unset or `auto`: the model or the engine decides."""
        return None if self[key] is None or self[key] == AUTO else self.integer(key)

    def number(self, key: str) -> float:
        """Return a number (seconds for a duration)."""
        value = self[key]
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else self._typed(key, float)

    def number_or_none(self, key: str) -> float | None:
        return None if self[key] is None else self.number(key)

    def flag(self, key: str) -> bool:
        return self._typed(key, bool)

    def flag_or_none(self, key: str) -> bool | None:
        return None if self[key] is None else self.flag(key)

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts, empty when unset."""
        return () if self[key] is None else self._typed(key, tuple)

    def secret(self, key: str) -> SecretRef | None:
        return None if self[key] is None else self._typed(key, SecretRef)

    def _typed(self, key: str, kind: type[_T]) -> _T:
        value = self[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise TypeError(f"{key} is {type(value).__name__}, not {kind.__name__}")
        return value
