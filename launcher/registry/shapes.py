"""The shape of a whole registry: which mapping holds which keys, and what stands below each.

Knows: the tables of `launcher.registry.keys` and how they nest. Refuses to know: YAML, types, messages. The walker and
the pydantic models follow this one description, so a block that is added here is read, checked and documented.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeAlias

from launcher.registry.keys import CLUSTER, DEFAULTS, ENTRY, MODEL_ONLY, NODE, OVERRIDES, PLATFORMS
from launcher.registry.keys.spec import KeySpec, KeyTable, Kind

NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._:/+-]{0,127}$"
NAME_RULE = "use up to 128 letters, digits, '.', '_', '-', '/', ':', '+'; start with a letter, digit or '_'"
VARIABLE_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"
VERSION = 1
MAX_NODES = 1024


@dataclass(frozen=True, slots=True)
class Variables:
    """Names of environment variables -> texts."""


@dataclass(frozen=True, slots=True)
class Names:
    """Names that the user chooses -> a mapping of keys each; with `choices`, only these names."""

    noun: str
    item: Keys
    choices: tuple[str, ...] = ()
    is_required: bool = False


@dataclass(frozen=True, slots=True)
class Items:
    """A list of mappings of keys."""

    item: Keys
    is_required: bool = False


class Keys:
    """A mapping of known keys. `below` gives what stands under a key that is no single value.

    `elsewhere` maps keys that people write here by mistake to the advice; `takes_flags`: options of vLLM are known.
    """

    def __init__(
        self,
        title: str,
        summary: str,
        table: KeyTable,
        structure: Mapping[str, Names | Items | Keys] | None = None,
        *,
        elsewhere: Mapping[str, str] | None = None,
        takes_flags: bool = False,
        optional: frozenset[str] = frozenset(),
    ) -> None:
        self.title = title
        self.summary = summary
        self.elsewhere = MappingProxyType(dict(elsewhere or {}))
        self.takes_flags = takes_flags
        self.optional = optional
        below: dict[str, Shape] = dict(structure or {})
        for group in table.groups:
            inner = tuple(
                replace(spec, key=spec.key.partition(".")[2])
                for spec in table.specs.values()
                if spec.key.startswith(f"{group}.")
            )
            below[group] = Keys(title + group.title(), "", KeyTable(inner))
        for spec in table.specs.values():
            if spec.kind is Kind.VARIABLES:
                below[spec.key] = Variables()
        self.table = table
        self.below: Mapping[str, Shape] = MappingProxyType(below)

    def canonical(self, written: str) -> str | None:
        """Turn any accepted spelling into the key; None when there is no such key here."""
        if written in self.below:
            return written
        key = self.table.spellings.get(written)
        return key if key is not None and "." not in key else None

    @property
    def proposals(self) -> tuple[str, ...]:
        """Every spelling worth proposing."""
        plain = [name for name in self.table.dashed if "." not in name]
        return (*plain, *(name for name in self.below if name not in plain))


Shape: TypeAlias = Keys | Names | Items | Variables

_ENTRY_HINT = "move it into an entry of models"
_OF_ONE_MODEL = dict.fromkeys((*MODEL_ONLY, "profiles", "overrides"), _ENTRY_HINT)


def _options(title: str, summary: str, table: KeyTable, **elsewhere: str) -> Keys:
    return Keys(title, summary, table, elsewhere={**_OF_ONE_MODEL, **elsewhere}, takes_flags=True)


_PROFILE = _options("Profile", "Settings that `--profile` puts over a model's own.", DEFAULTS)
_OVERRIDES = _options(
    "Overrides",
    "Settings of a model on one platform.",
    OVERRIDES,
    cluster="the cluster decides the platform: set cluster in the entry or in a profile",
)
MODEL = Keys(
    "Model",
    "One model: what to serve and how.",
    ENTRY,
    {"profiles": Names("profile", _PROFILE), "overrides": Names("platform", _OVERRIDES, choices=PLATFORMS)},
    takes_flags=True,
    # `extends` may bring it; loading asks for it where nothing does.
    optional=frozenset({"model"}),
)
_NODE = Keys("Node", "One host of a cluster.", NODE)
_CLUSTER = Keys("Cluster", "Hosts that serve one model together.", CLUSTER, {"nodes": Items(_NODE, is_required=True)})

DOCUMENT = Keys(
    "Registry",
    "hlaunch's model registry.",
    KeyTable((KeySpec("version", Kind.INTEGER, "Format of this file", default=VERSION, values=(VERSION,)),)),
    {
        "defaults": _options("Defaults", "Settings of every model, unless the model sets them itself.", DEFAULTS),
        "profiles": Names("profile", _PROFILE),
        "clusters": Names("cluster", _CLUSTER),
        "models": Names("model", MODEL, is_required=True),
    },
)
"""A whole registry file."""
