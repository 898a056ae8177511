"""One change to a registry's text, made by positions and proved by reading the result.

Knows: whose value is meant, which keys may be set. Refuses to know: block and flow style (`ranges`), files. A change is
one replaced range, so that all else is the same bytes; the result must load, and differ in the asked place only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.errors import Issue, OverrideError, RegistryInvalid
from launcher.registry.editing.content import Path, content_of, text_at, value_at, with_value
from launcher.registry.editing.ranges import (
    EditRefused,
    after_line,
    change,
    first_entry,
    flow_of,
    has_gap,
    indent_of,
    into_flow,
    line_break,
    step_of,
    value_of,
)
from launcher.registry.editing.spans import Span, read_spans
from launcher.registry.editing.writing import yaml_text, yaml_value, yaml_variable
from launcher.registry.keys import GROUPS, KEYS, canonical_key
from launcher.registry.keys.spec import Kind
from launcher.registry.loading import parse_registry
from launcher.registry.overriding import unknown_key
from launcher.registry.resolving import find_cluster, find_model, quoted, unknown_name
from launcher.registry.shapes import NAME_PATTERN, NAME_RULE
from launcher.registry.values import BadValue

_HEADER = "# hlaunch's model registry: `hlaunch schema --keys` lists what an entry may hold.\nversion: 1\n\nmodels:\n"
_WITHOUT_MODELS = frozenset({("empty", ""), ("missing-key", "models"), ("no-models", "models")})
"""Codes and paths of what is wrong with a registry that only lacks its first model."""


@dataclass(frozen=True, slots=True)
class Edit:
    """A changed text. `line` is where the change begins, from 1; `old` and `new` are the texts of the value."""

    text: str
    entry: str
    line: int
    key: str = ""
    old: str | None = None
    new: str = ""


@dataclass(frozen=True, slots=True)
class ClusterPart:
    """A cluster, or one of its nodes, whose `env` is meant."""

    cluster: str
    node: str | None = None


def set_value(text: str, source: str, owner: str | ClusterPart, key: str, value: str) -> Edit:
    """Set one key of an entry, `max-num-seqs`, `ready.timeout`, `env.NAME`, or `env.NAME` of a part of a cluster.

    Raises: RegistryInvalid when the text was not, or would no longer be, a registry; UnknownModel; UnknownName for a
    cluster or node; OverrideError for a key or value that the schema refuses; EditRefused.
    """
    registry, before = parse_registry(text, source), content_of(text, source)
    if isinstance(owner, ClusterPart):
        find_cluster(registry, owner.cluster)
        place, name = _part_of(before, owner)
    else:
        name = find_model(registry, owner).name
        place = ("models", name)
    path, written = _typed(key, value)
    if isinstance(owner, ClusterPart) and path[0] != "env":
        raise OverrideError(f"{key} is no variable of a cluster", hint="write env.NAME=value, or edit the file")
    start, end, new = change(text, _block(text, place, name), path, written)
    edited = text[:start] + new + text[end:]
    leaf = value_at(content_of(f"models: {{m: {{{flow_of(path, written)}}}}}"), ("models", "m", *path))
    _prove(edited, source, with_value(before, (*place, *path), leaf), registry.issues)
    line = edited.count("\n", 0, start + len(new) - len(new.lstrip())) + 1
    return Edit(edited, name, line, ".".join(path), text_at(before, (*place, *path)), written)


def _part_of(content: Any, part: ClusterPart) -> tuple[Path, str]:
    """Where a cluster or node stands, and its name for messages. Raises: UnknownName."""
    place: Path = ("clusters", part.cluster)
    if part.node is None:
        return place, part.cluster
    names = [value_at(node, ("name",)) for node in value_at(content, (*place, "nodes")) or ()]
    if part.node not in names:
        raise unknown_name("node", part.node, names, f"cluster '{part.cluster}'")
    return (*place, "nodes", names.index(part.node)), f"{part.cluster}/{part.node}"


def _block(text: str, place: Path, name: str) -> Span:
    """Find the mapping at a place. Raises: EditRefused where it is written by reference."""
    node = read_spans(text)
    for part in place:
        if isinstance(part, int):
            node = node.items[part] if node is not None and part < len(node.items) else None
        else:
            node = value_of(node, part)
    if node is None or node.kind != "mapping":
        raise EditRefused(f"{name} is written by reference", hint="edit the file where its text stands")
    return node


def add_entry(text: str, source: str, name: str, settings: Sequence[tuple[str, str]]) -> Edit:
    """Add an entry at the end of `models`, or the first one. `settings` has `model`; values are as `--set` takes them.

    Raises: as `set_value`; EditRefused when the name is taken.
    """
    _check_name(name)
    try:
        registry = parse_registry(text, source)
    except RegistryInvalid as error:
        if {(issue.code, issue.path) for issue in error.issues if issue.severity == "error"} <= _WITHOUT_MODELS:
            return _add_first(text, source, name, settings)
        raise
    taken = {word.casefold(): entry for entry in registry.models.values() for word in (entry.name, *entry.aliases)}
    if (owner := taken.get(name.casefold())) is not None:
        hint = f"it stands at {source}:{owner.mark.line}; change it: hlaunch registry set {owner.name} KEY=VALUE"
        raise EditRefused(f"{quoted(name)} is taken", hint=hint)
    pairs = _nested(settings)
    models = value_of(read_spans(text), "models")
    if models is None or models.kind != "mapping":
        raise EditRefused("models is written by reference", hint="edit the file where its text stands")
    flow = "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
    if models.is_block:
        indent = indent_of(text, models.pairs[0][0].start)
        step = step_of(text, models, indent)
        body = [f"{indent}{yaml_text(name)}:", *(f"{indent}{step}{key}: {value}" for key, value in pairs)]
        start, new = after_line(text, models.leaf(), body)
        if len(models.pairs) > 1 and has_gap(text, models):
            new = line_break(text) + new if text[:start].endswith("\n") else new.replace("\n", "\n\n", 1)
    else:
        start, new = into_flow(text, models, f"{yaml_text(name)}: {flow}")
    edited = text[:start] + new + text[start:]
    leaf = value_at(content_of(f"models: {{{yaml_text(name)}: {flow}}}"), ("models", name))
    _prove(edited, source, with_value(content_of(text, source), ("models", name), leaf), registry.issues)
    line = edited.count("\n", 0, start + len(new) - len(new.lstrip())) + 1
    return Edit(edited, name, line)


def _add_first(text: str, source: str, name: str, settings: Sequence[tuple[str, str]]) -> Edit:
    pairs = _nested(settings)
    body = [f"  {yaml_text(name)}:", *(f"    {key}: {value}" for key, value in pairs)]
    flow = f"{yaml_text(name)}: {{{', '.join(f'{key}: {value}' for key, value in pairs)}}}"
    start, end, new = first_entry(text, read_spans(text), body, flow)
    edited = text[:start] + new + text[end:]
    leaf = value_at(content_of(f"models: {{{flow}}}"), ("models", name))
    _prove(edited, source, with_value(content_of(text, source), ("models", name), leaf), ())
    # Inside braces the entry has no lines of its own.
    at = edited.find(line_break(text).join(body), start)
    return Edit(edited, name, edited.count("\n", 0, max(at, start)) + 1)


def begin_registry(source: str, name: str, settings: Sequence[tuple[str, str]]) -> Edit:
    """Write the text of a new registry with one entry. Raises: as `add_entry`."""
    _check_name(name)
    body = "".join(f"    {key}: {value}\n" for key, value in _nested(settings))
    text = f"{_HEADER}  {yaml_text(name)}:\n{body}"
    parse_registry(text, source, known=())
    return Edit(text, name, _HEADER.count("\n") + 1)


def _check_name(name: str) -> None:
    if re.fullmatch(NAME_PATTERN, name) is None:
        raise OverrideError(f"{quoted(name)} cannot name a model", hint=NAME_RULE)


def _typed(key: str, value: str) -> tuple[tuple[str, ...], str]:
    """The path below the entry, and the value as YAML. Raises: OverrideError."""
    issue_source = f"{key}=" if key.isprintable() and len(key) <= 60 else "KEY=VALUE"
    try:
        variable = key.removeprefix("env.")
        if variable != key:
            if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable, re.ASCII) is None:
                hint = "a name has letters, digits and underscores"
                raise BadValue("bad-name", f"{quoted(variable)} cannot name a variable", hint)
            return ("env", variable), yaml_variable(value)
        canonical = canonical_key(key)
        if canonical is None or key in GROUPS:
            raise unknown_key(key, value)
        spec = KEYS[canonical]
        if spec.kind is Kind.VARIABLES:
            raise BadValue("wrong-type", f"{key} is a mapping", "write env.NAME=value")
        written = yaml_value(spec, value)
        if not written:
            raise BadValue("wrong-type", "there is no value", "write KEY=VALUE; remove a line by hand")
        if (refused := spec.refusal_of(value)) is not None:
            raise BadValue("unsupported-value", refused, "leave it out")
    except BadValue as error:
        issue = Issue("error", error.code, issue_source, None, None, "", error.message, error.hint)
        raise OverrideError("the value was not accepted", issues=[issue]) from error
    return tuple(canonical.split(".")), written


def _nested(settings: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Settings as pairs of key and YAML, groups as flow mappings; the last of two for one key wins."""
    plain: dict[str, str] = {}
    groups: dict[str, dict[str, str]] = {}
    for key, value in settings:
        path, written = _typed(key, value)
        if len(path) == 1:
            plain[path[0]] = written
        else:
            plain.setdefault(path[0], "")
            groups.setdefault(path[0], {})[path[1]] = written
    for group, leaves in groups.items():
        plain[group] = "{" + ", ".join(f"{leaf}: {written}" for leaf, written in leaves.items()) + "}"
    return list(plain.items())


def _prove(edited: str, source: str, expected: Any, known: Sequence[Issue]) -> None:
    """Raises: RegistryInvalid for a result that is no registry; EditRefused for one that changed elsewhere too."""
    try:
        parse_registry(edited, source, known=known)
    except RegistryInvalid as error:
        # Without positions: they are those of a text that nobody will see.
        issues = [replace(item, line=None, column=None) for item in error.issues if item.severity == "error"]
        raise RegistryInvalid(f"nothing was written: {source} would not be valid any more", issues=issues) from error
    if content_of(edited, source) != expected:
        raise EditRefused(
            "the change would reach other settings too: this text is shared by an anchor",
            hint="edit the file by hand",
        )
