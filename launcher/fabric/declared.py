"""Lint of what a registry declares: every `env` block of a file, or what one launch would get.

Pure. Knows: where blocks of variables stand and which go over which. Refuses to know: the rules (`lint`), terminals.
Notes stay with `hlaunch env --lint`: what is only information is no reason to speak at every start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from launcher.errors import Issue, PreflightError
from launcher.fabric.finding import Finding
from launcher.fabric.lint import lint
from launcher.fabric.sources import Place, Source
from launcher.registry.cluster import Cluster
from launcher.registry.types import (
    NO_CLUSTER,
    DeclaredCluster,
    Layer,
    Mark,
    ModelEntry,
    Options,
    Registry,
    ResolvedEntry,
    Setting,
)

_OF_CLUSTER = (Layer.CLUSTER, Layer.NODE)
_Env = Mapping[str, Setting]


def registry_issues(registry: Registry) -> list[Issue]:
    """Lint every block of variables of a file, alone and with the cluster it goes to; errors and warnings.

    Each is found once, at the line where its text stands, however many models extend it.
    """
    checked = _Blocks(registry)
    for cluster in registry.clusters.values():
        checked.lint((), cluster)
    for name, profile in registry.profiles.items():
        checked.lint([_Block(f"profiles.{name}.env", profile.env)], None)
    for entry in registry.models.values():
        for blocks, declared in _variants(registry, entry):
            checked.lint(blocks, declared)
    return sorted(checked.issues, key=lambda issue: (issue.line or 0, issue.column or 0, issue.path))


@dataclass(frozen=True, slots=True)
class _Block:
    path: str
    env: _Env


@dataclass(slots=True)
class _Blocks:
    registry: Registry
    issues: dict[Issue, None] = field(default_factory=dict)
    _seen: set[tuple[str, ...]] = field(default_factory=set)

    def lint(self, blocks: Sequence[_Block], declared: DeclaredCluster | None) -> None:
        """Lint blocks, lowest first, below those of a cluster. Sets that were linted before are skipped."""
        cluster_name = declared.name if declared is not None else ""
        key = (cluster_name, *(block.path for block in blocks if block.env))
        if key in self._seen:
            return
        self._seen.add(key)
        own = [] if declared is None else list(_of_cluster(declared))
        marks: dict[tuple[str, str], Mark] = {}
        sources = []
        for index, block in enumerate(blocks):
            above = {name for other in blocks[index + 1 :] for name, item in other.env.items() if item.value is None}
            sources.append(_source(block, "model", None, marks, above))
        for block, node in own:
            sources.append(_source(block, "cluster" if node is None else "node", node, marks))
        cluster = declared.cluster if declared is not None else None
        if cluster is None and not any(source.values for source in sources):
            return
        for item in _lint(sources, cluster):
            if item.severity != "info":
                self.issues[_issue(self.registry.source, item, marks, declared)] = None


def _variants(registry: Registry, entry: ModelEntry) -> Iterator[tuple[list[_Block], DeclaredCluster | None]]:
    """Give the blocks of an entry: as it is, and with each of its own profiles and overrides."""
    owners = [(f"models.{owner.name}", owner.options) for owner in (*entry.bases, entry)]
    below = [("defaults", registry.defaults), *owners]
    tops: list[tuple[str, Options]] = [("", Options())]
    tops += [(f"models.{entry.name}.profiles.{name}", options) for name, options in entry.profiles.items()]
    tops += [(f"models.{entry.name}.overrides.{name}", options) for name, options in entry.overrides.items()]
    for path, options in tops:
        layers = [*below, (path, options)]
        blocks = [_Block(f"{path}.env", layer.env) for path, layer in layers if layer.env]
        if not blocks:
            continue
        chosen = [layer.settings["cluster"].value for _, layer in layers if "cluster" in layer.settings]
        name = str(chosen[-1]) if chosen else NO_CLUSTER
        yield blocks, registry.clusters.get(name)


def _of_cluster(declared: DeclaredCluster) -> Iterator[tuple[_Block, str | None]]:
    yield _Block(f"clusters.{declared.name}.env", declared.env), None
    for index, node in enumerate(declared.cluster.nodes):
        env = declared.node_env.get(node.name, {})
        yield _Block(f"clusters.{declared.name}.nodes.{index}.env", env), node.name


def _source(
    block: _Block,
    place: Place,
    node: str | None,
    marks: dict[tuple[str, str], Mark],
    removed: Iterable[str] = (),
) -> Source:
    gone = set(removed)
    kept = {name: item for name, item in block.env.items() if item.value is not None and name not in gone}
    marks.update({(block.path, name): item.mark for name, item in kept.items()})
    return Source(block.path, place, {name: str(item.value) for name, item in kept.items()}, node)


def _issue(
    source: str, item: Finding, marks: Mapping[tuple[str, str], Mark], declared: DeclaredCluster | None
) -> Issue:
    mark = marks.get((item.where, item.subject))
    path = f"{item.where}.{item.subject}"
    if mark is None and declared is not None:
        # Not a variable but a field: `fabric.gid-index`.
        mark, path = declared.find(*item.subject.split(".")), f"clusters.{declared.name}.{item.subject}"
    line, column = mark if mark is not None else (None, None)
    return Issue(item.severity, item.code, source, line, column, path, _said(item), item.fix)


def _said(item: Finding) -> str:
    """Say the value and what is wrong with it; the variable's name stands in the issue's path."""
    evidence = item.evidence.removeprefix(f"{item.subject}=")
    return f"{evidence}: {item.cause}" if evidence not in item.cause else item.cause


def launch_findings(entry: ResolvedEntry, cluster: Cluster | None) -> list[Finding]:
    """Lint the variables that a launch of `entry` would get from the registry and from flags, errors first."""
    sources: list[Source] = []
    lines = {name: item.origin.line for name, item in entry.env.items() if item.origin.layer is Layer.CLUSTER}
    for name, item in entry.env.items():
        if item.value is None or (cluster is not None and item.origin.layer in _OF_CLUSTER):
            continue
        # Only a flag of this run goes over the word of a node.
        place: Place = "node" if item.origin.layer is Layer.FLAG else "model"
        label = item.origin.source or str(item.origin)
        at = {} if item.origin.line is None else {name: item.origin.line}
        sources.append(Source(label, place, {name: str(item.value)}, lines=at))
    if cluster is not None:
        flagged = {name for source in sources if source.place == "node" for name in source.values}
        shown = next((str(item.origin.source) for name, item in entry.env.items() if name in lines), "")
        label = shown or f"cluster '{cluster.name}' env"
        known = {name: line for name, line in lines.items() if line is not None and name in cluster.env}
        sources = [
            Source(label, "cluster", _without(cluster.env, flagged), lines=known),
            *(
                Source(f"node '{node.name}' env", "node", _without(node.env, flagged), node.name)
                for node in cluster.nodes
            ),
            *sources,
        ]
    return _lint([source for source in sources if source.values], cluster)


def _lint(sources: Sequence[Source], cluster: Cluster | None) -> list[Finding]:
    """Lint without what the registry's own rules say already: a token of the hub is a secret that stands in a file."""
    found = lint(sources, cluster=cluster)
    return [item for item in found if (item.code, item.subject) != ("token-in-env", "HF_TOKEN")]


def _without(env: Mapping[str, str], names: set[str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


def problem_of(findings: Sequence[Finding]) -> PreflightError | None:
    """Make one error of all errors among findings; None when there is none."""
    errors = [item for item in findings if item.severity == "error"]
    if not errors:
        return None
    first, *others = [f"{item.where}: {item.subject}: {_said(item)}" for item in errors]
    return PreflightError(first, details=others, hint=errors[0].fix)


def warnings_of(findings: Sequence[Finding]) -> tuple[Issue, ...]:
    """Return the warnings among findings, as a command prints them."""
    return tuple(
        Issue(item.severity, item.code, item.where, None, None, item.subject, _said(item), item.fix)
        for item in findings
        if item.severity == "warning"
    )
