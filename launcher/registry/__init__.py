"""The registry: strict YAML with marks -> schema -> resolved entry with provenance.

Pure functions of (text, environment, overrides); the only effect is reading the one registry file. Typical use:

    path = find_registry(explicit=None, environ=os.environ, cwd=Path.cwd())
    registry = load_registry(path)                       # RegistryInvalid holds every error of the file
    entry = resolve(registry, "gpt-oss-20b", os.environ, ["max-num-seqs=8"])
    entry.integer("max-num-seqs")                        # 8
    str(entry.origin("max-num-seqs"))                    # "flag (--set max-num-seqs=8)"
    entry.integer_or_none("max-model-len")               # None: the model's own limit
    entry.secret("api-key")                              # SecretRef or None; .reveal(os.environ) reads it
    entry.env["NCCL_DEBUG"].value                        # variables for the child, each with its origin
    redacted("HF_TOKEN", value)                          # how a variable's value may be shown
    resolve_cluster(registry, entry.cluster_name, os.environ, entry).head.ip    # where cluster_name is not None

Values are bool, int (tokens, bytes), float (seconds, fractions), str, tuple of str, SecretRef, or None where the
engine or the model decides. `entry.values` has every key of the schema (`launcher.registry.keys.KEYS`).
Errors are those of `launcher.errors`: RegistryNotFound, RegistryInvalid, UnknownName, OverrideError; BadValue
comes only from the `parse_*` functions and `SecretRef`.
"""

from __future__ import annotations

from launcher.errors import (
    Issue,
    OverrideError,
    RegistryError,
    RegistryInvalid,
    RegistryNotFound,
    UnknownModel,
    UnknownName,
)
from launcher.registry.cluster import Cluster, Container, Fabric, Node, RaySettings
from launcher.registry.clusters import resolve_cluster
from launcher.registry.loading import check_registry, load_registry, parse_registry
from launcher.registry.locate import find_registry
from launcher.registry.resolving import find_model, resolve
from launcher.registry.types import (
    DeclaredCluster,
    Layer,
    ModelEntry,
    Options,
    Origin,
    Registry,
    ResolvedEntry,
    ResolvedValue,
    Setting,
    Value,
)
from launcher.registry.values import (
    AUTO,
    BadValue,
    SecretRef,
    format_duration,
    format_size,
    holds_secret,
    is_secret_name,
    parse_count,
    parse_duration,
    parse_size,
    redacted,
)

__all__ = [
    "AUTO",
    "BadValue",
    "Cluster",
    "Container",
    "DeclaredCluster",
    "Fabric",
    "Issue",
    "Layer",
    "ModelEntry",
    "Node",
    "Options",
    "Origin",
    "OverrideError",
    "RaySettings",
    "Registry",
    "RegistryError",
    "RegistryInvalid",
    "RegistryNotFound",
    "ResolvedEntry",
    "ResolvedValue",
    "SecretRef",
    "Setting",
    "UnknownModel",
    "UnknownName",
    "Value",
    "check_registry",
    "find_model",
    "find_registry",
    "format_duration",
    "format_size",
    "holds_secret",
    "is_secret_name",
    "load_registry",
    "parse_count",
    "parse_duration",
    "parse_registry",
    "parse_size",
    "redacted",
    "resolve",
    "resolve_cluster",
]
