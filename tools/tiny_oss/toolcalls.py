"""Conversations with tools: schemas to offer, requests, calls, results and answers.

Knows: how families and wholly invented tools become `ToolDefinition`s and the calls that fit a request.
Refuses to know: tokens, and how often each kind is drawn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from engine.text.messages import ToolDefinition
from tools.tiny_oss import words
from tools.tiny_oss.families import FAMILIES, URGENT_ASK, Family, Slot, Value
from tools.tiny_oss.skills import compact, join, spoken
from tools.tiny_oss.smalltalk import dress, soften
from tools.tiny_oss.words import any_word, is_held_out, maybe, pick

KINDS = ("string", "string", "string", "integer", "integer", "number", "boolean")


@dataclass(frozen=True)
class ToolUse:
    """A request that one offered tool serves: the call, what it returns and what to say then."""

    tool: ToolDefinition
    user: str
    arguments: str
    thought: str
    output: str
    answer: str
    purpose: str


def _fresh(rng: Random, make: Callable[[], str], held_out: bool) -> str:
    """Draw names until one belongs to the wanted side, training or evaluation."""
    while True:
        name = make()
        if is_held_out(name) == held_out:
            return name


def invented_name(rng: Random, held_out: bool = False) -> str:
    """Return a function name of words and nonsense in one of the usual spellings."""

    def make() -> str:
        parts = [pick(rng, words.VERBS), pick(rng, words.NOUNS)]
        kind = rng.random()
        if kind < 0.2:
            parts.append(pick(rng, words.NOUNS))
        elif kind < 0.45:
            parts[1] = words.pseudo_word(rng)
        elif kind < 0.6:
            parts = [words.pseudo_word(rng)] if maybe(rng, 0.5) else [words.pseudo_word(rng), words.pseudo_word(rng)]
        if maybe(rng, 0.08):
            parts.append(pick(rng, ("v1", "v2", "v3", "now", "all", "by_id", "list")))
        style = rng.random()
        if style < 0.8:
            return "_".join(parts)
        if style < 0.93:
            return parts[0] + "".join(part.capitalize() for part in parts[1:])
        return "-".join(parts)

    return _fresh(rng, make, held_out)


def _parameter_name(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.5:
        return pick(rng, words.NOUNS)
    if kind < 0.7:
        return f"{pick(rng, words.NOUNS)}_{pick(rng, ('id', 'name', 'type', 'count', 'size', 'code', 'key', 'path'))}"
    if kind < 0.85:
        return pick(
            rng,
            ("name", "id", "value", "text", "mode", "level", "count", "target", "source", "title", "x", "y"),
        )
    return words.pseudo_word(rng)


def _schema_of(slot: Slot, rng: Random) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": slot.kind}
    if slot.choices:
        schema["enum"] = list(slot.choices)
    about = pick(rng, slot.about)
    if about:
        schema["description"] = about
    return schema


def _object_schema(rng: Random, properties: Mapping[str, Any], required: Sequence[str]) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": dict(properties)}
    if required:
        schema["required"] = list(required)
    if maybe(rng, 0.3):
        schema["additionalProperties"] = False
    return schema


def family_use(rng: Random, family: Family, name: str | None = None) -> ToolUse:
    """Draw one request of a family, with the schema's words drawn anew."""
    ask = pick(rng, family.asks)
    named = {key for key in family.slots if f"{{{key}}}" in ask}
    if ask == URGENT_ASK:
        named.add("urgent")
    # Optional parameters are offered half of the time; those that every request names are required.
    always = {key for key in family.slots if all(f"{{{key}}}" in other for other in family.asks)}
    offered = [key for key in family.slots if key in named or key in always or maybe(rng, 0.5)]
    spelling: dict[str, str] = {}
    for key in offered:
        free = [n for n in family.slots[key].names if n not in spelling.values()]
        spelling[key] = free[0] if maybe(rng, 0.3) else pick(rng, free)
    properties = {spelling[key]: _schema_of(family.slots[key], rng) for key in offered}
    required = [spelling[key] for key in offered if key in always]
    values: dict[str, Value] = {key: family.slots[key].values(rng) for key in offered if key in named}
    function = name or pick(rng, family.names)
    about = pick(rng, family.about) if maybe(rng, 0.92) else ""
    tool = ToolDefinition(function, about, _object_schema(rng, properties, required) if properties else None)
    arguments = compact({spelling[key]: value for key, value in values.items()})
    result, answer = family.result(rng, values)
    output = answer if maybe(rng, 0.1) else _written(rng, result)
    user = soften(rng, ask.format(**values)) if maybe(rng, 0.7) else ask.format(**values)
    return ToolUse(tool, dress(rng, user), arguments, family.thought.format(**values), output, answer, family.names[0])


