"""One option of vLLM -> one key of an entry, or the reason why not.

Knows: vLLM's spellings of values where they differ from ours. Refuses to know: where options come from.
"""

from __future__ import annotations

import re

from launcher.registry.editing.writing import yaml_value
from launcher.registry.flags import find_flag, find_negated, flags
from launcher.registry.importing.changes import Change, Entry
from launcher.registry.keys import KEYS, KeySpec, Kind
from launcher.registry.overriding import list_text
from launcher.registry.suggest import did_you_mean
from launcher.registry.values import BadValue, is_secret_name, show_text

_HUMAN = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kKmMgGtT])", re.ASCII)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
_TRUE = frozenset({"", "true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})
_NOTHING = frozenset({"none", "null", "~", ""})
_OUR_DESCRIPTIONS = frozenset({"description", "aliases", "tags"})
API_KEY = "HLAUNCH_API_KEY"


def apply_option(entry: Entry, written: str, value: str | list[str] | None, shown: str = "") -> Change:
    """Take one option into an entry. `written` is its name as it stood; `value` None: a switch that was only named.

    `shown` is how the report quotes it, by default `name: value`.
    """
    name = written.lstrip("-").partition(".")[0]
    source = shown or f"{written}: {_text(value)}"
    if is_secret_name(name.upper().replace("-", "_")) and value is not None:
        source = written
    flag = find_flag(name)
    if flag is None and (negated := find_negated(name)) is not None:
        flag, value = negated, "true" if _text(value).lower() in _FALSE else "false"
    if flag is None and name.replace("_", "-") in _OUR_DESCRIPTIONS:
        return _take(entry, KEYS[name.replace("_", "-")], value, written, source)
    if flag is None:
        guess = did_you_mean(name, flags())
        return Change("dropped", source, "", f"vLLM has no such option{'; ' + guess if guess else ''}", entry.name)
    if flag.status != "native":
        return Change("dropped", source, "", flag.reason, entry.name)
    return _take(entry, KEYS[flag.name], value, written, source)


def _take(entry: Entry, spec: KeySpec, value: str | list[str] | None, written: str, source: str) -> Change:
    if spec.kind is Kind.SECRET:
        entry.settings[spec.key] = f'"${{{API_KEY}}}"'
        reason = f"the key itself is left out: export {API_KEY}"
        return Change("renamed", source, f"{spec.key}: ${{{API_KEY}}}", reason, entry.name)
    text = _text(value)
    if spec.kind is Kind.BOOLEAN:
        text = "true" if text.lower() in _TRUE else "false" if text.lower() in _FALSE else text
    elif text.lower() in _NOTHING:
        return Change("dropped", source, "", "no value: the default stands", entry.name)
    if spec.key == "trust-remote-code" and text == "true":
        return Change("dropped", source, "", "hlaunch never runs code that comes with a model", entry.name)
    if spec.kind in (Kind.TOKENS, Kind.INTEGER, Kind.SIZE):
        text = _number(text)
    if spec.kind is Kind.TEXTS and isinstance(value, list):
        text = list_text(value)
    try:
        taken = yaml_value(spec, text)
    except BadValue as error:
        return Change("dropped", source, "", error.message, entry.name)
    if (refused := spec.refusal_of(text)) is not None:
        return Change("dropped", source, "", refused, entry.name)
    entry.settings[spec.key] = taken
    result = f"{spec.key}: {entry.settings[spec.key]}"
    same = written.lstrip("-").replace("_", "-") == spec.key and written.lstrip("-") == spec.key
    return Change("kept" if same else "renamed", source, result, "", entry.name)


def _number(text: str) -> str:
    """vLLM counts 1k as 1000 and 1K as 1024; we write the number out."""
    match = _HUMAN.fullmatch(text)
    if match is None:
        return text
    base = 1000 if match[2].islower() else 1024
    return str(int(float(match[1]) * base ** _POWERS[match[2].lower()]))


def _text(value: str | list[str] | None) -> str:
    if value is None:
        return ""
    return ",".join(value) if isinstance(value, list) else value


def quoted_option(written: str, value: str | list[str] | None) -> str:
    """An option as a command line has it, cut for a report."""
    words = [] if value is None else value if isinstance(value, list) else [value]
    cut = [word if word.isprintable() and len(word) <= 60 else show_text(word) for word in words]
    return " ".join([written, *cut])
