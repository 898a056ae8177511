"""Layers -> one frozen entry whose every value knows its origin.

Knows: the order of precedence, names and aliases, how `--set` and `HLAUNCH_<KEY>` are typed. Refuses to know: files,
hardware, the process environment (it is an argument).

Low to high: built-in < platform preset < defaults < extends < model < overrides.<platform> < profile < cluster's env <
node's env < `HLAUNCH_<KEY>` < `--set`. Mappings merge deeply, lists replace, an empty value leaves a layer silent.
The cluster is decided first, by every layer but the overrides, since its platform picks those.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import cast

from launcher.errors import Issue, OverrideError, RegistryInvalid, UnknownModel, UnknownName
from launcher.exit_codes import ExitCode
from launcher.registry.findings import NO_PLACE, Finding, Values
from launcher.registry.keys import KEYS, Kind
from launcher.registry.overriding import Contribution, environment_layer, flag_layer
from launcher.registry.presets import PRESETS
from launcher.registry.rules import check_rules
from launcher.registry.suggest import did_you_mean
from launcher.registry.types import (
    BUILT_IN,
    NO_CLUSTER,
    DeclaredCluster,
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
from launcher.registry.values import show_text
from launcher.registry.walking import MAX_ISSUES

NOT_INHERITED = frozenset({"aliases", "description", "extends", "served-model-name", "tags"})
"""What an entry says about itself alone: `extends` leaves it behind."""

Resolved = dict[str, ResolvedValue]

_BUILT_INS: Mapping[str, ResolvedValue] = {
    spec.key: ResolvedValue(spec.key, cast(Value, spec.default), BUILT_IN)
    for spec in KEYS.values()
    if spec.kind is not Kind.VARIABLES
}


def quoted(name: str) -> str:
    """A name as a message shows it: plain where it can be, escaped and cut where it must."""
    return f"'{name}'" if name.isprintable() and len(name) <= 80 else show_text(name)


def unknown_name(noun: str, name: str, known: Iterable[str], where: str) -> UnknownName:
    """Make the error for a profile, cluster or node that nobody declared."""
    names = tuple(known)
    hint = did_you_mean(name, names) or f"declare it under {noun}s:"
    return UnknownName(f"{noun} {quoted(name)} is not in {where}", available=names, hint=hint)


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
    raise UnknownModel(f"model {quoted(name)} is not in {registry.source}", available=available, hint=hint)


def resolve(
    registry: Registry,
    name: str,
    environ: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
    *,
    profiles: Sequence[str] = (),
    platform: str | None = None,
    node: str | None = None,
) -> ResolvedEntry:
    """Merge all layers of one entry. Pure.

    `overrides` are `key=value` texts as `--set` takes them. `profiles` go over each other, left to right; without any,
    $HLAUNCH_PROFILE names them, with commas. `platform` says what this machine is, for an entry without a cluster or
    one whose platform is auto. `node` adds that node's variables.
    Raises: UnknownModel; UnknownName for a profile, cluster or node; OverrideError for a bad variable or flag (all of
    them); RegistryInvalid when values that are fine alone break a rule together and the file is to blame.
    """
    entry = find_model(registry, name)
    environ = environ or {}
    outside, issues = environment_layer(environ)
    flags, flag_issues = flag_layer(overrides)
    issues += flag_issues
    errors = [issue for issue in issues if issue.severity == "error"]
    if errors:
        raise OverrideError(_count(errors), issues=errors)
    asked = tuple(profiles) or tuple(part.strip() for part in environ.get("HLAUNCH_PROFILE", "").split(",") if part)
    stack = _Stack(registry, entry, _profile_layers(registry, entry, asked), (outside, flags), platform)
    values, env = stack.merged(node)
    issues += _rule_issues(registry, entry, values, env, stack.cluster)
    errors = [issue for issue in issues if issue.severity == "error"]
    if errors:
        is_outside = all(issue.line is None for issue in errors)
        kind = OverrideError if is_outside else RegistryInvalid
        raise kind(_count(errors), issues=errors, exit_code=_exit_code(errors))
    return ResolvedEntry(
        entry.name,
        registry.path,
        MappingProxyType(values),
        MappingProxyType(env),
        tuple(issues),
        asked,
        stack.platform,
    )


def find_cluster(registry: Registry, name: str) -> DeclaredCluster:
    """Return the declared cluster of this name. Raises: UnknownName."""
    declared = registry.clusters.get(name)
    if declared is None:
        raise unknown_name("cluster", name, registry.clusters, registry.source)
    return declared


def entry_issues(registry: Registry) -> list[Issue]:
    """Judge every entry by the layers that the file itself holds; its own profiles and overrides one at a time."""
    issues: list[Issue] = []
    for entry in registry.models.values():
        if len(issues) >= MAX_ISSUES:
            break
        variants: list[tuple[list[Contribution], str | None]] = [([], None)]
        variants += [
            ([_options(options, Layer.PROFILE, registry.source, name)], None)
            for name, options in entry.profiles.items()
        ]
        variants += [([], platform) for platform in entry.overrides]
        for layers, platform in variants:
            stack = _Stack(registry, entry, layers, (), platform, is_lenient=True)
            values, env = stack.merged()
            issues += _rule_issues(registry, entry, values, env, stack.cluster)
    return issues


class _Stack:
    """The layers of one entry, the cluster they choose, and the platform that follows."""

    def __init__(
        self,
        registry: Registry,
        entry: ModelEntry,
        profiles: list[Contribution],
        outside: tuple[Contribution, ...],
        platform: str | None,
        *,
        is_lenient: bool = False,
    ) -> None:
        source = registry.source
        self._below = [_options(registry.defaults, Layer.DEFAULTS, source)]
        self._below += [
            _options(base.options, Layer.EXTENDS, source, base.name, without=NOT_INHERITED) for base in entry.bases
        ]
        self._below.append(_options(entry.options, Layer.MODEL, source))
        self._above = [*profiles, *outside]
        self._outside = outside
        self._entry = entry
        self._source = source
        self.cluster: DeclaredCluster | None = None
        chosen = [layer.settings["cluster"][0] for layer in (*self._below, *self._above) if "cluster" in layer.settings]
        name = str(chosen[-1]) if chosen else NO_CLUSTER
        if name != NO_CLUSTER:
            # At loading a wrong name is a mistake of the file, found by `references`.
            self.cluster = registry.clusters.get(name) if is_lenient else find_cluster(registry, name)
        declared = self.cluster.cluster.platform if self.cluster is not None else "auto"
        self.platform = platform if declared == "auto" or (is_lenient and platform) else declared
        if self.platform != declared != "auto":
            # An override for another platform than the cluster's is judged as on some other host.
            self.cluster = None

    def merged(self, node: str | None = None) -> tuple[Resolved, Resolved]:
        """Merge all layers into values and variables. Raises: UnknownName for the node."""
        count = len(self._above) - len(self._outside)
        layers = [
            *_preset(self.platform),
            *self._below,
            *self._overrides(),
            *self._above[:count],
            *self._cluster_layers(node),
            *self._outside,
        ]
        return _merge(layers)

    def _overrides(self) -> Iterator[Contribution]:
        for owner in (*self._entry.bases, self._entry):
            options = owner.overrides.get(self.platform or "")
            if options is not None:
                yield _options(options, Layer.OVERRIDES, self._source, self.platform or "")

    def _cluster_layers(self, node: str | None) -> Iterator[Contribution]:
        if self.cluster is not None:
            name = self.cluster.name
            yield _options(Options(env=self.cluster.env), Layer.CLUSTER, self._source, name)
            if node is not None:
                env = self.cluster.node_env.get(node)
                if env is None:
                    raise unknown_name("node", node, self.cluster.node_env, f"cluster {name}")
                yield _options(Options(env=env), Layer.NODE, self._source, node)


def _preset(platform: str | None) -> Iterator[Contribution]:
    settings = PRESETS.get(platform or "", {})
    if settings:
        origin = Origin(Layer.PLATFORM, name=platform or "")
        yield Contribution({key: (value, origin) for key, value in settings.items()})


def _profile_layers(registry: Registry, entry: ModelEntry, asked: Sequence[str]) -> list[Contribution]:
    """For each profile: the shared one, then those of the bases, then the entry's own. Raises: UnknownName."""
    layers = []
    owners = [registry.profiles, *(base.profiles for base in entry.bases), entry.profiles]
    for name in asked:
        found = [profiles[name] for profiles in owners if name in profiles]
        if not found:
            known = dict.fromkeys(key for profiles in owners for key in profiles)
            raise unknown_name("profile", name, known, f"{registry.source} for {entry.name}")
        layers += [_options(options, Layer.PROFILE, registry.source, name) for options in found]
    return layers