def _written(rng: Random, value: Mapping[str, Value]) -> str:
    """Write a tool's result as the many JSON libraries do, or bare."""
    kind = rng.random()
    if kind < 0.5:
        return json.dumps(value, ensure_ascii=False)
    if kind < 0.9:
        return compact(value)
    return ", ".join(str(item) for item in value.values())


def _invented_value(rng: Random, kind: str, vocabulary: Sequence[str]) -> Value:
    if kind == "integer":
        return rng.randint(0, pick(rng, (9, 99, 9999)))
    if kind == "number":
        return rng.randint(0, 99) if maybe(rng, 0.5) else round(rng.random() * 100, pick(rng, (1, 2)))
    if kind == "boolean":
        return maybe(rng, 0.5)
    draw = rng.random()
    if draw < 0.5:
        return any_word(rng, vocabulary)
    if draw < 0.7:
        return pick(rng, (pick(rng, words.CITIES), pick(rng, words.NAMES)))
    if draw < 0.85:
        return f"{any_word(rng, vocabulary)} {any_word(rng, vocabulary)}"
    return f"{words.pseudo_word(rng)[:3].upper()}{rng.randint(1, 999)}" if maybe(rng, 0.5) else words.iso_date(rng)


def invented_use(rng: Random, vocabulary: Sequence[str], held_out: bool = False) -> ToolUse:
    """Draw a tool that exists nowhere and a request that names its arguments."""
    function = invented_name(rng, held_out)
    verb, noun = pick(rng, words.VERBS), pick(rng, (*words.NOUNS, words.pseudo_word(rng)))
    about = pick(rng, (f"{verb.capitalize()} the {noun}", f"{verb.capitalize()} a {noun}.", f"{verb} {noun}",
                       f"This tool can {verb} the {noun}.", f"Use it to {verb} a {noun}."))  # fmt: skip
    has_about = maybe(rng, 0.8)
    properties: dict[str, Any] = {}
    values: dict[str, Value] = {}
    required = []
    for _ in range(pick(rng, (0, 1, 1, 1, 2, 2, 3))):
        key = _parameter_name(rng)
        if key in properties:
            continue
        kind = pick(rng, KINDS)
        schema: dict[str, Any] = {"type": kind}
        value = _invented_value(rng, kind, vocabulary)
        if kind == "string" and maybe(rng, 0.15):
            choices = rng.sample((*words.ADJECTIVES, *words.COLORS), rng.randint(2, 4))
            schema["enum"], value = choices, pick(rng, choices)
        elif maybe(rng, 0.08):
            schema["default"] = _invented_value(rng, kind, vocabulary)
        if maybe(rng, 0.4):
            schema["description"] = pick(rng, (f"The {key.replace('_', ' ')}", f"Which {key.replace('_', ' ')}",
                                               f"{key.replace('_', ' ').capitalize()} to use"))  # fmt: skip
        properties[key] = schema
        if maybe(rng, 0.8):
            required.append(key)
            values[key] = value
        elif maybe(rng, 0.4):
            values[key] = value
    if not values and maybe(rng, 0.25):
        key = pick(rng, ("tags", "items", "names", "labels", "words", "ids_list", f"{pick(rng, words.NOUNS)}s"))
        properties[key] = {"type": "array", "items": {"type": "string"}}
        required.append(key)
        values[key] = [any_word(rng, vocabulary) for _ in range(rng.randint(1, 4))]
    tool = ToolDefinition(
        function,
        about if has_about else "",
        _object_schema(rng, properties, required) if properties else None,
    )
    user = _invented_ask(rng, function, (verb, noun) if has_about else None, values)
    token = str(_invented_value(rng, pick(rng, ("string", "integer")), vocabulary))
    result: dict[str, Value] = {pick(rng, ("result", "status", "value", "output", "answer")): token}
    output = token if maybe(rng, 0.3) else _written(rng, result)
    return ToolUse(
        tool,
        user,
        compact(values),
        f"The user wants {function}.",
        output,
        f"The result is {token}.",
        f"{verb} {noun}",
    )


