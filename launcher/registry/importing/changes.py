"""What an import did with each option and each variable, and the registry that came of it.

Knows: the shape of the report, how entries become text, and that the text must load. Refuses to know: where the options
came from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from launcher.errors import HlaunchError, RegistryInvalid
from launcher.exit_codes import ExitCode
from launcher.registry.editing.writing import yaml_text
from launcher.registry.keys import KEYS
from launcher.registry.loading import parse_registry

Action = Literal["kept", "renamed", "dropped"]


class ImportRefused(HlaunchError):
    """The source is not what it was said to be."""

    exit_code = ExitCode.USAGE


@dataclass(frozen=True, slots=True)
class Change:
    """One option or variable. `source` is as it was written, values of secrets left out; `result` as it stands now."""

    action: Action
    source: str
    result: str = ""
    reason: str = ""
    entry: str = ""

    def as_dict(self) -> dict[str, str | None]:
        """The same as plain values, for `--json`."""
        return {
            "action": self.action,
            "entry": self.entry or None,
            "source": self.source,
            "result": self.result or None,
            "reason": self.reason or None,
        }


@dataclass(frozen=True, slots=True)
class Imported:
    """A valid registry's text, and what became of everything in the source."""

    text: str
    changes: tuple[Change, ...]


@dataclass(slots=True)
class Entry:
    """An entry on its way: canonical key -> YAML text of its value."""

    name: str
    settings: dict[str, str] = field(default_factory=dict)


def entry_name(model: str) -> str:
    """Name an entry after its model: the last part of its id or path, in small letters."""
    last = model.rstrip("/").rsplit("/", 1)[-1].lower()
    name = re.sub(r"[^a-z0-9._-]+", "-", last).strip("-._")
    return name[:128] or "model"


def finish(entries: Sequence[Entry], env: Mapping[str, str], changes: list[Change], origin: str) -> Imported:
    """Write the registry and read it back; a value that breaks a rule with others is dropped and reported.

    Raises: ImportRefused when nothing is left.
    """
    for _ in range(len(KEYS)):
        text = _write(entries, env, origin)
        try:
            parse_registry(text, "the result", known=())
        except RegistryInvalid as error:
            if not _drop_blamed(entries, error, changes):
                raise ImportRefused(
                    "the result would not be a registry", details=[issue.headline() for issue in error.issues]
                ) from error
            continue
        return Imported(text, tuple(changes))
    raise ImportRefused("the result would not be a registry")


def _drop_blamed(entries: Sequence[Entry], error: RegistryInvalid, changes: list[Change]) -> bool:
    """Drop what the errors blame; say whether there was any."""
    found = False
    for issue in error.issues:
        for entry in entries:
            key = issue.path.removeprefix(f"models.{entry.name}.")
            if issue.severity == "error" and key != issue.path and key != "model" and key in entry.settings:
                value = entry.settings.pop(key)
                taken = [item for item in changes if item.entry == entry.name and item.result == f"{key}: {value}"]
                for item in taken:
                    changes.remove(item)
                source = taken[-1].source if taken else f"{key}: {value}"
                changes.append(Change("dropped", source, "", issue.message, entry.name))
                found = True
    return found


def _write(entries: Sequence[Entry], env: Mapping[str, str], origin: str) -> str:
    lines = [f"# Imported by hlaunch from {origin}.", "version: 1", ""]
    if env:
        lines += ["defaults:", "  env:", *(f"    {name}: {yaml_text(value)}" for name, value in env.items()), ""]
    lines.append("models:")
    for index, entry in enumerate(entries):
        lines += [""] * (index > 0) + [f"  {yaml_text(entry.name)}:"]
        lines += [f"    {key}: {entry.settings[key]}" for key in KEYS if key in entry.settings]
    return "\n".join(lines) + "\n"
