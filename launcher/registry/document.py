"""Text of a registry -> a tree of nodes with marks, safe to walk.

Knows: YAML's events, their dangers (nesting, alias bombs, tags) and our rules for scalars that YAML 1.1 misreads.
Refuses to know: keys and their types. Nothing is constructed by PyYAML: the C parser's events are guarded and linked
in one iterative pass, because constructing first segfaults on deep nesting and never ends on an alias bomb.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import yaml

from launcher.errors import Issue
from launcher.registry.types import Mark
from launcher.registry.values import BadValue, show_text

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_EVENTS = 200_000
MAX_ALIASED_NODES = 10_000
_EVENTS_PER_CHARACTER = 4
"""No text has more: `[:,:,` gives four events for two characters, and a pair of brackets two."""
_MAX_COUNTED_BRACKETS = 4000
"""libyaml's time grows with the square of open brackets (200,000: 40 s); with more, reading checks depth on its way."""

# A Linux system without libyaml gets the same result more slowly.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG_PREFIX = "tag:yaml.org,2002:"
_HARMLESS_TAGS = frozenset(f"{_TAG_PREFIX}{name}" for name in ("str", "map", "seq")) | {"!"}
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_OCTAL = re.compile(r"[-+]?0[0-9_]+", re.ASCII)
_UNDERSCORED = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?", re.ASCII)
_PREFIXED = re.compile(r"[-+]?0[xXoObB][0-9a-fA-F_]+", re.ASCII)
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", re.ASCII)

Style: TypeAlias = Literal["plain", "quoted", "argument"]
"""`argument`: text of a flag or a variable, which no YAML rule touches."""


class Scalar(NamedTuple):
    """A leaf: the source text, undecided as to its type."""

    text: str
    style: Style
    mark: Mark

    @property
    def is_null(self) -> bool:
        """Empty, `~` or `null` without quotes: "use the lower layer"."""
        return self.style != "quoted" and self.text in _NULLS

    def check(self) -> None:
        """Refuse spellings that YAML 1.1 and 1.2 read differently. Raises: BadValue."""
        if self.style != "plain" or not self.text or self.text[0] not in "+-.0123456789":
            return
        if _NOT_FINITE.fullmatch(self.text):
            raise BadValue("not-finite", f"{self.text} is not a usable number", "write a finite number")
        is_underscored = "_" in self.text and _UNDERSCORED.fullmatch(self.text)
        if is_underscored or _OCTAL.fullmatch(self.text) or _PREFIXED.fullmatch(self.text):
            raise BadValue(
                "ambiguous-number",
                f"{show_text(self.text)}: YAML readers disagree on this number",
                "write it in plain decimal, or quote it if it is text",
            )


@dataclass(slots=True)
class Sequence:
    items: list[Node]
    mark: Mark


@dataclass(slots=True)
class Mapping:
    """Pairs in file order, duplicates and merge keys included."""

    pairs: list[tuple[Node, Node]]
    mark: Mark


Node: TypeAlias = Scalar | Sequence | Mapping


class DocumentError(Exception):
    """The text is not a document that can be walked: one issue, since nothing after it can be trusted."""

    def __init__(self, issue: Issue) -> None:
        super().__init__(issue.headline())
        self.issue = issue


def decode(data: bytes, source: str) -> str:
    """Decode a registry file: UTF-8, at most 1 MiB; a byte-order mark is dropped. Raises: DocumentError."""
    if len(data) > MAX_BYTES:
        raise _refuse(source, "too-large", f"the file is larger than {MAX_BYTES >> 20} MiB", "is this a registry?")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or data[:4].count(b"\0") >= 2:
        raise _refuse(source, "not-utf8", "the file is UTF-16 or UTF-32", "save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        mark = Mark(before.count(b"\n") + 1, len(before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")) + 1)
        raise _refuse(
            source, "not-utf8", f"byte 0x{data[error.start]:02x} is not UTF-8", "save the file as UTF-8", mark
        ) from None


