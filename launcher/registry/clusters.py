"""The cluster that a launch runs on: what the file declares, with what the entry says about the container.

Knows: how an entry's `container` goes over the cluster's. Refuses to know: hosts, ports in use, YAML. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from launcher.errors import OverrideError
from launcher.registry.cluster import Cluster
from launcher.registry.overriding import environment_layer
from launcher.registry.resolving import find_cluster
from launcher.registry.types import Registry, ResolvedEntry, Value

_CONTAINER = {
    "container.image": "image",
    "container.ipc": "ipc",
    "container.shm-size": "shm_bytes",
    "container.gpu-mode": "gpu_mode",
}


def resolve_cluster(
    registry: Registry, name: str, environ: Mapping[str, str] | None = None, entry: ResolvedEntry | None = None
) -> Cluster:
    """Return a declared cluster, with `container` values of the entry, or else of `HLAUNCH_CONTAINER_*`, over its own.

    Raises: UnknownName; OverrideError for a variable that does not fit.
    """
    cluster = find_cluster(registry, name).cluster
    changes = _from_entry(entry) if entry is not None else _from_environment(environ or {})
    made: dict[str, Any] = {_CONTAINER[key]: value for key, value in changes.items()}
    return replace(cluster, container=replace(cluster.container, **made)) if made else cluster


def _from_entry(entry: ResolvedEntry) -> dict[str, Value]:
    return {key: entry[key] for key in _CONTAINER if entry[key] is not None}


def _from_environment(environ: Mapping[str, str]) -> dict[str, Value]:
    layer, issues = environment_layer({key: text for key, text in environ.items() if "_CONTAINER_" in key})
    errors = [issue for issue in issues if issue.severity == "error"]
    if errors:
        raise OverrideError("the settings have an error", issues=errors)
    return {key: value for key, (value, _) in layer.settings.items() if key in _CONTAINER}
