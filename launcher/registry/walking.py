"""Nodes -> plain mappings of canonical keys, with a mark for every path.

Knows: where a registry holds keys, names or variables; duplicate keys, two spellings of one key, merge keys,
unknown keys. Refuses to know: the type of any value; leaves stay `Scalar`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, TypeAlias

from launcher.errors import Issue
from launcher.registry.document import Mapping, Node, Scalar, Sequence
from launcher.registry.keys import DASHED, GROUPS, KEYS, MODEL_ONLY, canonical_key
from launcher.registry.schema import NAME_PATTERN
from launcher.registry.suggest import did_you_mean
from launcher.registry.types import Mark
from launcher.registry.values import BadValue, show_text

Path: TypeAlias = tuple[str, ...]

_ROOT_KEYS = ("version", "defaults", "models")


class _Level(Enum):
    """What the keys of a mapping are."""

    ROOT = auto()
    MODELS = auto()
    MODEL = auto()
    DEFAULTS = auto()
    GROUP = auto()
    FREE = auto()


@dataclass(slots=True)
class Tree:
    """The walked document: `data` for the schema, `marks` for its messages, `issues` found on the way."""

    data: dict[str, Any] = field(default_factory=dict)
    marks: dict[Path, tuple[Mark, Mark]] = field(default_factory=dict)
    issues: list[Issue] = field(default_factory=list)

    def find(self, path: Path, *, is_key: bool = False) -> Mark:
        """Return the position of a path, or of the nearest one above it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.marks:
                key, value = self.marks[path[:length]]
                return key if is_key or length < len(path) else value
        return Mark(1, 1)

    def value(self, path: Path) -> Any:
        """Return what stands at a path; None when nothing does."""
        node: Any = self.data
        for part in path:
            if isinstance(node, dict):
                node = node.get(part)
            elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            else:
                return None
        return node


def dotted(path: Path) -> str:
    return ".".join(path)


def walk(root: Mapping, source: str) -> Tree:
    """Walk a document's root mapping. Pure; what is wrong is in the tree's issues."""
    walker = _Walker(source)
    walker.tree.marks[()] = (root.mark, root.mark)
    walker.tree.data = walker.mapping(root, (), _Level.ROOT)
    return walker.tree


