"""Where in a registry's text a value is replaced or a pair inserted, and with what.

Knows: positions, block and flow style, indentation, line ends. Refuses to know: keys' meaning, files, whether the
result is a registry (`edits` proves that).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from launcher.errors import HlaunchError
from launcher.exit_codes import ExitCode
from launcher.registry.editing.spans import Span
from launcher.registry.shapes import MODEL

_STEP = 2


class EditRefused(HlaunchError):
    """The text cannot be changed in this one place without touching another."""

    exit_code = ExitCode.REGISTRY_INVALID


def change(text: str, entry: Span, path: tuple[str, ...], written: str) -> tuple[int, int, str]:
    """Return the range to replace and its new text, so that `path` below `entry` has the value that is `written`.

    Raises: EditRefused where that would reach further.
    """
    node = entry
    for depth, part in enumerate(path):
        pair = _pair_of(node, part, is_key=depth == 0)
        rest = path[depth + 1 :]
        if pair is None:
            start, new = _insertion(text, node, f"{part}: {_flow_value(rest, written)}")
            return start, start, new
        key, value = pair
        if not rest:
            return _replacement(text, key, value, written)
        if value.kind == "mapping":
            node = value
        elif value.kind == "scalar":
            return _replacement(text, key, value, _flow_value(rest, written))
        else:
            raise EditRefused(f"{part} is written by reference", hint="edit the file where its text stands")
    raise AssertionError("a path has a last part")


def _replacement(text: str, key: Span, value: Span, written: str) -> tuple[int, int, str]:
    if value.is_empty:
        gap = "" if text[value.start - 1].isspace() else " "
        return value.start, value.start, gap + written
    start, end = value.start, value.end
    if value.anchor:
        prefix = re.match(r"&\S+\s+", text[start:end])
        start += prefix.end() if prefix is not None else 0
    if value.is_block and value.kind == "scalar":
        # The text of `|` and `>` ends behind its last line break, and behind empty lines that part it from the next.
        return start, start + len(text[start:end].rstrip()), written
    if value.is_block:
        if "#" in text[start:end]:
            raise EditRefused("the value holds comments", hint="edit it by hand, or move them above the key")
        colon = text.index(":", key.end)
        if not text[colon + 1 : start].strip():
            return colon + 1, end, f" {written}"
    return start, end, written


def _insertion(text: str, node: Span, pair: str) -> tuple[int, str]:
    if not node.is_block:
        return into_flow(text, node, pair)
    return after_line(text, node.leaf(), [indent_of(text, node.pairs[0][0].start) + pair])


def into_flow(text: str, node: Span, pair: str) -> tuple[int, str]:
    if node.pairs and not node.pairs[-1][1].is_empty:
        return node.pairs[-1][1].end, f", {pair}"
    opening = text.index("{", node.start) + 1
    return opening, f"{pair}, " if node.pairs else pair


def first_entry(text: str, root: Span | None, body: list[str], flow: str) -> tuple[int, int, str]:
    """Return the range to replace and its new text, so that a registry without models has one.

    The entry is `body`, lines of a block, or `flow` where the registry itself stands in braces.
    Raises: EditRefused where the place of the models holds something else.
    """
    newline = line_break(text)
    block = newline + newline.join(body)
    models = value_of(root, "models")
    if root is not None and root.kind == "mapping" and not root.is_block:
        if models is None:
            start, new = into_flow(text, root, f"models: {{{flow}}}")
            return start, start, new
        return _replacement(text, models, models, f"{{{flow}}}")
    if models is None:
        gap = newline if text and not text.endswith("\n") else ""
        return len(text), len(text), f"{gap}models:{block}{newline}"
    if models.kind == "alias" or "#" in text[models.start : models.end]:
        raise EditRefused("models is written by reference, or with comments", hint="edit the file by hand")
    # A comment behind the braces stays on the line of the key.
    comment = text[models.end :].partition("\n")[0].rstrip()
    return len(text[: models.start].rstrip(" ")), models.end + len(comment), comment + block


def after_line(text: str, leaf: Span, lines: list[str]) -> tuple[int, str]:
    """Insert whole lines behind the one on which a node ends, its comment included."""
    newline = line_break(text)
    body = newline.join(lines)
    if leaf.is_block and text[: leaf.end].endswith("\n"):
        return leaf.end, body + newline
    stop = text.find("\n", leaf.end)
    rest = text[leaf.end : stop if stop >= 0 else len(text)].strip()
    if rest and not rest.startswith("#"):
        raise EditRefused("something follows on the same line", hint="edit the file by hand")
    return (stop + 1, body + newline) if stop >= 0 else (len(text), newline + body)


def indent_of(text: str, start: int) -> str:
    line = text[text.rfind("\n", 0, start) + 1 : start]
    if set(line.strip()) <= {"-", " "}:
        # An item of a sequence: its other keys stand below the first, without the dash.
        return line.replace("-", " ")
    if line.strip():
        raise EditRefused("the first key does not begin its line", hint="edit the file by hand")
    return line


def step_of(text: str, models: Span, indent: str) -> str:
    for _, value in models.pairs:
        if value.kind == "mapping" and value.is_block:
            return " " * max(1, len(indent_of(text, value.pairs[0][0].start)) - len(indent))
    return " " * _STEP


def has_gap(text: str, models: Span) -> bool:
    """Whether an empty line parts the last two entries."""
    between = text[models.pairs[-2][1].leaf().end : models.pairs[-1][0].start]
    return re.search(r"\n[ \t]*\r?\n", between) is not None


def line_break(text: str) -> str:
    first = text.find("\n")
    return "\r\n" if first > 0 and text[first - 1] == "\r" else "\n"


def _pair_of(node: Span, name: str, *, is_key: bool) -> tuple[Span, Span] | None:
    for key, value in node.pairs:
        if key.kind == "scalar" and (key.text == name or (is_key and MODEL.canonical(key.text) == name)):
            return key, value
        if key.kind == "scalar" and not is_key and key.text.replace("_", "-") == name:
            return key, value
    return None


def value_of(node: Span | None, name: str) -> Span | None:
    pairs = node.pairs if node is not None else []
    return next((value for key, value in pairs if key.kind == "scalar" and key.text == name), None)


def _flow_value(path: Sequence[str], written: str) -> str:
    return "{" + flow_of(path, written) + "}" if path else written


def flow_of(path: Sequence[str], written: str) -> str:
    return f"{path[0]}: {_flow_value(path[1:], written)}"
