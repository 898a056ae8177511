"""What would change: files that a plan makes against those in a folder, or one text against another.

Knows: bytes. Refuses to know: who made them; rendering is deterministic, so a difference in bytes is a difference in
the plan. Values of variables named like secrets are hidden in what is shown, on whatever line they stand; what is
named like one and is none is shown where name and value both say so.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.errors import UsageError
from launcher.registry.values import is_secret_name, redacted

Action = Literal["create", "recreate", "remove", "none"]
MAX_FILE_BYTES = 8 << 20
_KEY = re.compile(r"\s*(?:- )?\"?([A-Za-z_][\w.-]*)\"?\s*(?::(?:\s|$)|=)")
_ASSIGNMENT = re.compile(r"\"?(?P<name>[A-Za-z_]\w*)\"?(?P<sign>\s*(?::(?:\s+|$)|=|:(?=[\"'])))")
_NO_SECRET = re.compile(
    r"(?:export it, do not write it here\)?||true|false|null|~|\"\"|''|\[\]|\{.*|\$\{\w.*|\"\$\{\w.*)[,\]}]*"
)
"""Values that hide nothing whatever their name: our own advice, switches, references, what opens a mapping."""
_HARMLESS = (
    # How Ray authenticates, in Ray's own words.
    (re.compile(r"RAY_AUTH_MODE"), r"token|k8s|disabled"),
    # Where a secret lies; its file is not read here.
    (re.compile(r"\w+_(?:path|file|dir)", re.IGNORECASE), r"(?:~|\.{1,2})?/[\w./-]+"),
    (re.compile(r"num_key_value_heads|(?:bos|eos|pad)_token_id"), r"[0-9]{1,9}"),
)
"""Names that only look like those of secrets, each with the values that are then harmless; any other stays hidden."""
_SCALAR = r"(?P<quote>[\"']?)(?:{})(?P=quote),?"
_BLOCK = re.compile(r"(?P<list>\[|)|[|>][-+]?")
"""A value that stands on the lines below: a list's items, or a text's lines."""
_ITEM = re.compile(r"(?P<lead>\s*(?:- )?)(?P<value>[^\s,\]}#][^,]*?)(?P<end>,?\s*)")
_HUNK = re.compile(r"@@ -(\d+)(?:,\d+)? \+(\d+)(?:,\d+)? @@")
_HIDDEN = "<hidden>"
_SHOWN_KEYS = 3
_ROLES = ("head", "worker")


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
    # A plan without workers still knows the folders of an earlier one that had some.
    tops = {path.partition("/")[0].partition("-")[0] for path in files if "/" in path} | set(_ROLES)
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
    return Change(path, action, reason, tuple(_without_secrets(lines, before, after)))


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


def _without_secrets(lines: Sequence[str], before: Sequence[str], after: Sequence[str]) -> Iterator[str]:
    """Replace each line of a difference by what may be shown of the same line of its file.

    The whole file decides: the name of a secret may stand above the lines that differ.
    """
    shown_before, shown_after = hide_secrets(before), hide_secrets(after)
    old = new = 0
    for number, line in enumerate(lines):
        hunk = _HUNK.match(line)
        if number < 2:
            yield line
        elif hunk is not None:
            # An empty side is numbered 0; none of its lines follow.
            old, new = int(hunk[1]) - 1, int(hunk[2]) - 1
            yield line
        elif line.startswith("-"):
            yield "-" + shown_before[old]
            old += 1
        else:
            yield line[:1] + shown_after[new]
            new += 1
            old += line.startswith(" ")


def hide_secrets(lines: Sequence[str]) -> list[str]:
    """Return lines of YAML, JSON or `NAME=value` with the values of secret names hidden, those below a name too."""
    shown: list[str] = []
    block: tuple[int, bool] | None = None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if block is not None and line.strip():
            depth, is_list = block
            is_below = indent > depth or (is_list and indent == depth and line.lstrip().startswith("- "))
            item = _ITEM.fullmatch(line)
            if is_below and item is not None and (not is_list or _ASSIGNMENT.match(item["value"]) is None):
                shown.append(f"{item['lead']}{_HIDDEN}{item['end']}")
                continue
            block = block if is_below else None
        text, block_kind = _hidden(line)
        shown.append(text)
        if block_kind is not None:
            block = (indent, block_kind == "list")
    return shown


def _hidden(line: str) -> tuple[str, Literal["list", "text"] | None]:
    """Hide the value of the first assignment to a secret name; say what the lines below are if it stands there."""
    for found in _ASSIGNMENT.finditer(line):
        # `secrets:` of a compose file lists names.
        if not is_secret_name(found["name"]) or found["name"] == "secrets":
            continue
        value = line[found.end() :].strip()
        if _is_harmless(found["name"], value):
            continue
        if (below := _BLOCK.fullmatch(value)) is not None and "=" not in found["sign"]:
            return line, "text" if below["list"] is None else "list"
        if _NO_SECRET.fullmatch(value) is None:
            return line[: found.end()] + _HIDDEN, None
    return redacted("", line), None


def _is_harmless(name: str, value: str) -> bool:
    """Say whether name and value both tell that no secret stands here; all the rest of the line is the value."""
    return any(
        names.fullmatch(name) and re.fullmatch(_SCALAR.format(values), value, re.ASCII) for names, values in _HARMLESS
    )


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
