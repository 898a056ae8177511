"""Values from outside the file: `HLAUNCH_<KEY>` variables and `--set key=value` texts, typed by the schema.

Knows: how both are written and what they may set. Refuses to know: the file, the order of layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from launcher.errors import Issue, Severity
from launcher.registry.document import Scalar
from launcher.registry.flags import Flag, find_foreign, find_negated, flags
from launcher.registry.keys import (
    DASHED,
    ENVIRONMENT,
    ENVIRONMENT_ALIASES,
    GROUPS,
    KEYS,
    RESERVED_ENVIRONMENT,
    KeySpec,
    Kind,
    canonical_key,
)
from launcher.registry.reading import read_scalar, read_variable
from launcher.registry.reserved import refusal
from launcher.registry.suggest import did_you_mean
from launcher.registry.types import Layer, Mark, Origin, Value
from launcher.registry.values import BadValue, show_text

_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_NO_MARK = Mark(0, 0)
_ITEM = re.compile(r"""\s*+(?:"((?:[^"\\]|\\.)*+)"|'((?:[^']|'')*+)'|(?!['"])([^,"]*+))\s*+(?=,|\Z)""", re.DOTALL)
"""One item of a list, possessive: nothing is tried twice, so a hostile text costs no time."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one layer sets: settings and environment variables, each with its origin."""

    settings: Mapping[str, tuple[Value, Origin]] = field(default_factory=dict)
    env: Mapping[str, tuple[Value, Origin]] = field(default_factory=dict)


def environment_layer(environ: Mapping[str, str]) -> tuple[Contribution, list[Issue]]:
    """Type the variables `HLAUNCH_<KEY>` and `HLAUNCH_<ALIAS>`; an unknown name warns."""
    settings: dict[str, tuple[Value, Origin]] = {}
    issues: list[Issue] = []
    for name in sorted(key for key in environ if key.startswith("HLAUNCH_")):
        if name in RESERVED_ENVIRONMENT:
            continue
        source = f"${name}"
        key = ENVIRONMENT.get(name) or ENVIRONMENT_ALIASES.get(name)
        if key is None:
            issues.append(_unknown_variable(name, source))
            continue
        try:
            value = read_text(KEYS[key], environ[name])
        except BadValue as error:
            issues.append(Issue("error", error.code, source, None, None, key, error.message, error.hint))
            continue
        if value is None:
            continue
        if key in settings and settings[key][0] != value:
            message = f"{settings[key][1].source} sets the same option to another value"
            issues.append(Issue("error", "two-spellings", source, None, None, key, message, "unset one of the two"))
        settings[key] = (value, Origin(Layer.ENVIRONMENT, source))
    return Contribution(settings), issues


def _unknown_variable(name: str, source: str) -> Issue:
    path, message = "", "no option has this name; the variable has no effect"
    flag = find_foreign(name.removeprefix("HLAUNCH_").lower())
    if flag is not None:
        path, message = flag.name, f"{flag.reason}; the variable has no effect"
    hint = "unset it" if flag is not None else did_you_mean(name, (*ENVIRONMENT, *ENVIRONMENT_ALIASES)) or "unset it"
    return Issue("warning", "unknown-variable", source, None, None, path, message, hint)


def flag_layer(overrides: Sequence[str]) -> tuple[Contribution, list[Issue]]:
    """Type `key=value` texts. The last of several for one key wins, as with any flag."""
    settings: dict[str, tuple[Value, Origin]] = {}
    env: dict[str, tuple[Value, Origin]] = {}
    issues: list[Issue] = []
    for text in overrides:
        written, equals, value = text.partition("=")
        written = written.strip()
        # What follows '=' may be a secret: the source names the key only. Without '=' all of it may be one.
        is_shown = written.isprintable() and len(written) <= 60 and (equals or canonical_key(written) is not None)
        source = f"--set {written}".rstrip() if is_shown else "--set"
        origin = Origin(Layer.FLAG, source)
        try:
            if not equals or not written:
                problem = "there is no key before '='" if equals else "there is no '=' in it"
                raise BadValue("bad-override", problem, "write --set key=value")
            variable = written.removeprefix("env.")
            if variable != written:
                env[variable] = (_read_override_variable(variable, value), origin)
                continue
            if canonical_key(written) is None and (flag := find_foreign(written)) is not None:
                issues.append(_flag_issue(flag, value, source))
                continue
            spec = _overridable(written)
            typed = read_text(spec, value)
            if typed is None:
                settings.pop(spec.key, None)
            else:
                settings[spec.key] = (typed, origin)
        except BadValue as error:
            issues.append(Issue("error", error.code, source, None, None, "", error.message, error.hint))
    return Contribution(settings, env), issues


def _overridable(written: str) -> KeySpec:
    key = canonical_key(written)
    if written in GROUPS:
        inner = " or ".join(f"--set {name}=value" for name in KEYS if name.startswith(f"{written}."))
        raise BadValue("wrong-type", f"{written} is a mapping", f"write {inner}")
    if key is None:
        raise unknown_key(written, "")
    spec = KEYS[key]
    if spec.is_fixed:
        raise BadValue("fixed-key", f"{key} can only be set in the registry", "edit the entry")
    if spec.kind is Kind.VARIABLES:
        raise BadValue("wrong-type", f"{key} is a mapping", f"write --set {key}.NAME=value")
    return spec


def _flag_issue(flag: Flag, value: str, source: str) -> Issue:
    """Say of an option of vLLM what a file that held it would be told."""
    code, message = flag.verdict(value)
    severity: Severity = "info" if code == "accepted-flag" else "error"
    return Issue(severity, code, source, None, None, flag.name, message, "leave it out")


def unknown_key(written: str, value: str) -> BadValue:
    """Make the error for a key that no model has, that is a group of keys, or that only vLLM has."""
    if written in GROUPS:
        inner = " or ".join(f"{name}=value" for name in KEYS if name.startswith(f"{written}."))
        return BadValue("wrong-type", f"{written} is a mapping", f"write {inner}")
    if (flag := find_foreign(written)) is not None:
        return BadValue(*flag.verdict(value), "leave it out")
    if (negated := find_negated(written)) is not None:
        hint = f"write {negated.name}=false" if negated.status == "native" else "leave it out"
        return BadValue("unknown-key", "an option is not negated here", hint)
    known = [name for name, item in DASHED.items() if not KEYS[item].is_fixed]
    known += [name for name, flag in flags().items() if flag.status != "native"]
    hint = did_you_mean(written, known) or "`hlaunch schema --keys` lists the known keys"
    return BadValue("unknown-key", f"{show_text(written)} is not a known option", hint)


def _read_override_variable(name: str, value: str) -> str | None:
    if _VARIABLE_NAME.fullmatch(name) is None:
        raise BadValue("bad-name", f"{show_text(name)} cannot name a variable", "write --set env.NAME=value")
    if value and (refused := refusal(name)) is not None:
        raise BadValue("reserved-variable", f"env.{name} {refused[0]}", refused[1])
    return read_variable(Scalar(value, "argument", _NO_MARK)) if value else None


def list_text(items: Sequence[str]) -> str:
    """Write items as the text of one flag, so that `read_text` gives them back."""
    return ", ".join('"' + re.sub(r'(["\\])', r"\\\1", item) + '"' for item in items)


def _items(text: str) -> Iterator[str]:
    """Give the items between commas; one in quotes may hold commas, as in YAML. Raises: BadValue."""
    position = 0
    while position <= len(text):
        item = _ITEM.match(text, position)
        if item is None:
            raise BadValue("bad-text", "a quote is missing, or stands inside an item", 'write [x, "y z"]')
        double, single, plain = item.groups()
        if double is not None:
            yield re.sub(r"\\([\"\\])", r"\1", double)
        else:
            yield plain.rstrip() if single is None else single.replace("''", "'")
        position = item.end() + 1


def read_text(spec: KeySpec, text: str) -> Value:
    """Type the text of a flag or a variable; empty or `null` leaves the layer silent."""
    scalar = Scalar(text, "argument", _NO_MARK)
    if scalar.is_null:
        return None
    if spec.kind is Kind.TEXTS:
        items = _items(text.strip().removeprefix("[").removesuffix("]"))
        return tuple(str(read_scalar(spec, Scalar(item, "argument", _NO_MARK))) for item in items)
    value: Value = read_scalar(spec, scalar)  # type: ignore[assignment]
    return value
