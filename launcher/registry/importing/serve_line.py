"""A `vllm serve …` command line -> a registry.

Knows: how such lines are written, in a shell, in documentation, in `docker run`. Refuses to know: what options mean.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace

from launcher.registry.flags import find_flag, find_negated
from launcher.registry.importing.changes import Change, Entry, Imported, ImportRefused, Judge, entry_name, finish
from launcher.registry.importing.docker_line import container_changes
from launcher.registry.importing.options import apply_option, quoted_option
from launcher.registry.importing.variables import apply_variables
from launcher.registry.importing.yaml_files import config_options

_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.ASCII | re.DOTALL)
_GLUED_SHORT = re.compile(r"-(O|tp|pp|dp)([0-9]+)", re.ASCII)
_OPERATORS = frozenset({"|", "||", "&&", ";", "&", ">", ">>", "<", "2>", "2>&1", "&>"})
_MODULE = "vllm.entrypoints.openai.api_server"
_KEY = "VLLM_API_KEY"
_EXAMPLE = 'hlaunch import vllm-serve "vllm serve openai/gpt-oss-20b --tensor-parallel-size 2"'


def from_serve_line(
    line: str,
    name: str | None = None,
    read_config: Callable[[str], str | None] | None = None,
    judge: Judge | None = None,
) -> Imported:
    """Convert a command line; variables set before it become `env`. Pure, but for `read_config` and `judge`.

    `read_config` returns the text of the file that `--config` names, None when it is not there.
    Raises: ImportRefused when it is not one, or names no model; RegistryInvalid for a `--config` that is no YAML.
    """
    try:
        words = _words(line.replace("\\\r\n", " ").replace("\\\n", " "))
    except ValueError as error:
        raise ImportRefused(f"not a command line: {str(error).lower()}", hint=_EXAMPLE) from error
    before, after = _split(words)
    variables = dict(_assignments(before))
    has_key = variables.pop(_KEY, None) is not None or _KEY in before
    env, changes = apply_variables(variables)
    entry = Entry(name or "")
    options, positional = _options(after)
    own = [value for value in (_model_of(options), *positional) if value is not None]
    options, told = _with_config(options, read_config)
    model = own[0] if own else _model_of(options)
    if model is None:
        details = [f"{change.source}: {change.reason}" for change in told if change.reason]
        raise ImportRefused("the line names no model", hint=_EXAMPLE, details=details)
    entry.name = name or entry_name(model)
    found = [apply_option(entry, "model", model, f"model {model}")]
    if found[0].action == "dropped":
        raise ImportRefused(f"{model!r} cannot be a model: {found[0].reason}", hint=_EXAMPLE)
    found += [Change("dropped", word, "", "a second model", entry.name) for word in positional[1:] if word != model]
    found += told
    for written, value in options:
        if written != "--model":
            found.append(apply_option(entry, written, value, quoted_option(written, value)))
    if has_key and "api-key" not in entry.settings:
        found.append(replace(apply_option(entry, "api-key", ""), source=_KEY))
    published = container_changes(before, entry)
    found = [_behind(change, published) for change in found]
    return finish([entry], env, [*found, *published, *changes], "a vllm command line", judge)


def _behind(change: Change, published: Sequence[Change]) -> Change:
    """A port inside the container is none of the entry's where another is published for it."""
    over = [item for item in published if item.result.startswith("port: ") and item.result != change.result]
    if not over or not change.result.startswith("port: "):
        return change
    reason = f"the port inside the container: clients come to that of {over[-1].source}"
    return replace(change, action="dropped", result="", reason=reason)


def _model_of(options: Sequence[tuple[str, str | list[str] | None]]) -> str | None:
    return next((value for written, value in options if written == "--model" and isinstance(value, str)), None)