def read_tree(text: str, source: str) -> Node | None:
    """Guard and link the events of one YAML document. Returns None for an empty one.

    Raises: DocumentError with position for a syntax error or a broken guard.
    """
    builder = _Builder(source)
    feed = builder.feed
    try:
        brackets = text.count("[") + text.count("{")
        if len(text) > MAX_EVENTS // _EVENTS_PER_CHARACTER and brackets < _MAX_COUNTED_BRACKETS:
            _count_events(text, source)
        for count, event in enumerate(yaml.parse(text, Loader=_LOADER)):
            if count >= MAX_EVENTS:
                raise _too_many(source, _mark(event))
            feed(event)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, source) from None
    except yaml.reader.ReaderError as error:
        raise _character_error(error, text, source) from None
    except yaml.YAMLError as error:
        raise _refuse(source, "syntax", str(error).splitlines()[0], "check the YAML syntax") from None
    return builder.root


def _count_events(text: str, source: str) -> None:
    """Refuse a crowd of events before any of them becomes a node: libyaml counts ten times as fast as it tells.

    Text with a syntax error is refused for that, unless it is too deep or too long before the place of the error.
    """
    loader = _LOADER(text)
    count = getattr(loader, "raw_parse", None)
    try:
        if count is not None and count() > MAX_EVENTS:
            raise _too_many(source, None)
        return
    except yaml.YAMLError:
        pass
    finally:
        loader.dispose()
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=_LOADER)):
        if number >= MAX_EVENTS:
            raise _too_many(source, _mark(event))
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _too_deep(source, _mark(event))
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _too_deep(source: str, mark: Mark) -> DocumentError:
    return _refuse(source, "too-deep", f"nested deeper than {MAX_DEPTH} levels", "flatten it", mark)


def _too_many(source: str, mark: Mark | None) -> DocumentError:
    return _refuse(source, "too-many-nodes", f"more than {MAX_EVENTS} YAML events", "split the registry", mark)


@dataclass(slots=True)
class _Open:
    """A collection whose end has not come. `pending` is a mapping's key that waits for its value."""

    node: Sequence | Mapping
    anchor: str | None
    size: int = 1
    height: int = 1
    pending: Node | None = None


@dataclass(slots=True)
class _Builder:
    """Links events to nodes. An anchor keeps its node, size and height, both with aliases expanded."""

    source: str
    root: Node | None = None
    documents: int = 0
    stack: list[_Open] = field(default_factory=list)
    anchors: dict[str, tuple[Node, int, int]] = field(default_factory=dict)
    aliased: int = 0

    def feed(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.ScalarEvent):
            if event.tag is not None:
                self._check_tag(event)
            style: Style = "plain" if event.implicit[0] and not event.style else "quoted"
            self._add(Scalar(event.value, style, _mark(event)), 1, 0, event.anchor)
        elif isinstance(event, yaml.CollectionStartEvent):
            self._check_tag(event)
            if len(self.stack) >= MAX_DEPTH:
                raise _too_deep(self.source, _mark(event))
            if event.anchor:
                # A redefined anchor must not be reachable while its new node is open.
                self.anchors.pop(event.anchor, None)
            is_mapping = isinstance(event, yaml.MappingStartEvent)
            node = Mapping([], _mark(event)) if is_mapping else Sequence([], _mark(event))
            self.stack.append(_Open(node, event.anchor))
        elif isinstance(event, yaml.CollectionEndEvent):
            done = self.stack.pop()
            self._add(done.node, done.size, done.height, done.anchor)
        elif isinstance(event, yaml.AliasEvent):
            self._alias(event)
        elif isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                raise self._refuse(event, "several-documents", "a second document starts here", "remove this '---'")

    def _alias(self, event: yaml.AliasEvent) -> None:
        name = event.anchor
        if name not in self.anchors:
            if any(item.anchor == name for item in self.stack):
                raise self._refuse(
                    event, "recursive-anchor", f"*{name} stands inside its own anchor &{name}", "break the loop"
                )
            raise self._refuse(
                event, "unknown-anchor", f"*{name} has no anchor &{name} above it", "define it first, or quote the text"
            )
        node, size, height = self.anchors[name]
        if len(self.stack) + height > MAX_DEPTH:
            raise _too_deep(self.source, _mark(event))
        self.aliased += size
        if self.aliased > MAX_ALIASED_NODES:
            raise self._refuse(
                event,
                "alias-bomb",
                f"aliases expand to more than {MAX_ALIASED_NODES} nodes",
                "write the values out instead of nesting aliases",
            )
        self._add(node, size, height, None)

    def _add(self, node: Node, size: int, height: int, anchor: str | None) -> None:
        if anchor:
            self.anchors[anchor] = (node, size, height)
        if not self.stack:
            self.root = node
            return
        parent = self.stack[-1]
        parent.size += size
        if height >= parent.height:
            parent.height = height + 1
        if isinstance(parent.node, Sequence):
            parent.node.items.append(node)
        elif parent.pending is None:
            parent.pending = node
        else:
            parent.node.pairs.append((parent.pending, node))
            parent.pending = None

    def _check_tag(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent) -> None:
        tag = event.tag
        if tag is not None and tag not in _HARMLESS_TAGS:
            shown = "!!" + tag[len(_TAG_PREFIX) :] if tag.startswith(_TAG_PREFIX) else tag
            raise self._refuse(
                event, "custom-tag", f"the tag {show_text(shown)} is not allowed", "remove it; quote text instead"
            )

    def _refuse(self, event: yaml.Event, code: str, message: str, hint: str) -> DocumentError:
        return _refuse(self.source, code, message, hint, _mark(event))


