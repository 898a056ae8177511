"""What would change: files that a plan makes against those in a folder, or one text against another.

Knows: bytes. Refuses to know: who made them; rendering is deterministic, so a difference in bytes is a difference in
the plan. Values of variables named like secrets are hidden in what is shown.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.errors import UsageError
from launcher.registry.values import redacted

Action = Literal["create", "recreate", "remove", "none"]
MAX_FILE_BYTES = 8 << 20
_KEY = re.compile(r"\s*(?:- )?\"?([A-Za-z_][\w.-]*)\"?\s*(?::(?:\s|$)|=)")
_ASSIGNMENT = re.compile(r"(\"?)([A-Za-z_]\w*)(\"?)(\s*[:=]\s*)(\S.*)$")
_SHOWN_KEYS = 3


@dataclass(frozen=True, slots=True)
class Change:
    """One file. `reason` names the first keys that differ; `lines` is a unified diff, empty where nothing differs."""

    path: str
    action: Action
    reason: str = ""
    lines: tuple[str, ...] = ()


def diff_files(files: Mapping[str, bytes], folder: Path) -> tuple[Change, ...]:
    """Compare files by relative path with what lies in `folder`, in path order.

    A file there that the plan no longer makes counts as removed if it lies in a folder, and has a name, that the plan
    knows: nothing else in there is ours. Raises: UsageError when something cannot be read.
    """
    changes = []
    for path, content in sorted(files.items()):
        changes.append(diff_text(path, _read(folder / path), _decode(content)))
    names = {path.rpartition("/")[2] for path in files}
    tops = {path.partition("/")[0].partition("-")[0] for path in files if "/" in path}
    for found in sorted(folder.glob("*/*")):
        path = found.relative_to(folder).as_posix()
        is_ours = found.name in names and found.parent.name.partition("-")[0] in tops
        if is_ours and found.is_file() and path not in files:
            changes.append(diff_text(path, _read(found), None))
    return tuple(sorted(changes, key=lambda change: change.path))


def diff_text(path: str, old: str | None, new: str | None) -> Change:
    """Compare two texts; None is a file that is not there."""
    if old == new:
        return Change(path, "none")
    before, after = (text.splitlines() if text is not None else [] for text in (old, new))
    lines = list(difflib.unified_diff(before, after, f"a/{path}", f"b/{path}", lineterm="", n=2))
    if old is not None and new is not None:
        action: Action = "recreate"
        # Lines may be the same and their ends not.
        reason = _reason(lines) or "line ends"
    else:
        action, reason = ("create", "no such file") if old is None else ("remove", "no longer planned")
    return Change(path, action, reason, tuple(_hidden(line) for line in lines))


def has_changes(changes: Sequence[Change]) -> bool:
    """Whether anything would change."""
    return any(change.action != "none" for change in changes)


def _reason(lines: Sequence[str]) -> str:
    keys: dict[str, None] = {}
    for line in lines:
        if line[:1] in "+-" and not line.startswith(("+++", "---")) and (found := _KEY.match(line[1:])):
            keys.setdefault(found[1])
    names = list(keys)
    more = f" and {len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
    return ", ".join(names[:_SHOWN_KEYS]) + more


def _hidden(line: str) -> str:
    """Hide the value of an assignment whose name sounds like a secret."""
    found = _ASSIGNMENT.search(line)
    if found is None:
        return line
    shown = redacted(found[2], found[5])
    return line if shown == found[5] else line[: found.start(5)] + shown


def _read(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="name a folder of rendered files") from error
    if len(content) > MAX_FILE_BYTES:
        raise UsageError(f"{path} is larger than any rendered file", hint="name a folder of rendered files")
    return _decode(content)


def _decode(content: bytes) -> str:
    """Bytes that are no UTF-8 stay apart from each other, so that a difference is never missed."""
    return content.decode("utf-8", "surrogateescape")
