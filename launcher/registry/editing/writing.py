"""Texts as YAML writes them: plain where every reader agrees, quoted where one could not.

Knows: YAML's quoting, in block and flow context alike. Refuses to know: where the text goes.
"""

from __future__ import annotations

import re

from launcher.registry.document import Scalar
from launcher.registry.keys import KeySpec, Kind, show_value
from launcher.registry.overriding import read_text
from launcher.registry.reading import read_variable
from launcher.registry.types import Mark

_PLAIN = re.compile(r"[A-Za-z_/.][A-Za-z0-9_./:@+~-]*( [A-Za-z0-9_./()+~-]+)*", re.ASCII)
_WORDS = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n", "~", "none"})
_NUMBERLIKE = (Kind.BOOLEAN, Kind.INTEGER, Kind.NUMBER)
_QUANTITIES = (Kind.TOKENS, Kind.SIZE, Kind.DURATION)
_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", '"': '\\"', "\\": "\\\\"}


def yaml_text(text: str) -> str:
    """Write a text as one YAML scalar on one line, usable in block and in flow context."""
    is_plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS and ": " not in f"{text} "
    if is_plain and re.fullmatch(r"[.][0-9].*|[.](inf|nan)", text, re.IGNORECASE) is None:
        return text
    return '"' + "".join(_escaped(ch) for ch in text) + '"'


def _escaped(ch: str) -> str:
    if ch in _ESCAPES:
        return _ESCAPES[ch]
    if ch.isprintable() and ch != "\ufeff":
        return ch
    code = ord(ch)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def yaml_value(spec: KeySpec, text: str) -> str:
    """Write the value of a key, given as `--set` takes it. Raises: BadValue when the key does not accept it."""
    value = read_text(spec, text)
    if value is None or isinstance(value, bool) or spec.kind in _NUMBERLIKE:
        return "" if value is None else show_value(spec, value)
    if spec.kind in _QUANTITIES:
        return text.strip() if re.fullmatch(r"[0-9a-zA-Z.-]+", text.strip(), re.ASCII) else yaml_text(text.strip())
    if isinstance(value, tuple):
        return "[" + ", ".join(yaml_text(item) for item in value) + "]"
    return yaml_text(text)


def yaml_variable(text: str) -> str:
    """Write the value of an environment variable. Raises: BadValue."""
    return yaml_text(read_variable(Scalar(text, "argument", Mark(0, 0))))
