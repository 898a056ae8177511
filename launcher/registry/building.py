"""A validated document -> the registry's values, each with the mark of its text.

Knows: how the pydantic models of `launcher.registry.schema` read out, how entries extend each other, what a cluster's
block becomes. Refuses to know: rules between keys, YAML.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from launcher.registry.cluster import RDMA_FIELDS, Cluster, Container, Fabric, Node, RaySettings
from launcher.registry.keys import CLUSTER
from launcher.registry.references import MAX_BASES
from launcher.registry.types import DeclaredCluster, Mark, ModelEntry, Options, Registry, Setting
from launcher.registry.walking import Path as KeyPath
from launcher.registry.walking import Tree

_FABRIC_FIELDS = {"tc": "traffic_class", "sl": "service_level"}
_RAY_FIELDS = {"object-store-memory": "object_store_bytes"}
_CONTAINER_FIELDS = {"shm-size": "shm_bytes"}
_NODE_FIELDS = {"gpu-memory": "gpu_memory_bytes", "memory": "memory_bytes"}
_STRUCTURE = frozenset({"profiles", "overrides"})


def build(document: Any, tree: Tree, path: Path, source: str) -> Registry:
    """Build a registry without issues from a validated document. Bases that do not exist are left out."""
    models = {
        name: ModelEntry(
            name,
            tree.find(("models", name), is_key=True),
            _options(block, ("models", name), tree),
            _several(block.profiles_, ("models", name, "profiles"), tree),
            _several(block.overrides_, ("models", name, "overrides"), tree),
        )
        for name, block in document.models_.items()
    }
    known = {alias: entry for entry in models.values() for alias in entry.aliases} | models
    linked = {
        name: replace(entry, bases=_bases(entry, known)) if entry.names("extends") else entry
        for name, entry in models.items()
    }
    marks = _marks_by_cluster(tree)
    clusters = {
        name: _declared(name, block, tree, marks.get(name, {})) for name, block in (document.clusters_ or {}).items()
    }
    return Registry(
        path,
        source,
        _options(document.defaults_, ("defaults",), tree),
        MappingProxyType(linked),
        profiles=_several(document.profiles_, ("profiles",), tree),
        clusters=MappingProxyType(clusters),
    )


def _bases(entry: ModelEntry, known: Mapping[str, ModelEntry]) -> tuple[ModelEntry, ...]:
    """All generations of bases, lowest first, each once: a shared base stays below everything that extends it."""
    found: dict[str, ModelEntry] = {}
    # (name, whether its own bases are done): a loop, since a chain may be as long as the file.
    stack = [(name, False) for name in reversed(entry.names("extends"))]
    on_the_way = {entry.name}
    while stack:
        name, is_done = stack.pop()
        base = known.get(name)
        if base is None or base.name in found or len(on_the_way) > MAX_BASES:
            continue
        if is_done:
            found[base.name] = base
        elif base.name not in on_the_way:
            on_the_way.add(base.name)
            stack.append((name, True))
            stack += [(below, False) for below in reversed(base.names("extends"))]
    return tuple(found.values())


def _several(blocks: Any, path: KeyPath, tree: Tree) -> Mapping[str, Options]:
    return MappingProxyType({name: _options(block, (*path, name), tree) for name, block in (blocks or {}).items()})


def _options(block: BaseModel | None, path: KeyPath, tree: Tree) -> Options:
    if block is None:
        return Options()
    settings: dict[str, Setting] = {}
    env: Mapping[str, Setting] = {}
    for key, value in _fields(block):
        if key in _STRUCTURE:
            continue
        if key == "env" and isinstance(value, dict):
            env = _variables(value, (*path, key), tree)
        elif isinstance(value, BaseModel):
            for inner, leaf in _fields(value):
                settings[f"{key}.{inner}"] = Setting(_frozen(leaf), tree.find((*path, key, inner)))
        else:
            settings[key] = Setting(_frozen(value), tree.find((*path, key)))
    return Options(MappingProxyType(settings), MappingProxyType(env))


def _variables(block: Mapping[str, str | None] | None, path: KeyPath, tree: Tree) -> dict[str, Setting]:
    return {name: Setting(value, tree.find((*path, name))) for name, value in (block or {}).items()}


Marks = dict[KeyPath, tuple[Mark, Mark]]


def _marks_by_cluster(tree: Tree) -> dict[str, Marks]:
    found: dict[str, Marks] = {}
    for path, marks in tree.marks.items():
        if len(path) > 2 and path[0] == "clusters":
            found.setdefault(path[1], {})[path[2:]] = marks
    return found


def _declared(name: str, block: Any, tree: Tree, marks: Marks) -> DeclaredCluster:
    path = ("clusters", name)
    env = _variables(block.env_, (*path, "env"), tree)
    node_env = {
        node.name_: _variables(node.env_, (*path, "nodes", str(index), "env"), tree)
        for index, node in enumerate(block.nodes_)
    }
    cluster = Cluster(
        name,
        tuple(_node(node) for node in block.nodes_),
        platform=block.platform_ or str(CLUSTER.specs["platform"].default),
        fabric=_fabric(block),
        ray=None if block.ray_ is None else _made(RaySettings, block.ray_, _RAY_FIELDS),
        container=_made(Container, block.container_, _CONTAINER_FIELDS),
        env=_texts(block.env_),
    )
    return DeclaredCluster(
        name,
        tree.find(path, is_key=True),
        cluster,
        MappingProxyType(env),
        MappingProxyType(node_env),
        MappingProxyType(marks),
    )


def _fabric(block: Any) -> Fabric:
    """Make the fabric; one that says how RDMA is done wants it, unless it says otherwise."""
    fabric: Fabric = _made(Fabric, block.fabric_, _FABRIC_FIELDS, hcas=_hcas)
    written = dict(_fields(block.fabric_)) if block.fabric_ is not None else {}
    is_meant = any(written.get(key) not in (None, "auto") for key in RDMA_FIELDS)
    is_meant = is_meant or any(node.hcas_ or node.gid_index_ is not None for node in block.nodes_)
    return replace(fabric, rdma="preferred") if is_meant and written.get("rdma") is None else fabric


def _node(block: Any) -> Node:
    node: Node = _made(Node, block, _NODE_FIELDS, hcas=_hcas, env=_texts, role="worker")
    return node


def _made(kind: Callable[..., Any], block: BaseModel | None, names: Mapping[str, str], **special: Any) -> Any:
    """Make a dataclass from the keys that were written. `special`: a function of the value, or a default."""
    values = {key: value for key, value in special.items() if not callable(value)}
    for key, value in _fields(block) if block is not None else ():
        if value is not None:
            field = names.get(key, key.replace("-", "_"))
            convert = special.get(field)
            values[field] = convert(value) if callable(convert) else _frozen(value)
    return kind(**values)


def _hcas(value: list[str]) -> tuple[str, ...]:
    return () if value == ["auto"] else tuple(value)


def _texts(block: Mapping[str, str | None] | None) -> Mapping[str, str]:
    return MappingProxyType({name: value for name, value in (block or {}).items() if value is not None})


def _fields(block: BaseModel) -> Iterator[tuple[str, Any]]:
    """The keys that were written, by their canonical names, in the table's order."""
    order = _order(type(block))
    for name in sorted(block.model_fields_set, key=order.__getitem__):
        yield order[name][1], getattr(block, name)


@cache
def _order(model: type[BaseModel]) -> dict[str, tuple[int, str]]:
    """Attribute -> its place in the table, and the key."""
    return {name: (index, info.alias or name) for index, (name, info) in enumerate(model.model_fields.items())}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