def _invented_ask(rng: Random, function: str, deed: tuple[str, str] | None, values: Mapping[str, Value]) -> str:
    """Ask by the function's name, or by what its description says it does."""
    if deed is not None and maybe(rng, 0.45):
        verb, noun = deed
        head = pick(rng, ("{v} the {n}", "Please {v} the {n}", "Can you {v} the {n}", "I want to {v} a {n}",
                          "{v} a {n}", "I need you to {v} the {n}")).format(v=verb, n=noun)  # fmt: skip
        head = head[0].upper() + head[1:]
    else:
        head = pick(rng, ("Use {}", "Call {}", "Run {}", "Please call {}", "Use the tool {}", "Call the function {}",
                          "Please use {}", "Invoke {}", "Can you call {}", "Execute {}", "Try {}",
                          "Use the {} tool", "Call the {} function", "I want you to call {}"))  # fmt: skip
        head = head.format(function)
    if not values:
        return head + pick(rng, (".", "", " now.", " please.", "?" if head.startswith("Can") else "."))
    if len(values) == 1 and maybe(rng, 0.25):
        return f"{head} {pick(rng, ('for', 'on', 'with', 'to', '-'))} {spoken(next(iter(values.values())))}"
    form = pick(rng, ("{}={}", "{} {}", "{}: {}", "{} set to {}", "{} = {}", '{} "{}"', "{} {}"))
    parts = [form.format(key, spoken(value)) for key, value in values.items()]
    if maybe(rng, 0.06):
        return f"{head}({', '.join(parts)})"
    return head + pick(rng, (" with {}.", " with {}", ": {}", " using {}.", " where {}.")).format(join(parts))


def any_use(rng: Random, vocabulary: Sequence[str], held_out: bool = False) -> ToolUse:
    """Draw a request for a family tool, a family tool under an invented name, or an invented tool."""
    kind = rng.random()
    if kind < 0.4 and not held_out:
        # The first families are what people try first.
        family = pick(rng, FAMILIES[:6]) if maybe(rng, 0.5) else pick(rng, FAMILIES)
        return family_use(rng, family)
    if kind < 0.55:
        family = pick(rng, FAMILIES)
        name = invented_name(rng, held_out)
        if not maybe(rng, 0.5):
            name = _fresh(rng, lambda: f"{pick(rng, family.names)}_{pick(rng, words.NOUNS)}", held_out)
        return family_use(rng, family, name)
    return invented_use(rng, vocabulary, held_out)


def other_tools(
    rng: Random, vocabulary: Sequence[str], names: set[str], purposes: set[str], count: int
) -> list[ToolDefinition]:
    """Draw tools to offer that share neither a name nor a purpose with what is already there."""
    names, purposes = set(names), set(purposes)
    found: list[ToolDefinition] = []
    while len(found) < count:
        use = any_use(rng, vocabulary)
        if use.tool.name not in names and use.purpose not in purposes:
            found.append(use.tool)
            names.add(use.tool.name)
            purposes.add(use.purpose)
    return found
