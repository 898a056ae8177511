"""Quantities as people write them: sizes, token counts, durations, secrets.

Knows: the text forms and their limits. Refuses to know: YAML, keys, files other than a secret's own.

Errors: `BadValue` carries a stable code, one line of cause and one of fix; it is a ValueError.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

AUTO: Literal["auto"] = "auto"

HIDDEN = "<hidden>"
"""What stands for a secret wherever one would be shown."""

MAX_QUANTITY = 1 << 62
"""Above this no quantity makes sense, and 64-bit consumers would overflow."""

_BYTE_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}iB": 1024 ** (power + 1) for power, prefix in enumerate(("K", "M", "G", "T", "P"))},
    **{f"{prefix}B": 1000 ** (power + 1) for power, prefix in enumerate(("k", "M", "G", "T", "P"))},
}
_UNIT_SPELLINGS = {unit.lower(): unit for unit in _BYTE_UNITS}
_SECONDS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_QUANTITY = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,9})?)\s?([A-Za-z]{0,3})", re.ASCII)
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", re.ASCII)
_SECRET_NAME = re.compile(
    r"PASSWORD|PASSWD|SECRET|CREDENTIAL|(^|_)(API)?(TOKEN|KEY|AUTH|AUTHORIZATION|PAT)(_|$)", re.ASCII | re.IGNORECASE
)
# The userinfo of a URL ends at the last '@' before its path. Over HTTP a name alone is a token.
_LOGIN = re.compile(
    r"(?P<scheme>(?:https?|[A-Za-z][A-Za-z0-9+.-]{0,30}(?=://[^\s/?#@:]{0,200}:))://)[^\s/?#]{1,4096}@",
    re.ASCII | re.IGNORECASE,
)
# A comma ends a value only where the next field begins: passwords may hold one.
_COMMA = r",(?![A-Za-z][\w.-]{0,63}=)"
_VALUE = rf"'[^']*'|\"[^\"]*\"|(?:[^\s&;,]|{_COMMA})+"
_IN_QUERY = re.compile(
    rf"(?P<lead>[?&](?P<name>[A-Za-z][\w.-]{{0,63}})=)(?P<value>(?:[^\s&;,\"'<>#]|{_COMMA})+)", re.ASCII
)
_FIELD = re.compile(
    rf"(?P<lead>(?:^|[?&#;,\s])-{{0,2}}(?P<name>[A-Za-z][\w.-]{{0,63}})=(?:(?:Bearer|Basic)\s+)?)(?P<value>{_VALUE})",
    re.ASCII | re.IGNORECASE,
)
_INNER_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[.-]")
# Switches, counts, paths, references and what is hidden already: no secrets, whatever they are assigned to.
_NO_SECRET = re.compile(
    rf"true|false|none|null|yes|no|on|off|[0-9]+|(?:/|\./|~/|{HIDDEN}).*|\$\{{\w[^}}]*\}}", re.IGNORECASE
)
_MAX_SECRET_BYTES = 64 << 10


class BadValue(ValueError):
    """A value that cannot be read. `code` is stable, `message` the cause, `hint` the fix."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint


def show_text(text: str, limit: int = 60) -> str:
    """Quote user text for a message: escaped, on one line, at most `limit` characters of it."""
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return repr(cut)


def is_secret_name(name: str) -> bool:
    """Say whether a variable of this name is likely to hold a secret: `HF_TOKEN`, `OPENAI_API_KEY`, `PASSWORD`."""
    return _SECRET_NAME.search(name) is not None


def holds_secret(name: str, value: str) -> bool:
    """Say whether a variable holds a secret: by its name, or by a login, a parameter or a header inside its value."""
    return is_secret_name(name) or _without_secrets(value) != value


def redacted(name: str, value: str) -> str:
    """Return a variable's value as it may be shown: hidden whole when the name says that it is a secret.

    Of a URL the login is hidden: `postgres://<hidden>@host/db`; the user of `ssh://git@host` is none. Of fields, as in
    `authorization=<hidden>,tenant=a`, those are whose names say so.
    """
    return HIDDEN if value and is_secret_name(name) else _without_secrets(value)


def hide_in_urls(text: str) -> str:
    """Return a text with the logins and the secret parameters of its URLs hidden: `https://<hidden>@h/x?token=<hidden>`."""
    if "@" in text:
        text = _LOGIN.sub(lambda found: f"{found['scheme']}{HIDDEN}@", text)
    return _IN_QUERY.sub(_hide_field, text) if "=" in text else text


def _without_secrets(value: str) -> str:
    value = hide_in_urls(value)
    # Outside a URL `key=value` is how people write of any pair.
    return _FIELD.sub(lambda found: found[0] if found["name"].lower() == "key" else _hide_field(found), value)


def _hide_field(found: re.Match[str]) -> str:
    is_secret = is_secret_name(_INNER_CAPITAL.sub("_", found["name"]))
    return found["lead"] + HIDDEN if is_secret and _NO_SECRET.fullmatch(found["value"]) is None else found[0]


