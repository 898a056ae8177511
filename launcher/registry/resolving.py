"""Layers -> one frozen entry whose every value knows its origin.

Knows: the order of precedence, names and aliases, how `--set` and `HLAUNCH_<KEY>` are typed. Refuses to know: files,
hardware, the process environment (it is an argument).

Low to high: built-in < defaults < model < `HLAUNCH_<KEY>` < `--set`. Mappings merge deeply, lists replace, an empty
value leaves a layer silent. A layer is a `Contribution`; further layers (platform, profile, cluster) are further
contributions between these.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from launcher.errors import Issue, OverrideError, RegistryInvalid, UnknownModel
from launcher.registry.document import Scalar
from launcher.registry.keys import (
    DASHED,
    ENVIRONMENT,
    GROUPS,
    KEYS,
    RESERVED_ENVIRONMENT,
    KeySpec,
    Kind,
    canonical_key,
)
from launcher.registry.reading import read_scalar, read_variable
from launcher.registry.rules import check_rules
from launcher.registry.suggest import did_you_mean
from launcher.registry.types import (
    BUILT_IN,
    Layer,
    Mark,
    ModelEntry,
    Options,
    Origin,
    Registry,
    ResolvedEntry,
    ResolvedValue,
    Value,
)
from launcher.registry.values import BadValue, show_text

_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_NO_MARK = Mark(0, 0)

Resolved = dict[str, ResolvedValue]


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one layer sets: settings and environment variables, each with its origin."""

    settings: Mapping[str, tuple[Value, Origin]] = field(default_factory=dict)
    env: Mapping[str, tuple[Value, Origin]] = field(default_factory=dict)


def find_model(registry: Registry, name: str) -> ModelEntry:
    """Return the entry with this name or alias. Raises: UnknownModel with the available names and the nearest."""
    entry = registry.models.get(name)
    if entry is None:
        entry = next((item for item in registry.models.values() if name in item.aliases), None)
    if entry is not None:
        return entry
    available = tuple(registry.models)
    known = [*available, *(alias for item in registry.models.values() for alias in item.aliases)]
    hint = did_you_mean(name, known) or "run: hlaunch list"
    shown = f"'{name}'" if name.isprintable() and len(name) <= 80 else show_text(name)
    raise UnknownModel(f"model {shown} is not in {registry.source}", available=available, hint=hint)


def resolve(
    registry: Registry,
    name: str,
    environ: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
) -> ResolvedEntry:
    """Merge all layers of one entry. `overrides` are `key=value` texts as `--set` takes them. Pure.

    Raises: UnknownModel; OverrideError for a bad variable or flag (all of them); RegistryInvalid when values that are
    fine alone break a rule together and the file is to blame.
    """
    entry = find_model(registry, name)
    outside, issues = _environment_layer(environ or {})
    flags, flag_issues = _flag_layer(overrides)
    issues += flag_issues
    errors = [issue for issue in issues if issue.severity == "error"]
    if errors:
        raise OverrideError(_count(errors), issues=errors)
    values, env = _merge([_defaults(registry), _options(entry.options, Layer.MODEL, registry.source), outside, flags])
    place = (entry.mark.line, entry.mark.column)
    issues += rule_issues(entry.name, values, env, registry.source, place)
    errors = [issue for issue in issues if issue.severity == "error"]
    if errors:
        is_outside = all(issue.line is None for issue in errors)
        raise (OverrideError if is_outside else RegistryInvalid)(_count(errors), issues=errors)
    return ResolvedEntry(entry.name, registry.path, MappingProxyType(values), MappingProxyType(env), tuple(issues))


def file_layers(registry: Registry, entry: ModelEntry) -> tuple[Resolved, Resolved]:
    """Merge the layers that the file itself holds; returns values and variables."""
    return _merge([_defaults(registry), _options(entry.options, Layer.MODEL, registry.source)])


def rule_issues(name: str, values: Resolved, env: Resolved, source: str, place: tuple[int, int]) -> list[Issue]:
    """Judge resolved values by the rules between keys; `place` is the entry's position, for a built-in to blame."""
    issues = []
    for finding in check_rules(values, env):
        variable = finding.key.removeprefix("env.")
        origin = (env[variable] if variable != finding.key else values[finding.key]).origin
        where, line, column = origin.source, origin.line, origin.column
        if where is None:
            where, (line, column) = source, place
        path = f"models.{name}.{finding.key}"
        if origin.layer is Layer.DEFAULTS:
            path = f"defaults.{finding.key}"
        issues.append(Issue(finding.severity, finding.code, where, line, column, path, finding.message, finding.hint))
    return issues