def _mark(event: yaml.Event) -> Mark:
    start = event.start_mark
    return Mark(1, 1) if start is None else Mark(start.line + 1, start.column + 1)


def _refuse(source: str, code: str, message: str, hint: str, mark: Mark | None = None) -> DocumentError:
    mark = mark or Mark(1, 1)
    return DocumentError(Issue("error", code, source, mark.line, mark.column, "", message, hint))


_SECRET_LINE = re.compile(
    r"key|token|passw|secret|auth|credential|\b(sk|hf|gh[pousr]|xox[a-z]|glpat)[-_]", re.IGNORECASE
)
_SYNTAX_HINTS = (
    ("\t", "indent with spaces, not tabs"),
    ("mapping values are not allowed", "quote the value if it holds ': ', or check the indentation"),
    ("could not find expected ':'", "a key needs ': ' after it"),
    ("did not find expected key", "check the indentation of this line and the one above"),
    ("did not find expected ',' or", "close the bracket, or put a comma between the items"),
    ("block sequence entries are not allowed", "put the list on its own lines, or write [a, b]"),
    ("unexpected end of stream", "close the quote"),
    ("cannot start any token", "quote the value"),
)


def _syntax_error(error: yaml.MarkedYAMLError, text: str, source: str) -> DocumentError:
    position = error.problem_mark or error.context_mark
    if error.context_mark is not None and position is not None and position.line >= len(text.splitlines()):
        # Something was never closed: where it opened helps, the end of the file does not.
        position = error.context_mark
    mark = Mark(position.line + 1, position.column + 1) if position is not None else Mark(1, 1)
    lines = text.splitlines()
    if mark.line > len(lines) > 0:
        # The parser counts a line after the last one; an editor has none there.
        mark = Mark(len(lines), len(lines[-1]) + 1)
    line = lines[mark.line - 1] if 0 < mark.line <= len(lines) else ""
    problem = error.problem or error.context or "not valid YAML"
    hint = next(
        (
            fix
            for sign, fix in _SYNTAX_HINTS
            if sign in problem or (sign == "\t" and line[: mark.column].endswith("\t"))
        ),
        "check the YAML syntax",
    )
    if error.context and error.problem:
        problem = f"{problem} ({error.context})"
    # A value may stand on the line below its key.
    around = "\n".join(lines[max(0, mark.line - 2) : mark.line])
    near = f"; the line is {show_text(line.strip(), 72)}" if line.strip() and not _SECRET_LINE.search(around) else ""
    return _refuse(source, "syntax", f"{problem}{near}", hint, mark)


def _character_error(error: yaml.reader.ReaderError, text: str, source: str) -> DocumentError:
    offset = next((index for index, ch in enumerate(text) if yaml.reader.Reader.NON_PRINTABLE.match(ch)), 0)
    before = text[:offset]
    mark = Mark(before.count("\n") + 1, offset - (before.rfind("\n") + 1) + 1)
    character = text[offset] if text else ""
    shown = f"U+{ord(character):04X}" if character else "a character"
    return _refuse(source, "bad-character", f"{shown} is not allowed in YAML", "remove the control character", mark)
