"""The one table of registry keys, by concept: name, kind, default, unit, range, aliases, meaning.

The schema, the JSON schema, `--set` typing, `HLAUNCH_<KEY>` names, `show` and the tests of the commented registry
are all made from it; a key that is not here does not exist. Defaults of the engine are read from `engine.config`.
Refuses to know: how values are parsed, merged or used.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from launcher.registry.keys.cluster import CLUSTER_KEYS, NODE_KEYS, PLATFORMS
from launcher.registry.keys.launching import LAUNCHING
from launcher.registry.keys.model import IDENTITY, LIMITS, MEMORY
from launcher.registry.keys.running import RANKS, SERVER
from launcher.registry.keys.spec import KeySpec, KeyTable, Kind, show_value, variable_name

__all__ = [
    "CLUSTER",
    "DASHED",
    "DEFAULTS",
    "ENTRY",
    "ENVIRONMENT",
    "ENVIRONMENT_ALIASES",
    "GROUPS",
    "KEYS",
    "MODEL_ONLY",
    "NODE",
    "OVERRIDES",
    "PLATFORMS",
    "RESERVED_ENVIRONMENT",
    "SPELLINGS",
    "KeySpec",
    "KeyTable",
    "Kind",
    "canonical_key",
    "show_value",
]

MODEL_ONLY = frozenset(
    {"model", "revision", "tokenizer", "served-model-name", "description", "aliases", "tags", "extends"}
)
"""Keys that describe one model, so `defaults` and profiles cannot hold them."""

_PARTS = (IDENTITY, LIMITS, MEMORY, RANKS, SERVER, LAUNCHING)

ENTRY = KeyTable(*_PARTS)
"""What one model may hold, beside `profiles` and `overrides`."""
DEFAULTS = KeyTable(*_PARTS, without=MODEL_ONLY)
"""What `defaults` and each profile may hold."""
OVERRIDES = KeyTable(*_PARTS, without=MODEL_ONLY | {"cluster"})
"""What `overrides.<platform>` may hold: the cluster decides the platform, so it cannot depend on it."""
CLUSTER = KeyTable(CLUSTER_KEYS)
NODE = KeyTable(NODE_KEYS)

KEYS: Mapping[str, KeySpec] = ENTRY.specs
"""Canonical dashed key of a model -> spec."""
SPELLINGS: Mapping[str, str] = ENTRY.spellings
DASHED: Mapping[str, str] = ENTRY.dashed
GROUPS = frozenset(ENTRY.groups)

ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {spec.environment: spec.key for spec in KEYS.values() if not spec.is_fixed and spec.kind is not Kind.VARIABLES}
)
"""`HLAUNCH_<KEY>` -> canonical key."""

ENVIRONMENT_ALIASES: Mapping[str, str] = MappingProxyType(
    {variable_name(name): key for name, key in DASHED.items() if name != key and key in ENVIRONMENT.values()}
)
"""`HLAUNCH_<ALIAS>` -> canonical key: `HLAUNCH_TP`."""

RESERVED_ENVIRONMENT = frozenset(
    f"HLAUNCH_{name}"
    for name in (
        *("REGISTRY", "PROFILE", "NODE_IP", "MODEL_DIR", "STATE_DIR", "UID", "GID"),
        *("COMPOSE", "SSH", "REMOTE_PYTHON", "NODE_SECRET", "NODE_SECRET_FILE"),
    )
) - frozenset(ENVIRONMENT)
"""Variables with the prefix that are not keys."""


def canonical_key(written: str) -> str | None:
    """Turn any accepted spelling into the canonical key of a model; None when there is no such key."""
    return SPELLINGS.get(written)
