"""Secrets leave lines of text whole, never half: `HF_TOKEN=<hidden>`, `Authorization: Bearer <hidden>`.

Pure. Knows: the values of secret variables at hand, how secrets are usually written, the shapes of well-known tokens.
Refuses to know: where lines come from. What nobody named, and nothing gives away, cannot be found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from launcher.registry.values import HIDDEN, hide_in_urls, is_secret_name

_LEAST_KNOWN = 6
"""Shorter values are words that occur by themselves."""
_PLAIN_NAMES = frozenset({"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"})
# Bounded, and begun at the beginning of a word only: a line may be long, and hostile.
_NAME = re.compile(
    r"(?<![A-Za-z0-9_])(?P<name>[A-Za-z_][A-Za-z0-9_-]{0,63})(?:\\?[\"'])?\s{0,8}(?P<sign>[:=])\s{0,8}"
    r"(?P<escape>\\?)(?P<quote>[\"']?)",
    re.ASCII,
)
_LEAST_ASSIGNED = 8
"""Shorter values are words, such as `key=len`, unless a variable of the environment is set to them."""
# Where the line ends before the quotation does, all of it is the value.
_QUOTED = {'"': re.compile(r'(?:\\.|[^"\\])+'), "'": re.compile(r"[^']+")}
_ESCAPED = re.compile(r"[^\\]+")
_VALUE = re.compile(r"[^\s\"',;(){}\[\]<]\S*")
_PATHS = ("/", "./", "~/")
_CLOSING = ",;)}]\"'"
_FLAG = re.compile(r"(?P<flag>--(?P<name>[A-Za-z][A-Za-z0-9-]{0,63})\s{1,8})(?P<value>[^\s-]\S{7,})", re.ASCII)
_SCHEME = re.compile(r"\b(?P<scheme>Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{6,}", re.ASCII | re.IGNORECASE)
_SHAPES = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,})", re.ASCII)


class Redaction:
    """Hides secrets in lines. `environ` gives values that are known to be secret by their variables' names."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        known = {
            value
            for name, value in (environ or {}).items()
            if name not in _PLAIN_NAMES and is_secret_name(name) and len(value) >= _LEAST_KNOWN
        }
        # The longest first: one secret may begin with another.
        words = sorted(known, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, words))) if words else None

    def line(self, text: str) -> str:
        """Return a line with every secret that can be told replaced."""
        if self._known is not None:
            text = self._known.sub(HIDDEN, text)
        text = _SCHEME.sub(lambda match: f"{match['scheme']} {HIDDEN}", text)
        text = _SHAPES.sub(HIDDEN, text)
        text = hide_in_urls(text)
        text = _FLAG.sub(lambda match: match["flag"] + HIDDEN if _is_secret_flag(match) else match[0], text)
        return _assignments(text)


def _assignments(text: str) -> str:
    """Hide what is assigned to a secret name; a value may itself be an assignment: `engine: HF_TOKEN=...`."""
    parts: list[str] = []
    at = 0
    while (found := _NAME.search(text, at)) is not None:
        parts.append(text[at : found.end()])
        at = found.end()
        value = _value(text, found) if _holds_secret(found["name"]) else ""
        is_variable = found["sign"] == "=" and found["name"].isupper()
        if len(value) < (1 if is_variable else _LEAST_ASSIGNED):
            continue
        if not (value.isdigit() or value.startswith(_PATHS)):
            parts.append(HIDDEN)
            at += len(value)
    return "".join([*parts, text[at:]])


def _value(text: str, found: re.Match[str]) -> str:
    """Return all that is assigned: to the end of the quotation, else of the word."""
    if found["quote"]:
        pattern = _ESCAPED if found["escape"] else _QUOTED[found["quote"]]
        quoted = pattern.match(text, found.end())
        return quoted[0] if quoted is not None else ""
    word = _VALUE.match(text, found.end())
    return word[0].rstrip(_CLOSING) if word is not None else ""


def _is_secret_flag(match: re.Match[str]) -> bool:
    return _holds_secret(match["name"]) and not match["value"].startswith(_PATHS)


def _holds_secret(name: str) -> bool:
    return name not in _PLAIN_NAMES and is_secret_name(name.replace("-", "_"))