def parse_size(text: str) -> int:
    """Read `4GiB`, `500MB` or a plain number of bytes. Units: KiB MiB GiB TiB are 1024ⁿ, kB MB GB TB are 1000ⁿ.

    Returns: bytes. Raises: BadValue, also for a bare `4G`, which people read in both ways.
    """
    hint = "write a number and a unit, such as 4GiB (1024³ bytes) or 4GB (1000³ bytes)"
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise BadValue("wrong-type", f"{show_text(text)} is not a size", hint)
    unit = _UNIT_SPELLINGS.get(match[2].lower())
    if unit is None:
        raise BadValue("wrong-type", f"{show_text(text)}: unknown or ambiguous unit '{match[2]}'", hint)
    return _whole(text, match[1], _BYTE_UNITS[unit], "bytes")


def format_size(num_bytes: int) -> str:
    """Write bytes so that `parse_size` reads the same number: in the unit that needs the fewest digits."""
    exact = [(num_bytes // step, unit) for unit, step in _BYTE_UNITS.items() if unit and num_bytes % step == 0]
    count, unit = min(exact) if num_bytes else (0, "B")
    return f"{count}{unit}"


def parse_count(text: str) -> int:
    """Read a number of tokens: `131072`, `128k` (k = 1024) or `1m` (m = 1024²).

    Raises: BadValue.
    """
    hint = "write a whole number such as 131072, or 128k (k = 1024)"
    match = _QUANTITY.fullmatch(text.strip())
    scale = {"": 1, "k": 1024, "m": 1024 * 1024}.get(match[2].lower()) if match else None
    if match is None or scale is None:
        raise BadValue("wrong-type", f"{show_text(text)} is not a number of tokens", hint)
    return _whole(text, match[1], scale, "tokens")


def parse_duration(text: str) -> float:
    """Read `900s`, `15m`, `1h`, `500ms` or a plain number of seconds.

    Returns: seconds. Raises: BadValue.
    """
    match = _QUANTITY.fullmatch(text.strip())
    scale = _SECONDS.get(match[2].lower()) if match else None
    if match is None or scale is None:
        raise BadValue(
            "wrong-type", f"{show_text(text)} is not a duration", "write a number and a unit: 500ms, 30s, 15m, 1h"
        )
    return float(match[1]) * scale


def format_duration(seconds: float) -> str:
    """Write seconds the way `parse_duration` reads them."""
    for unit, step in (("h", 3600.0), ("m", 60.0)):
        if seconds >= step and seconds % step == 0:
            return f"{int(seconds // step)}{unit}"
    return f"{seconds:.9f}".rstrip("0").rstrip(".") + "s"


def _whole(text: str, digits: str, scale: int, noun: str) -> int:
    value = float(digits) * scale if "." in digits else int(digits) * scale
    if noun == "bytes" and scale > 1 and math.isfinite(value):
        # 1.31MiB is a size people copy from a table; nobody means the fraction of a byte.
        value = int(value)
    if not math.isfinite(value) or value > MAX_QUANTITY:
        raise BadValue("out-of-range", f"{show_text(text)} is more than 2^62 {noun}", "write a smaller number")
    if value != int(value):
        raise BadValue("wrong-type", f"{show_text(text)} is not a whole number of {noun}", f"write it in {noun}")
    return int(value)


@dataclass(frozen=True, slots=True)
class SecretRef:
    """Where a secret comes from; the secret itself is read only by `reveal` and never printed.

    `kind` is `env` (`${NAME}`), `file` (`file:/path`) or `literal` (written in the registry; loading warns).
    """

    kind: Literal["env", "file", "literal"]
    name: str
    _literal: str = field(default="", repr=False)

    @classmethod
    def parse(cls, text: str) -> SecretRef:
        """Read `${NAME}`, `file:/path` or a literal. Raises: BadValue for anything half way."""
        variable = _VARIABLE.fullmatch(text)
        if variable is not None:
            return cls("env", variable[1])
        if text.startswith("file:"):
            if len(text) == len("file:"):
                raise BadValue("bad-secret", "'file:' names no file", "write file:/run/secrets/api_key")
            return cls("file", text[len("file:") :])
        if "$" in text or any(ch.isspace() for ch in text) or not text.isprintable():
            # The value is left out on purpose: it may be most of a secret.
            raise BadValue(
                "bad-secret",
                "not a secret reference, and not usable as a literal key",
                "write ${NAME} for an environment variable, or file:/path",
            )
        return cls("literal", "literal", text)

    def __str__(self) -> str:
        if self.kind == "env":
            return f"${{{self.name}}}"
        return f"file:{self.name}" if self.kind == "file" else "<literal, hidden>"

    def reveal(self, environ: Mapping[str, str]) -> str:
        """Read the secret. Blocks on the file, at most 64 KiB of it.

        Raises: BadValue when the variable is unset or empty, or the file cannot be read.
        """
        if self.kind == "literal":
            return self._literal
        if self.kind == "env":
            value = environ.get(self.name, "")
            if not value:
                raise BadValue("secret-unset", f"{self} is not set", f"run: export {self.name}=…")
            return value
        try:
            with Path(self.name).expanduser().open("rb") as handle:
                secret = handle.read(_MAX_SECRET_BYTES).decode("utf-8").strip()
        except (OSError, UnicodeDecodeError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not readable text"
            raise BadValue("secret-unset", f"{self} cannot be read: {reason}") from error
        if not secret:
            raise BadValue("secret-unset", f"{self} is empty")
        return secret
