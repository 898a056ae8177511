"""Reads a `.env` file as `docker run --env-file` does: every character after `=` belongs to the value.

Knows: lines, names, what other readers would do differently. Refuses to know: what the names mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from launcher.errors import UsageError

MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class DotEnv:
    """Values and their lines. A name that stands twice keeps its last value, as every reader does."""

    values: Mapping[str, str]
    lines: Mapping[str, int]


def parse_dotenv(text: str) -> DotEnv:
    """Read lines of `NAME=value`, with or without `export`; quotes around a whole value are taken off."""
    values: dict[str, str] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#") or "=" not in stripped:
            continue
        name, _, value = stripped.removeprefix("export ").partition("=")
        name = name.strip()
        if not name or any(ch.isspace() for ch in name):
            continue
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        values[name], lines[name] = value, number
    return DotEnv(MappingProxyType(values), MappingProxyType(lines))


def read_dotenv(path: Path) -> DotEnv:
    """Read a file. Raises: UsageError when it cannot be read or is not a text of at most 1 MiB."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}", hint="name an existing file: --env-file PATH"
        ) from error
    if len(data) > MAX_BYTES:
        raise UsageError(f"{path} is larger than 1 MiB", hint="an .env file has lines of NAME=value")
    try:
        return parse_dotenv(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8", hint="save it as UTF-8") from error
