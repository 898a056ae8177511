"""Nodes -> plain mappings of canonical keys, with a mark for every path.

Knows: where a registry holds keys, names or variables (`launcher.registry.shapes`); duplicate keys, two spellings of
one key, merge keys, unknown keys, options of vLLM. Refuses to know: the type of any value; leaves stay `Scalar`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from launcher.errors import Issue, Severity
from launcher.registry.document import Mapping, Node, Scalar, Sequence
from launcher.registry.flags import Flag, find_flag, find_negated, flags
from launcher.registry.reserved import refusal
from launcher.registry.shapes import DOCUMENT, MODEL, NAME_PATTERN, NAME_RULE, Items, Keys, Names, Shape, Variables
from launcher.registry.suggest import Suggester
from launcher.registry.types import Mark
from launcher.registry.values import BadValue, show_text

Path: TypeAlias = tuple[str, ...]


MAX_ISSUES = 1000
"""A file with more problems than this is reported up to here: it is no registry with mistakes, but something else."""


_LEAVE_IT = "remove it, or leave it for vLLM"


class _Enough(Exception):
    """The walk has found `MAX_ISSUES` problems."""


@dataclass(slots=True)
class Tree:
    """The walked document: `data` for the schema, `marks` for its messages, `issues` found on the way.

    `is_cut`: the walk stopped at `MAX_ISSUES`, and `data` is nothing.
    """

    data: dict[str, Any] = field(default_factory=dict)
    marks: dict[Path, tuple[Mark, Mark]] = field(default_factory=dict)
    issues: list[Issue] = field(default_factory=list)
    is_cut: bool = False

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
    """Resolve spellings and merge keys of a document, and mark every path. Pure; problems go to `Tree.issues`."""
    walker = _Walker(source)
    try:
        walker.tree.data = walker.mapping(root, (), DOCUMENT)
    except _Enough:
        walker.tree.is_cut = True
    return walker.tree


class _Walker:
    def __init__(self, source: str) -> None:
        self.source = source
        self.did_you_mean = Suggester()
        self.tree = Tree()

    def mapping(self, node: Mapping, path: Path, shape: Shape | None) -> dict[str, Any]:
        """Walk one mapping. Without a shape, or with one of another form, its keys are anything: the schema objects."""
        built: dict[str, Any] = {}
        for key, scalar, value in self._own_and_merged(node, path, shape):
            here = (*path, key)
            self.tree.marks[here] = (scalar.mark, value.mark)
            is_empty = isinstance(value, Scalar) and value.is_null
            if not is_empty:
                built[key] = self._value(value, here, _below(shape, key))
            elif isinstance(shape, Names):
                built[key] = {}
            elif not isinstance(shape, Keys):
                built[key] = None
        return built

    def _value(self, node: Node, path: Path, shape: Shape | None) -> Any:
        if isinstance(node, Mapping):
            return self.mapping(node, path, shape)
        if isinstance(node, Sequence):
            items = []
            for index, item in enumerate(node.items):
                here = (*path, str(index))
                self.tree.marks[here] = (item.mark, item.mark)
                items.append(self._value(item, here, shape.item if isinstance(shape, Items) else None))
            return items
        return node

    def _own_and_merged(self, node: Mapping, path: Path, shape: Shape | None) -> list[tuple[str, Scalar, Node]]:
        """The mapping's pairs, checked; then what `<<` adds, where the mapping itself is silent."""
        pairs: dict[str, tuple[str, Scalar, Node]] = {}
        merges: list[Node] = []
        for key_node, value in node.pairs:
            if isinstance(key_node, Scalar) and key_node.text == "<<" and key_node.style == "plain":
                merges.append(value)
                continue
            key = self._key(key_node, path, shape, value)
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
                for key, scalar, value in self._own_and_merged(item, path, shape):
                    pairs.setdefault(key, (key, scalar, value))
        return list(pairs.values())

    def _duplicate(self, key: str, node: Scalar, first: Scalar, path: Path) -> None:
        if node.text == first.text:
            message = f"written twice; first at line {first.mark.line}"
            self._report("duplicate-key", node.mark, (*path, key), message, "keep one of the two")
        else:
            message = f"'{first.text}' (line {first.mark.line}) and '{node.text}' are the same key"
            self._report("two-spellings", node.mark, (*path, key), message, f"keep only '{key}'")

    def _key(self, node: Node, path: Path, shape: Shape | None, value: Node) -> str | None:
        """Return the canonical key, or report it and return None. `x-…` keys are the user's own: skipped."""
        if not isinstance(node, Scalar):
            self._report("bad-key", node.mark, path, "a key must be text", "quote it, or write key: value")
            return None
        text = node.text
        if isinstance(shape, Keys) and text.startswith("x-"):
            return None
        try:
            node.check()
        except BadValue as error:
            self._report(error.code, node.mark, path, f"key {error.message}", error.hint)
            return None
        if isinstance(shape, Names):
            return self._name(text, shape, node, path)
        if isinstance(shape, Variables) and (refused := refusal(text)) is not None and not _removes(value):
            self._report("reserved-variable", node.mark, (*path, text), *refused)
            return None
        return self._known(text, shape, node, path, value) if isinstance(shape, Keys) else text

    def _name(self, text: str, shape: Names, node: Scalar, path: Path) -> str | None:
        if shape.choices and text not in shape.choices:
            hint = self.did_you_mean(text, shape.choices) or f"known names: {', '.join(shape.choices)}"
            self._report("unknown-key", node.mark, (*path, _shown(text)), f"not a known {shape.noun}", hint)
            return None
        if re.fullmatch(NAME_PATTERN, text):
            return text
        self._report(
            "bad-name",
            node.mark,
            path,
            f"{show_text(text)} cannot name a {shape.noun}",
            NAME_RULE,
        )
        return None

    def _known(self, text: str, shape: Keys, node: Scalar, path: Path, value: Node) -> str | None:
        key = shape.canonical(text)
        if key is not None:
            return key
        belongs = MODEL.canonical(text)
        if belongs is not None and belongs in shape.elsewhere:
            message = "cannot stand here" if belongs == "cluster" else "belongs to one model"
            self._report("model-only", node.mark, (*path, belongs), message, shape.elsewhere[belongs])
            return None
        if shape.takes_flags and (flag := find_flag(text)) is not None and flag.status != "native":
            self._flag(flag, node, path, value)
            return None
        known = shape.proposals
        if shape.takes_flags:
            if (negated := find_negated(text)) is not None:
                hint = f"write {negated.name}: false" if negated.status == "native" else "remove it"
                self._report("unknown-key", node.mark, (*path, _shown(text)), "an option is not negated here", hint)
                return None
            known = tuple(dict.fromkeys((*known, *flags())))
        group, dot, inner = text.replace("_", "-").partition(".")
        if dot and group in shape.below:
            hint = f"nest it: {group}: {{{inner}: …}}"
        else:
            advice = "; a model stands under models:" if shape is DOCUMENT else ""
            hint = self.did_you_mean(text, known) or (
                f"known keys: {', '.join(known)}{advice}"
                if len(known) < 12
                else "`hlaunch schema --keys` lists the known keys"
            )
        self._report("unknown-key", node.mark, (*path, _shown(text)), "not a known option", hint)
        return None

    def _flag(self, flag: Flag, node: Scalar, path: Path, value: Node) -> None:
        """Judge an option of vLLM that is no key of ours."""
        code, message = flag.verdict(value.text if isinstance(value, Scalar) else None)
        here, mark = (*path, flag.name), node.mark
        if code == "accepted-flag":
            self._report(code, mark, here, message, _LEAVE_IT, "info")
        else:
            self._report(code, mark, here, message, "remove it")

    def _report(self, code: str, mark: Mark, path: Path, message: str, hint: str, severity: Severity = "error") -> None:
        if len(self.tree.issues) >= MAX_ISSUES:
            raise _Enough
        self.tree.issues.append(Issue(severity, code, self.source, mark.line, mark.column, dotted(path), message, hint))


def _below(shape: Shape | None, key: str) -> Shape | None:
    """What the value of `key` holds."""
    if isinstance(shape, Names):
        return shape.item
    return shape.below.get(key) if isinstance(shape, Keys) else None


def _removes(value: Node) -> bool:
    """Whether a variable has no value here: it is taken away, not set."""
    return isinstance(value, Scalar) and value.is_null


def _shown(key: str) -> str:
    return key if len(key) <= 60 and key.isprintable() else show_text(key)
