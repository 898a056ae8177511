"""One variable of a cluster's or a node's `env`, set in place as `set_value` sets a model's.

Knows: where the two blocks stand. Refuses to know: what a variable means (`launcher.fabric.lint` judges the result).
"""

from __future__ import annotations

import re
from typing import Any

from launcher.errors import Issue, OverrideError
from launcher.registry.editing.edits import Edit, EditRefused, _change, _data, _prove, _value_of
from launcher.registry.editing.spans import Span, read_spans
from launcher.registry.editing.writing import yaml_variable
from launcher.registry.loading import parse_registry
from launcher.registry.resolving import find_cluster, quoted, unknown_name
from launcher.registry.values import BadValue


def set_variable(text: str, source: str, cluster: str, node: str | None, name: str, value: str) -> Edit:
    """Set `clusters.<cluster>.env.<name>`, or that of one node.

    Raises: RegistryInvalid when the text was not, or would no longer be, a registry; UnknownName for a cluster or node;
    OverrideError for a name or value that no environment holds; EditRefused.
    """
    find_cluster(parse_registry(text, source), cluster)
    written = _written(name, value)
    block = _value_of(_value_of(read_spans(text), "clusters"), cluster)
    if block is None or block.kind != "mapping":
        raise EditRefused(f"cluster {cluster} is written by reference", hint="edit the file where its text stands")
    data = _data(text, source)
    place: tuple[str | int, ...] = ("clusters", cluster)
    if node is not None:
        index, block = _node(block, cluster, node)
        place = (*place, "nodes", index)
    start, end, new = _change(text, block, ("env", name), written)
    edited = text[:start] + new + text[end:]
    before = _at(data, (*place, "env", name))
    leaf = _data(f"models: {{m: {{env: {{{name}: {written}}}}}}}")["models"]["m"]["env"][name]
    _prove(edited, source, _set(data, (*place, "env", name), leaf))
    line = edited.count("\n", 0, start + len(new) - len(new.lstrip())) + 1
    return Edit(edited, f"{cluster}/{node}" if node is not None else cluster, line, f"env.{name}", before, written)


def _written(name: str, value: str) -> str:
    try:
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII) is None:
            raise BadValue("bad-name", f"{quoted(name)} cannot name a variable", "write NAME=value")
        return yaml_variable(value)
    except BadValue as error:
        where = f"{name}=" if name.isprintable() and len(name) <= 60 else "NAME=VALUE"
        issue = Issue("error", error.code, where, None, None, "", error.message, error.hint)
        raise OverrideError("the value was not accepted", issues=[issue]) from error


def _node(cluster: Span, name: str, node: str) -> tuple[int, Span]:
    nodes = _value_of(cluster, "nodes")
    items = nodes.items if nodes is not None else []
    names = [(_value_of(item, "name") or item).text for item in items]
    if node not in names:
        raise unknown_name("node", node, names, f"cluster '{name}'")
    index = names.index(node)
    if items[index].kind != "mapping":
        raise EditRefused(f"node {node} is written by reference", hint="edit the file where its text stands")
    return index, items[index]


def _at(data: Any, path: tuple[str | int, ...]) -> str | None:
    for part in path:
        if isinstance(data, dict):
            data = data.get(part)
        else:
            data = data[part] if isinstance(data, list) and isinstance(part, int) else None
    return data if isinstance(data, str) else None


def _set(data: Any, path: tuple[str | int, ...], leaf: Any) -> Any:
    """Copy the content with one leaf changed; what is missing on the way to it becomes a mapping."""
    if not path:
        return leaf
    part, rest = path[0], path[1:]
    if isinstance(data, list) and isinstance(part, int):
        return [_set(item, rest, leaf) if index == part else item for index, item in enumerate(data)]
    below = data if isinstance(data, dict) else {}
    return {**below, part: _set(below.get(part), rest, leaf)}
