"""A `vllm serve …` command line -> a registry.

Knows: how such lines are written, in a shell, in documentation, in `docker run`. Refuses to know: what options mean.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from launcher.registry.flags import find_flag, find_negated
from launcher.registry.importing.changes import Change, Entry, Imported, ImportRefused, entry_name, finish
from launcher.registry.importing.options import apply_option, quoted_option
from launcher.registry.importing.variables import apply_variables

_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.ASCII | re.DOTALL)
_GLUED_SHORT = re.compile(r"-(O|tp|pp|dp)([0-9]+)", re.ASCII)
_OPERATORS = frozenset({"|", "||", "&&", ";", "&", ">", ">>", "<", "2>", "2>&1", "&>"})
_MODULE = "vllm.entrypoints.openai.api_server"
_EXAMPLE = 'hlaunch import vllm-serve "vllm serve openai/gpt-oss-20b --tensor-parallel-size 2"'


def from_serve_line(line: str, name: str | None = None) -> Imported:
    """Convert a command line; variables set before it become `env`. Pure.

    Raises: ImportRefused when it is not one, or names no model.
    """
    try:
        words = shlex.split(line.replace("\\\r\n", " ").replace("\\\n", " "))
    except ValueError as error:
        raise ImportRefused(f"not a command line: {str(error).lower()}", hint=_EXAMPLE) from error
    before, after = _split(words)
    env, changes = apply_variables(dict(_assignments(before)))
    entry = Entry(name or "")
    options, positional = _options(after)
    model = next((value for written, value in options if written == "--model" and isinstance(value, str)), None)
    model = model or (positional[0] if positional else None)
    if model is None:
        raise ImportRefused("the line names no model", hint=_EXAMPLE)
    entry.name = name or entry_name(model)
    found = [apply_option(entry, "model", model, f"model {model}")]
    if found[0].action == "dropped":
        raise ImportRefused(f"{model!r} cannot be a model: {found[0].reason}", hint=_EXAMPLE)
    found += [Change("dropped", word, "", "a second model", entry.name) for word in positional[1:] if word != model]
    for written, value in options:
        if written != "--model":
            found.append(apply_option(entry, written, value, quoted_option(written, value)))
    return finish([entry], env, [*found, *changes], "a vllm command line")


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