def _count(errors: list[Issue]) -> str:
    return "the settings have an error" if len(errors) == 1 else f"the settings have {len(errors)} errors"


def _merge(layers: Iterable[Contribution]) -> tuple[Resolved, Resolved]:
    values = {
        spec.key: ResolvedValue(spec.key, spec.default, BUILT_IN)
        for spec in KEYS.values()
        if spec.kind is not Kind.VARIABLES
    }
    env: Resolved = {}
    for layer in layers:
        for key, (value, origin) in layer.settings.items():
            values[key] = _over(values.get(key), key, value, origin)
        for key, (value, origin) in layer.env.items():
            env[key] = _over(env.get(key), key, value, origin)
    return values, env


def _over(below: ResolvedValue | None, key: str, value: Value, origin: Origin) -> ResolvedValue:
    shadowed = () if below is None else (*below.shadowed, ResolvedValue(key, below.value, below.origin))
    return ResolvedValue(key, value, origin, shadowed)


def _defaults(registry: Registry) -> Contribution:
    return _options(registry.defaults, Layer.DEFAULTS, registry.source)


def _options(options: Options, layer: Layer, source: str) -> Contribution:
    def placed(mark: Mark) -> Origin:
        return Origin(layer, source, mark.line, mark.column)

    return Contribution(
        {key: (item.value, placed(item.mark)) for key, item in options.settings.items()},
        {key: (item.value, placed(item.mark)) for key, item in options.env.items()},
    )


def _environment_layer(environ: Mapping[str, str]) -> tuple[Contribution, list[Issue]]:
    settings: dict[str, tuple[Value, Origin]] = {}
    issues: list[Issue] = []
    for name in sorted(key for key in environ if key.startswith("HLAUNCH_")):
        if name in RESERVED_ENVIRONMENT:
            continue
        source = f"${name}"
        key = ENVIRONMENT.get(name)
        if key is None:
            hint = did_you_mean(name, ENVIRONMENT) or "unset it"
            message = "no option has this name; the variable has no effect"
            issues.append(Issue("warning", "unknown-variable", source, None, None, "", message, hint))
            continue
        try:
            value = _read(KEYS[key], environ[name])
        except BadValue as error:
            issues.append(Issue("error", error.code, source, None, None, key, error.message, error.hint))
            continue
        if value is not None:
            settings[key] = (value, Origin(Layer.ENVIRONMENT, source))
    return Contribution(settings), issues


def _flag_layer(overrides: Sequence[str]) -> tuple[Contribution, list[Issue]]:
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
            spec = _overridable(written)
            typed = _read(spec, value)
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
        known = [name for name, item in DASHED.items() if not KEYS[item].is_fixed]
        raise BadValue(
            "unknown-key",
            f"{show_text(written)} is not a known option",
            did_you_mean(written, known) or "`hlaunch schema --keys` lists the known keys",
        )
    spec = KEYS[key]
    if spec.is_fixed:
        raise BadValue("fixed-key", f"{key} can only be set in the registry", "edit the entry")
    if spec.kind is Kind.VARIABLES:
        raise BadValue("wrong-type", f"{key} is a mapping", f"write --set {key}.NAME=value")
    return spec


def _read_override_variable(name: str, value: str) -> str | None:
    if _VARIABLE_NAME.fullmatch(name) is None:
        raise BadValue("bad-name", f"{show_text(name)} cannot name a variable", "write --set env.NAME=value")
    return read_variable(Scalar(value, "argument", _NO_MARK)) if value else None


def _read(spec: KeySpec, text: str) -> Value:
    """Type the text of a flag or a variable; empty or `null` leaves the layer silent."""
    scalar = Scalar(text, "argument", _NO_MARK)
    if scalar.is_null:
        return None
    if spec.kind is Kind.TEXTS:
        items = [part.strip() for part in text.removeprefix("[").removesuffix("]").split(",")]
        return tuple(str(read_scalar(spec, Scalar(item, "argument", _NO_MARK))) for item in items)
    value: Value = read_scalar(spec, scalar)  # type: ignore[assignment]
    return value
