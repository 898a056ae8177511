"""Plain values -> YAML text for Compose: fixed bytes, and no value that can become syntax, another type or a variable.

Knows: how YAML 1.2 (Compose's reader) and YAML 1.1 (Python's) read a double-quoted text the same way, and what Compose
interpolates. Refuses to know: what a Compose file means.

Every text is data: it is quoted, its `$` doubled, and whatever is not printable ASCII written as an escape. The one way
to let Compose substitute a variable is `Interpolated`, which only this package's own constants are made of.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from launcher.errors import UsageError

_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*", re.ASCII)
_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
"""Plain scalars that some YAML reader takes for something else than text."""
MAX_KEY = 1000
"""YAML wants the colon of a key within 1,024 characters."""
_SHORT_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


@dataclass(frozen=True, slots=True)
class Interpolated:
    """Text of our own making in which `${NAME:?message}` is meant."""

    text: str


@dataclass(frozen=True, slots=True)
class Block:
    """A long text of printable ASCII lines, written as a literal block so that people can read it. `$` is doubled."""

    text: str


class Reset:
    """Removes a key that an earlier file of the same project sets (Compose's `!reset`)."""


Value = str | int | bool | Interpolated | Block | Reset | Sequence["Value"] | Mapping[str, "Value"]


def dump(document: Mapping[str, Value]) -> str:
    """Write a document, one key a line, in the order of its mappings.

    Raises: UsageError for a text that no YAML file can hold (half of a surrogate pair).
    """
    return "".join(f"{line}\n" for line in _mapping(document, ""))


def _mapping(mapping: Mapping[str, Value], indent: str) -> Iterator[str]:
    for key, value in mapping.items():
        yield from _entry(f"{indent}{_key(key)}:", value, indent + "  ")


def _entry(head: str, value: Value, indent: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        if not value:
            yield f"{head} {{}}"
            return
        yield head
        yield from _mapping(value, indent)
    elif isinstance(value, Block):
        yield f"{head} |"
        for line in value.text.splitlines():
            yield indent + _block_line(line)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        if all(isinstance(item, (str, int)) for item in value):
            yield f"{head} [{', '.join(_scalar(item) for item in value)}]"
            return
        yield head
        for item in value:
            yield from _item(item, indent)
    else:
        yield f"{head} {_scalar(value)}"


def _item(value: Value, indent: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        lines = list(_mapping(value, indent + "  "))
        yield f"{indent}- {lines[0].lstrip()}"
        yield from lines[1:]
    else:
        yield f"{indent}- {_scalar(value)}"


def _key(key: str) -> str:
    written = key if _PLAIN_KEY.fullmatch(key) and key.lower() not in _WORDS else quoted(key)
    if len(written) > MAX_KEY:
        raise UsageError(f"the name {key[:40]!r}... is longer than {MAX_KEY} characters", hint="shorten it")
    return written


def _scalar(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Interpolated):
        return quoted(value.text)
    if isinstance(value, Reset):
        return "!reset null"
    if isinstance(value, str):
        return quoted(escaped(value))
    raise TypeError(f"no scalar: {type(value).__name__}")


def _block_line(line: str) -> str:
    if not (line.isascii() and line.isprintable()) or line != line.rstrip():
        raise ValueError("a literal block holds printable ASCII without trailing spaces")
    return escaped(line)


def escaped(text: str) -> str:
    """Double each `$`, so that Compose gives the text back unchanged."""
    return text.replace("$", "$$")


def quoted(text: str) -> str:
    """Write a double-quoted scalar in printable ASCII. Raises: UsageError for half of a surrogate pair."""
    return '"' + "".join(_character(ch) for ch in text) + '"'


def _character(ch: str) -> str:
    if ch in _SHORT_ESCAPES:
        return _SHORT_ESCAPES[ch]
    code = ord(ch)
    if 0x20 <= code < 0x7F:
        return ch
    if 0xD800 <= code <= 0xDFFF:
        raise UsageError(f"a value holds half of a surrogate pair (U+{code:04X})", hint="write valid Unicode text")
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