class _Walker:
    def __init__(self, source: str) -> None:
        self.source = source
        self.tree = Tree()

    def mapping(self, node: Mapping, path: Path, level: _Level) -> dict[str, Any]:
        built: dict[str, Any] = {}
        for key, scalar, value in self._own_and_merged(node, path, level):
            here = (*path, key)
            self.tree.marks[here] = (scalar.mark, value.mark)
            is_empty = isinstance(value, Scalar) and value.is_null
            if is_empty and level is _Level.MODELS:
                built[key] = {}
            elif is_empty and level is _Level.FREE:
                built[key] = None
            elif not is_empty:
                built[key] = self._value(value, here, _below(level, key))
        return built

    def _value(self, node: Node, path: Path, level: _Level) -> Any:
        if isinstance(node, Mapping):
            return self.mapping(node, path, level)
        if isinstance(node, Sequence):
            items = []
            for index, item in enumerate(node.items):
                here = (*path, str(index))
                self.tree.marks[here] = (item.mark, item.mark)
                items.append(self._value(item, here, _Level.FREE))
            return items
        return node

    def _own_and_merged(self, node: Mapping, path: Path, level: _Level) -> list[tuple[str, Scalar, Node]]:
        """The mapping's pairs, checked; then what `<<` adds, where the mapping itself is silent."""
        pairs: dict[str, tuple[str, Scalar, Node]] = {}
        merges: list[Node] = []
        for key_node, value in node.pairs:
            if isinstance(key_node, Scalar) and key_node.text == "<<" and key_node.style == "plain":
                merges.append(value)
                continue
            key = self._key(key_node, path, level)
            if key is None or not isinstance(key_node, Scalar):
                continue
            if key in pairs:
                self._duplicate(key, key_node, pairs[key][1], path)
                continue
            pairs[key] = (key, key_node, value)
        for merged in merges:
            for item in merged.items if isinstance(merged, Sequence) else [merged]:
                if not isinstance(item, Mapping):
                    self._report(
                        "bad-merge", item.mark, path, "'<<' takes a mapping or a list of mappings", "use *anchor"
                    )
                    continue
                for key, scalar, value in self._own_and_merged(item, path, level):
                    pairs.setdefault(key, (key, scalar, value))
        return list(pairs.values())

    def _duplicate(self, key: str, node: Scalar, first: Scalar, path: Path) -> None:
        if node.text == first.text:
            message = f"written twice; first at line {first.mark.line}"
            self._report("duplicate-key", node.mark, (*path, key), message, "keep one of the two")
        else:
            message = f"'{first.text}' (line {first.mark.line}) and '{node.text}' are the same key"
            self._report("two-spellings", node.mark, (*path, key), message, f"keep only '{key}'")

    def _key(self, node: Node, path: Path, level: _Level) -> str | None:
        """Return the canonical key, or report it and return None. `x-…` keys are the user's own: skipped."""
        if not isinstance(node, Scalar):
            self._report("bad-key", node.mark, path, "a key must be text", "quote it, or write key: value")
            return None
        text = node.text
        if level is not _Level.FREE and level is not _Level.MODELS and text.startswith("x-"):
            return None
        try:
            node.check()
        except BadValue as error:
            self._report(error.code, node.mark, path, f"key {error.message}", error.hint)
            return None
        match level:
            case _Level.FREE:
                return text
            case _Level.MODELS:
                if re.fullmatch(NAME_PATTERN, text):
                    return text
                self._report(
                    "bad-name",
                    node.mark,
                    path,
                    f"{show_text(text)} cannot name a model",
                    "use up to 128 letters, digits, '.', '_', '-', '/', ':'; start with a letter or digit",
                )
                return None
            case _Level.ROOT:
                return self._known(text, text in _ROOT_KEYS, _ROOT_KEYS, node, path, "; a model stands under models:")
            case _Level.GROUP:
                group = path[-1]
                inner = tuple(key.split(".")[1] for key in KEYS if key.startswith(f"{group}."))
                key = text.replace("_", "-")
                return self._known(key, key in inner, inner, node, path)
        return self._option(text, node, path, level)

    def _option(self, text: str, node: Scalar, path: Path, level: _Level) -> str | None:
        key = text if text in GROUPS else canonical_key(text)
        if key is not None and level is _Level.DEFAULTS and key in MODEL_ONLY:
            self._report(
                "model-only", node.mark, (*path, key), "belongs to one model", "move it into an entry of models"
            )
            return None
        known = [name for name in DASHED if "." not in name] + sorted(GROUPS)
        if level is _Level.DEFAULTS:
            known = [name for name in known if name not in MODEL_ONLY]
        is_known = key is not None and "." not in key
        return self._known(key if key is not None and is_known else text, is_known, known, node, path)

    def _known(
        self, key: str, is_known: bool, known: tuple[str, ...] | list[str], node: Scalar, path: Path, advice: str = ""
    ) -> str | None:
        if is_known:
            return key
        group, dot, inner = key.partition(".")
        if dot and group in GROUPS:
            hint = f"nest it: {group}: {{{inner}: …}}"
        else:
            hint = did_you_mean(key, known) or (
                f"known keys: {', '.join(known)}{advice}"
                if len(known) < 10
                else "`hlaunch schema --keys` lists the known keys"
            )
        shown = key if len(key) <= 60 and key.isprintable() else show_text(key)
        self._report("unknown-key", node.mark, (*path, shown), "not a known option", hint)
        return None

    def _report(self, code: str, mark: Mark, path: Path, message: str, hint: str) -> None:
        self.tree.issues.append(Issue("error", code, self.source, mark.line, mark.column, dotted(path), message, hint))


def _below(level: _Level, key: str) -> _Level:
    """What the mapping under `key` holds."""
    if level is _Level.ROOT:
        return {"models": _Level.MODELS, "defaults": _Level.DEFAULTS}.get(key, _Level.FREE)
    if level is _Level.MODELS:
        return _Level.MODEL
    is_options = level is _Level.MODEL or level is _Level.DEFAULTS
    return _Level.GROUP if is_options and key in GROUPS else _Level.FREE
