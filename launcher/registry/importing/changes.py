"""What an import did with each option and each variable, and the registry that came of it.

Knows: the shape of the report, how entries become text, and that the text must load. Refuses to know: where the options
came from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from launcher.errors import HlaunchError, Issue, RegistryInvalid
from launcher.exit_codes import ExitCode
from launcher.registry.editing.writing import yaml_text
from launcher.registry.keys import KEYS
from launcher.registry.loading import parse_registry
from launcher.registry.types import Registry

Judge: TypeAlias = Callable[[Registry], Sequence[Issue]]
"""Says what is wrong with a registry beyond its own rules: what the files of its models forbid."""
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


def finish(
    entries: Sequence[Entry], env: Mapping[str, str], changes: list[Change], origin: str, judge: Judge | None = None
) -> Imported:
    """Write the registry and read it back; what its rules or `judge` call an error is dropped and reported.

    Raises: ImportRefused when nothing is left.
    """
    left = list(entries)
    while left:
        text = _write(left, env, origin)
        try:
            registry = parse_registry(text, "the result", known=())
            issues = list(judge(registry)) if judge is not None else []
        except RegistryInvalid as error:
            issues = list(error.issues)
        errors = [issue for issue in issues if issue.severity == "error"]
        if not errors:
            return Imported(text, tuple(changes))
        if not _drop_blamed(left, errors, changes):
            raise ImportRefused("the result would not be a registry", details=[issue.headline() for issue in errors])
    lost = [f"{item.source}: {item.reason}" for item in changes if item.source.startswith("models.")]
    raise ImportRefused("no model is left that can be served", details=lost)


def _drop_blamed(entries: list[Entry], errors: Sequence[Issue], changes: list[Change]) -> bool:
    """Drop what the errors blame, an entry whole where its model is; say whether there was any."""
    found = False
    for issue in errors:
        for entry in tuple(entries):
            key = issue.path.removeprefix(f"models.{entry.name}.")
            if key == "model":
                entries.remove(entry)
                changes[:] = [item for item in changes if item.entry != entry.name]
                changes.append(Change("dropped", f"models.{entry.name}", "", issue.message, entry.name))
                found = True
            elif key != issue.path and key in entry.settings:
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
