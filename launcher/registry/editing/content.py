"""What a registry's text holds, as plain values: the proof of an edit is that only one of them differs.

Pure. Knows: keys in their canonical form, aliases resolved. Refuses to know: positions, what a value means.
"""

from __future__ import annotations

from typing import Any

from launcher.registry.document import Mapping, Scalar, read_tree
from launcher.registry.walking import walk

Path = tuple[str | int, ...]
"""Keys of mappings and indices of lists, from the root."""


def content_of(text: str, source: str = "") -> Any:
    """Return the walked content of a text: leaves as their source text, None for an empty one."""
    root = read_tree(text, source)
    return _plain(walk(root, source).data) if isinstance(root, Mapping) else {}


def _plain(node: Any) -> Any:
    if isinstance(node, Scalar):
        return None if node.is_null else node.text
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    return [_plain(item) for item in node] if isinstance(node, list) else node


def value_at(data: Any, path: Path) -> Any:
    """Return what stands at a path; None where nothing does."""
    for part in path:
        if isinstance(data, dict):
            data = data.get(part)
        else:
            data = data[part] if isinstance(data, list) and isinstance(part, int) else None
    return data


def text_at(data: Any, path: Path) -> str | None:
    """Return a leaf as a person would write it; None where no leaf stands."""
    node = value_at(data, path)
    if isinstance(node, list):
        return "[" + ", ".join(str(item) for item in node) + "]"
    return node if isinstance(node, str) else None


def with_value(data: Any, path: Path, value: Any) -> Any:
    """Copy the content with one value changed; what is missing on the way to it becomes a mapping."""
    if not path:
        return value
    part, rest = path[0], path[1:]
    if isinstance(data, list) and isinstance(part, int):
        return [with_value(item, rest, value) if index == part else item for index, item in enumerate(data)]
    below = data if isinstance(data, dict) else {}
    return {**below, part: with_value(below.get(part), rest, value)}
