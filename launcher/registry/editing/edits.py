"""One change to a registry's text, made by positions and proved by reading the result.

Knows: how a value is replaced and a pair inserted in block and flow style. Refuses to know: files. Every change is one
replaced range, so that all else is the same bytes; the result must load, and must differ in the asked place only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.errors import HlaunchError, Issue, OverrideError, RegistryInvalid
from launcher.exit_codes import ExitCode
from launcher.registry.document import Mapping, Scalar, read_tree
from launcher.registry.editing.spans import Span, read_spans
from launcher.registry.editing.writing import yaml_text, yaml_value, yaml_variable
from launcher.registry.keys import GROUPS, KEYS, canonical_key
from launcher.registry.keys.spec import Kind
from launcher.registry.loading import parse_registry
from launcher.registry.overriding import unknown_key
from launcher.registry.resolving import find_model, quoted
from launcher.registry.shapes import MODEL, NAME_PATTERN
from launcher.registry.values import BadValue
from launcher.registry.walking import walk

_STEP = 2
_HEADER = "# hlaunch's model registry: `hlaunch schema --keys` lists what an entry may hold.\nversion: 1\n\nmodels:\n"


class EditRefused(HlaunchError):
    """The text cannot be changed in this one place without touching another."""

    exit_code = ExitCode.REGISTRY_INVALID


@dataclass(frozen=True, slots=True)
class Edit:
    """A changed text. `line` is where the change begins, from 1; `old` and `new` are the texts of the value."""

    text: str
    entry: str
    line: int
    key: str = ""
    old: str | None = None
    new: str = ""


def set_value(text: str, source: str, name: str, key: str, value: str) -> Edit:
    """Set one key of one entry: `max-num-seqs`, `ready.timeout`, `env.NAME`.

    Raises: RegistryInvalid when the text was not, or would no longer be, a registry; UnknownModel; OverrideError for a
    key or value that the schema refuses; EditRefused.
    """
    registry = parse_registry(text, source)
    entry = find_model(registry, name)
    path, written = _typed(key, value)
    root = read_spans(text)
    models = _value_of(root, "models")
    node = _value_of(models, entry.name)
    if node is None or node.kind != "mapping":
        raise EditRefused(f"entry {entry.name} is written by reference", hint="edit the file where its text stands")
    start, end, new = _change(text, node, path, written)
    old = _leaf_text(_data(text, source), entry.name, path)
    edited = text[:start] + new + text[end:]
    expected = _with(
        _data(text, source), ("models", entry.name, *path), _data(f"models: {{m: {{{_flow(path, written)}}}}}")
    )
    _prove(edited, source, expected)
    line = edited.count("\n", 0, start + len(new) - len(new.lstrip())) + 1
    return Edit(edited, entry.name, line, ".".join(path), old, written)


def add_entry(text: str, source: str, name: str, settings: Sequence[tuple[str, str]]) -> Edit:
    """Add an entry at the end of `models`. `settings` has `model`; values are as `--set` takes them.

    Raises: as `set_value`; EditRefused when the name is taken.
    """
    _check_name(name)
    registry = parse_registry(text, source)
    taken = {word.casefold(): entry for entry in registry.models.values() for word in (entry.name, *entry.aliases)}
    if (owner := taken.get(name.casefold())) is not None:
        hint = f"it stands at {source}:{owner.mark.line}; change it: hlaunch registry set {owner.name} KEY=VALUE"
        raise EditRefused(f"{quoted(name)} is taken", hint=hint)
    pairs = _nested(settings)
    models = _value_of(read_spans(text), "models")
    if models is None or models.kind != "mapping":
        raise EditRefused("models is written by reference", hint="edit the file where its text stands")
    flow = "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
    if models.is_block:
        indent = _indent(text, models.pairs[0][0].start)
        step = _step(text, models, indent)
        body = [f"{indent}{yaml_text(name)}:", *(f"{indent}{step}{key}: {value}" for key, value in pairs)]
        start, new = _after_line(text, models.leaf(), body)
        if len(models.pairs) > 1 and _has_gap(text, models):
            new = _break(text) + new if text[:start].endswith("\n") else new.replace("\n", "\n\n", 1)
    else:
        start, new = _into_flow(text, models, f"{yaml_text(name)}: {flow}")
    edited = text[:start] + new + text[start:]
    expected = _with(_data(text, source), ("models", name), _data(f"models: {{{yaml_text(name)}: {flow}}}"))
    _prove(edited, source, expected)
    line = edited.count("\n", 0, start + len(new) - len(new.lstrip())) + 1
    return Edit(edited, name, line)


def begin_registry(source: str, name: str, settings: Sequence[tuple[str, str]]) -> Edit:
    """Write the text of a new registry with one entry. Raises: as `add_entry`."""
    _check_name(name)
    body = "".join(f"    {key}: {value}\n" for key, value in _nested(settings))
    text = f"{_HEADER}  {yaml_text(name)}:\n{body}"
    parse_registry(text, source)
    return Edit(text, name, _HEADER.count("\n") + 1)


def _check_name(name: str) -> None:
    if re.fullmatch(NAME_PATTERN, name) is None:
        raise OverrideError(f"{quoted(name)} cannot name a model", hint="start with a letter or digit")


def _typed(key: str, value: str) -> tuple[tuple[str, ...], str]:
    """The path below the entry, and the value as YAML. Raises: OverrideError."""
    issue_source = f"{key}=" if key.isprintable() and len(key) <= 60 else "KEY=VALUE"
    try:
        variable = key.removeprefix("env.")
        if variable != key:
            if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable, re.ASCII) is None:
                raise BadValue("bad-name", f"{quoted(variable)} cannot name a variable", "write env.NAME=value")
            return ("env", variable), yaml_variable(value)
        canonical = canonical_key(key)
        if canonical is None or key in GROUPS:
            raise unknown_key(key)
        spec = KEYS[canonical]
        if spec.kind is Kind.VARIABLES:
            raise BadValue("wrong-type", f"{key} is a mapping", "write env.NAME=value")
        written = yaml_value(spec, value)
        if not written:
            raise BadValue("wrong-type", "there is no value", "write KEY=VALUE; remove a line by hand")
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


def _change(text: str, entry: Span, path: tuple[str, ...], written: str) -> tuple[int, int, str]:
    """The range to replace and its new text."""
    node = entry
    for depth, part in enumerate(path):
        pair = _pair_of(node, part, is_key=depth == 0)
        rest = path[depth + 1 :]
        if pair is None:
            start, new = _insertion(text, node, f"{part}: {_flow_value(rest, written)}")
            return start, start, new
        key, value = pair
        if not rest:
            return _replacement(text, key, value, written)
        if value.kind == "mapping":
            node = value
        elif value.kind == "scalar":
            return _replacement(text, key, value, _flow_value(rest, written))
        else:
            raise EditRefused(f"{part} is written by reference", hint="edit the file where its text stands")
    raise AssertionError("a path has a last part")


def _replacement(text: str, key: Span, value: Span, written: str) -> tuple[int, int, str]:
    if value.is_empty:
        gap = "" if text[value.start - 1].isspace() else " "
        return value.start, value.start, gap + written
    start, end = value.start, value.end
    if value.anchor:
        prefix = re.match(r"&\S+\s+", text[start:end])
        start += prefix.end() if prefix is not None else 0
    if value.is_block and value.kind == "scalar":
        # The text of `|` and `>` ends behind its last line break, and behind empty lines that part it from the next.
        return start, start + len(text[start:end].rstrip()), written
    if value.is_block:
        if "#" in text[start:end]:
            raise EditRefused("the value holds comments", hint="edit it by hand, or move them above the key")
        colon = text.index(":", key.end)
        if not text[colon + 1 : start].strip():
            return colon + 1, end, f" {written}"
    return start, end, written


def _insertion(text: str, node: Span, pair: str) -> tuple[int, str]:
    if not node.is_block:
        return _into_flow(text, node, pair)
    return _after_line(text, node.leaf(), [_indent(text, node.pairs[0][0].start) + pair])


def _into_flow(text: str, node: Span, pair: str) -> tuple[int, str]:
    if node.pairs and not node.pairs[-1][1].is_empty:
        return node.pairs[-1][1].end, f", {pair}"
    opening = text.index("{", node.start) + 1
    return opening, f"{pair}, " if node.pairs else pair


def _after_line(text: str, leaf: Span, lines: list[str]) -> tuple[int, str]:
    """Insert whole lines behind the one on which a node ends, its comment included."""
    newline = _break(text)
    body = newline.join(lines)
    if leaf.is_block and text[: leaf.end].endswith("\n"):
        return leaf.end, body + newline
    stop = text.find("\n", leaf.end)
    rest = text[leaf.end : stop if stop >= 0 else len(text)].strip()
    if rest and not rest.startswith("#"):
        raise EditRefused("something follows on the same line", hint="edit the file by hand")
    return (stop + 1, body + newline) if stop >= 0 else (len(text), newline + body)


def _indent(text: str, start: int) -> str:
    line = text[text.rfind("\n", 0, start) + 1 : start]
    if set(line.strip()) <= {"-", " "}:
        # An item of a sequence: its other keys stand below the first, without the dash.
        return line.replace("-", " ")
    if line.strip():
        raise EditRefused("the first key does not begin its line", hint="edit the file by hand")
    return line


def _step(text: str, models: Span, indent: str) -> str:
    for _, value in models.pairs:
        if value.kind == "mapping" and value.is_block:
            return " " * max(1, len(_indent(text, value.pairs[0][0].start)) - len(indent))
    return " " * _STEP


def _has_gap(text: str, models: Span) -> bool:
    """Whether an empty line parts the last two entries."""
    between = text[models.pairs[-2][1].leaf().end : models.pairs[-1][0].start]
    return re.search(r"\n[ \t]*\r?\n", between) is not None


def _break(text: str) -> str:
    first = text.find("\n")
    return "\r\n" if first > 0 and text[first - 1] == "\r" else "\n"


def _pair_of(node: Span, name: str, *, is_key: bool) -> tuple[Span, Span] | None:
    for key, value in node.pairs:
        if key.kind == "scalar" and (key.text == name or (is_key and MODEL.canonical(key.text) == name)):
            return key, value
        if key.kind == "scalar" and not is_key and key.text.replace("_", "-") == name:
            return key, value
    return None


def _value_of(node: Span | None, name: str) -> Span | None:
    pairs = node.pairs if node is not None else []
    return next((value for key, value in pairs if key.kind == "scalar" and key.text == name), None)


def _flow_value(path: Sequence[str], written: str) -> str:
    return "{" + _flow(path, written) + "}" if path else written


def _flow(path: Sequence[str], written: str) -> str:
    return f"{path[0]}: {_flow_value(path[1:], written)}"


def _data(text: str, source: str = "") -> Any:
    """The walked content of a text: leaves as their source text, None for an empty one."""
    root = read_tree(text, source)
    return _plain(walk(root, source).data) if isinstance(root, Mapping) else {}


def _plain(node: Any) -> Any:
    if isinstance(node, Scalar):
        return None if node.is_null else node.text
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    return [_plain(item) for item in node] if isinstance(node, list) else node


def _with(data: Any, path: tuple[str, ...], sample: Any) -> Any:
    """Put what a one-entry sample holds at the end of its path into a copy of the content."""
    leaf = sample
    for part in ("models", next(iter(sample["models"])), *path[2:]):
        leaf = leaf[part]
    copy = dict(data)
    node = copy
    for part in path[:-1]:
        below = node.get(part)
        node[part] = dict(below) if isinstance(below, dict) else {}
        node = node[part]
    node[path[-1]] = leaf
    return copy


def _leaf_text(data: Any, name: str, path: tuple[str, ...]) -> str | None:
    node = data["models"][name]
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    if isinstance(node, list):
        return "[" + ", ".join(str(item) for item in node) + "]"
    return node if isinstance(node, str) else None


def _prove(edited: str, source: str, expected: Any) -> None:
    """Raises: RegistryInvalid for a result that is no registry; EditRefused for one that changed elsewhere too."""
    try:
        parse_registry(edited, source)
    except RegistryInvalid as error:
        # Without positions: they are those of a text that nobody will see.
        issues = [replace(item, line=None, column=None) for item in error.issues if item.severity == "error"]
        raise RegistryInvalid(f"nothing was written: {source} would not be valid any more", issues=issues) from error
    if _data(edited, source) != expected:
        raise EditRefused(
            "the change would reach other settings too: this text is shared by an anchor",
            hint="edit the file by hand",
        )