def _rule_issues(
    registry: Registry, entry: ModelEntry, values: Resolved, env: Resolved, cluster: DeclaredCluster | None
) -> list[Issue]:
    """Judge resolved values by the rules between keys."""
    return issues_of(registry, entry, check_rules(values, env, cluster), values, env)


def issues_of(
    registry: Registry, entry: ModelEntry, findings: Iterable[Finding], values: Values, env: Values
) -> list[Issue]:
    """Say findings where the value that each blames stands; the entry itself is to blame for a built-in."""
    issues = []
    for finding in findings:
        variable = finding.key.removeprefix("env.")
        origin = (env[variable] if variable != finding.key else values[finding.key]).origin
        where, line, column = origin.source, origin.line, origin.column
        if where is None:
            where, line, column = registry.source, entry.mark.line, entry.mark.column
        if origin.layer in (Layer.CLUSTER, Layer.NODE):
            # The cluster's own rules say it once.
            continue
        path = f"models.{entry.name}.{finding.key}"
        if origin.layer is Layer.DEFAULTS:
            path = f"defaults.{finding.key}"
        issues.append(Issue(finding.severity, finding.code, where, line, column, path, finding.message, finding.hint))
    return issues


def _exit_code(errors: list[Issue]) -> int | None:
    """Tell what has no place, and what names an unknown node, from other mistakes; None: as the kind of error says."""
    if all(issue.code in NO_PLACE for issue in errors):
        return ExitCode.DOES_NOT_FIT
    if all(issue.code == "unknown-ref" for issue in errors):
        return ExitCode.UNKNOWN_MODEL
    return None


def _count(errors: list[Issue]) -> str:
    return "the settings have an error" if len(errors) == 1 else f"the settings have {len(errors)} errors"


def _merge(layers: Iterable[Contribution]) -> tuple[Resolved, Resolved]:
    values = dict(_BUILT_INS)
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


def _options(
    options: Options, layer: Layer, source: str, name: str = "", *, without: frozenset[str] = frozenset()
) -> Contribution:
    def placed(mark: Mark) -> Origin:
        return Origin(layer, source, mark.line, mark.column, name)

    return Contribution(
        {key: (item.value, placed(item.mark)) for key, item in options.settings.items() if key not in without},
        {key: (item.value, placed(item.mark)) for key, item in options.env.items()},
    )