def _words(line: str) -> list[str]:
    """Split as a shell does, without comments. Raises: ValueError for a quotation without an end."""
    words: list[str] = []
    pending = ""
    for text in line.splitlines():
        pending += text
        try:
            found = shlex.split(pending)
        except ValueError:
            # A quotation over several lines, or an apostrophe in a comment.
            head, sign, _ = pending.partition(" #")
            if not sign:
                pending += "\n"
                continue
            found = shlex.split(head)
        words += found[: next((index for index, word in enumerate(found) if word.startswith("#")), len(found))]
        pending = ""
    if pending:
        raise ValueError("no closing quotation")
    return words


def _with_config(
    options: list[tuple[str, str | list[str] | None]], read_config: Callable[[str], str | None] | None
) -> tuple[list[tuple[str, str | list[str] | None]], list[Change]]:
    """Put what `--config` names below what the line says itself."""
    kept: list[tuple[str, str | list[str] | None]] = []
    below: dict[str, str | list[str]] = {}
    told = []
    for written, value in options:
        if written != "--config" or not isinstance(value, str):
            kept.append((written, value))
            continue
        text = read_config(value) if read_config is not None else None
        if text is None:
            reason = f"the file is not here: hlaunch import vllm-config {value}"
            told.append(Change("dropped", quoted_option(written, value), "", reason))
            continue
        found = config_options(text, value)
        below |= found
        told.append(Change("kept", quoted_option(written, value), f"{len(found)} options of the file"))
    said = {_plain_name(written) for written, _ in kept}
    below_options = [
        ("--model" if _plain_name(key) in ("model", "model-tag") else f"--{key}", value)
        for key, value in below.items()
        if _plain_name(key) not in said
    ]
    return [*below_options, *kept], told


def _plain_name(written: str) -> str:
    flag = find_flag(written.lstrip("-"))
    return flag.name if flag is not None else written.lstrip("-").replace("_", "-")


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before vLLM's own, and its arguments."""
    for index, word in enumerate(words):
        program = word.rsplit("/", 1)[-1]
        if program == "vllm" and list(words[index + 1 : index + 2]) == ["serve"]:
            start = index + 2
        elif word == _MODULE or program == "api_server.py" or re.fullmatch(r"vllm-openai(:\S+)?", program):
            start = index + 1
        else:
            continue
        after = list(words[start:])
        if after[:2] == ["vllm", "serve"]:
            # An image whose program is named once more.
            after = after[2:]
        end = next((k for k, item in enumerate(after) if item in _OPERATORS), len(after))
        return list(words[:index]), after[:end]
    raise ImportRefused("this is no `vllm serve` line", hint=_EXAMPLE)


def _assignments(words: Sequence[str]) -> list[tuple[str, str]]:
    """`NAME=value` before the command, also behind `export`, `env` and docker's `-e`."""
    found = []
    for word in words:
        match = _ASSIGNMENT.fullmatch(word.removeprefix("--env="))
        if match is not None:
            found.append((match[1], match[2]))
    return found


def _options(words: Sequence[str]) -> tuple[list[tuple[str, str | list[str] | None]], list[str]]:
    """Options with their values as vLLM's parser would take them, and the words that belong to none."""
    options: list[tuple[str, str | list[str] | None]] = []
    positional: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or re.fullmatch(r"-[0-9.]+", word):
            positional.append(word)
            continue
        if glued := _GLUED_SHORT.fullmatch(word):
            options.append((f"-{glued[1]}", glued[2]))
            continue
        written, equals, value = word.partition("=")
        name = written.lstrip("-").partition(".")[0]
        flag = find_flag(name)
        if equals:
            options.append((written, value))
        elif (flag is not None and flag.arity == "switch" and "." not in written) or find_negated(name) is not None:
            options.append((written, None))
        elif flag is not None and flag.arity == "list":
            taken = []
            while rest and not _is_option(rest[0]):
                taken.append(rest.pop(0))
            options.append((written, taken))
        else:
            options.append((written, rest.pop(0) if rest and not _is_option(rest[0]) else None))
    return options, positional


def _is_option(word: str) -> bool:
    return word.startswith("-") and re.fullmatch(r"-[0-9.]+", word) is None
