"""Checks every fabric variable wherever it stands: its name, its value, and what it says together with the others.

Pure. Knows: the rules for one variable; those that look at several are in `lint_rules`. Refuses to know: how a source
was read (`dotenv`, the registry), what a host has beyond the facts handed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from launcher.fabric import catalogue
from launcher.fabric.facts import NodeFacts
from launcher.fabric.finding import Finding, finding, ordered
from launcher.fabric.lint_rules import cluster_findings, view_findings
from launcher.fabric.sources import Source, node_views, said
from launcher.fabric.spec import Scope, Spec
from launcher.registry.cluster import Cluster
from launcher.registry.contradictions import contradictions


def lint(
    sources: Sequence[Source],
    *,
    cluster: Cluster | None = None,
    facts: Mapping[str, NodeFacts] | None = None,
    nccl_version: str = catalogue.HOST_NCCL,
) -> list[Finding]:
    """Check every variable of every source; errors first. `facts` maps node names to what was read there."""
    found: list[Finding] = []
    for source in sources:
        found += _unread_lines(source)
        for name in sorted(source.values):
            if catalogue.is_ours_to_judge(name):
                found += _variable_findings(name, source.values[name], source, nccl_version)
    views = node_views(sources, cluster, facts or {})
    for view in views:
        found += view_findings(view)
    if cluster is not None:
        found += cluster_findings(cluster, sources, views)
    return ordered([_agreed(item, cluster, sources) for item in _overruled(found)])


def _unread_lines(source: Source) -> list[Finding]:
    """Report lines of a file that set nothing; what stands on them stays untold, it may be a secret."""
    found = []
    for number, why in source.unread.items():
        where = f"{source.label}:{number}"
        if why == "refused":
            found.append(finding("bad-line", subject=where, where=where, evidence="no NAME=value on this line"))
            continue
        evidence = "a name and no '=' on this line"
        cause = "docker takes the value from whoever starts the container"
        found.append(
            finding("bad-line", subject=where, where=where, evidence=evidence, cause=cause, severity="warning")
        )
    return found


def _overruled(found: list[Finding]) -> list[Finding]:
    """Where a value is forbidden whatever its spelling, let no finding about the spelling advise to keep it."""
    forbidden = {(item.where, item.subject): item.fix for item in found if item.code in ("gdr-on-gb10", "nvls-on")}
    return [
        replace(item, fix=forbidden.get((item.where, item.subject), item.fix))
        if item.fix.startswith(f"{item.subject}=")
        else item
        for item in found
    ]


def _agreed(item: Finding, cluster: Cluster | None, sources: Sequence[Source]) -> Finding:
    """Take back a fix that would contradict the fabric; what a field renders needs no variable."""
    name, equals, better = item.fix.partition("=")
    if cluster is None or not equals or name != item.subject:
        return item
    nodes = {source.node for source in sources if source.at(name) == item.where}
    nodes_or_none = [None, *(node for node in cluster.nodes if node.name in nodes)]
    if any(next(contradictions(cluster.fabric, {name: better}, node), None) for node in nodes_or_none):
        return replace(item, fix=f"remove {name}: the fabric says it")
    return item


def _variable_findings(name: str, value: str, source: Source, version: str) -> list[Finding]:
    if name in catalogue.TORCH_ALIASES:
        better = catalogue.TORCH_ALIASES[name]
        return [said("torch-alias", name, value, source, fix=f"{better}={value}")]
    row = catalogue.find(name)
    if row is None:
        return [_unknown(name, value, source)]
    found = [*_release(row, value, source, version), *_place(row, value, source)]
    if name in source.quoted:
        found.append(said("quoted-value", name, value, source))
    problems = row.kind.problems(value)
    for problem in problems:
        better = "" if problem.better is None else f"{name}={problem.better}"
        found.append(said(problem.code, name, value, source, problem.message, better))
    if value and value == row.default:
        found.append(said("default-restated", name, value, source, f"{value} is the default already"))
    if row.is_debug and not (value == "0" and row.default == "0"):
        found.append(said("debug-only", name, value, source))
    if name == "NCCL_DEBUG" and value.upper() == "TRACE":
        found.append(said("debug-left-on", name, value, source, "TRACE logs every call", "NCCL_DEBUG=WARN"))
    return found


def _unknown(name: str, value: str, source: Source) -> Finding:
    dead = catalogue.find_dead(name)
    if dead is not None:
        fix = f"write {dead.instead}" if dead.instead.startswith(("NCCL_", "RAY_")) else dead.instead
        return said(dead.code, name, value, source, f"{name} {dead.truth}", fix)
    near = catalogue.suggestions(name)
    cause = f"no release known here reads {name}"
    return said("unknown-name", name, value, source, cause, f"did you mean {near[0]}?" if near else "")


def _release(row: Spec, value: str, source: Source, version: str) -> list[Finding]:
    if catalogue.is_too_new(row, version):
        return [said("too-new", row.name, value, source, f"since NCCL {row.since}; the engine's is {version}")]
    if catalogue.is_gone(row, version):
        return [said("removed-name", row.name, value, source, f"gone after NCCL {row.until}; this is {version}")]
    return []


def _place(row: Spec, value: str, source: Source) -> list[Finding]:
    """Judge where a value stands: rank values and secrets belong nowhere, an image sets nothing of the fabric."""
    found = []
    if row.scope is Scope.RANK and (source.place != "process" or row.owner == "engine"):
        found.append(said("rank-env-leak", row.name, value, source))
    is_file = source.place in ("model", "cluster", "node")
    if row.name == "RAY_AUTH_TOKEN" or (row.name == "HF_TOKEN" and is_file and not value.startswith("${")):
        found.append(said("token-in-env", row.name, value, source, fix=_SECRET_FIX[row.name]))
    if source.place == "image" and row.owner in ("NCCL", "Gloo", "UCX"):
        found.append(said("image-env", row.name, value, source))
    return found


_SECRET_FIX = {
    "RAY_AUTH_TOKEN": "put it in a file of mode 0600 and set RAY_AUTH_TOKEN_PATH",
    "HF_TOKEN": "export HF_TOKEN where hlaunch is started; it becomes a secret of the container",
}
