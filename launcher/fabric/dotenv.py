"""Reads a `.env` file as `docker run --env-file` does: every character after `=` belongs to the value.

Only quotes around a whole value are taken off, as a shell and Compose's default format do, so that what is meant can
be judged; docker and Compose's `format: raw` keep them, therefore they are told. Refuses to know: what names mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from launcher.errors import UsageError

MAX_BYTES = 1 << 20

UnreadLine = Literal["name", "refused"]
"""Why a line sets nothing: a bare name takes the value of whoever starts the container, docker refuses the rest."""


@dataclass(frozen=True, slots=True)
class DotEnv:
    """Values and their lines. A name that stands twice keeps its last value, as every reader does.

    `quoted` are the names whose value stood in quotes, `unread` the numbers of lines that set nothing.
    """

    values: Mapping[str, str]
    lines: Mapping[str, int]
    quoted: frozenset[str]
    unread: Mapping[int, UnreadLine]


def parse_dotenv(text: str) -> DotEnv:
    """Read lines of `NAME=value`, with or without `export`; quotes around a whole value are taken off."""
    values: dict[str, str] = {}
    lines: dict[str, int] = {}
    quoted: set[str] = set()
    unread: dict[int, UnreadLine] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        name, equals, value = stripped.removeprefix("export ").partition("=")
        name = name.strip()
        if not equals or not name or any(ch.isspace() for ch in name):
            unread[number] = "name" if not equals and name.isidentifier() else "refused"
            continue
        quoted.discard(name)
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
            quoted.add(name)
        values[name], lines[name] = value, number
    return DotEnv(MappingProxyType(values), MappingProxyType(lines), frozenset(quoted), MappingProxyType(unread))


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
