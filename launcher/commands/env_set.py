"""`hlaunch env --set NAME=VALUE`: a variable goes into the registry, once it has been examined there.

Knows: which block a variable belongs to, and that an error found in it keeps the file as it was. Refuses to know: YAML
(`launcher.registry.editing`), what is right (`launcher.fabric.lint`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.commands import Invocation
from launcher.errors import PreflightError, UsageError

if TYPE_CHECKING:
    from launcher.fabric.finding import Finding
    from launcher.fabric.target import Target
    from launcher.registry.editing import Edit


def set_variables(
    invocation: Invocation, target: Target, node: str | None, settings: list[str], *, is_dry: bool, as_json: bool
) -> None:
    """Set variables of the target: of its node if one was named, else of its cluster, else of its model.

    Raises: PreflightError when lint finds an error in it, with nothing written; UsageError; the errors of editing.
    """
    from launcher.commands.registry import finish, own_file
    from launcher.fabric.finding import has_errors
    from launcher.fabric.printing import print_findings

    path, source, text = own_file(invocation)
    if text is None:
        raise UsageError(
            "there is no registry of your own to write into",
            hint="run: hlaunch registry add NAME --model ..., or name one with --file",
        )
    if target.registry is None:
        raise _placeless()
    edits: list[Edit] = []
    for name, value in map(_pair, settings):
        edits.append(_edit(edits[-1].text if edits else text, source, target, node, name, value))
    found = _new_findings(target, text, edits[-1].text, source, invocation)
    print_findings(invocation.console, found, are_messages=True)
    if has_errors(found):
        raise PreflightError("nothing was written: the value is wrong here")
    finish(invocation, path, source, text, edits, "set", is_dry=is_dry, as_json=as_json)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError("a setting is NAME=VALUE", hint="write --set NCCL_DEBUG=INFO")
    return name.strip(), value


def _edit(text: str, source: str, target: Target, node: str | None, name: str, value: str) -> Edit:
    from launcher.registry.editing import ClusterPart, set_value

    if target.declared is not None:
        return set_value(text, source, ClusterPart(target.cluster.name, node), f"env.{name}", value)
    if target.entry is None:
        raise _placeless()
    return set_value(text, source, target.entry.name, f"env.{name}", value)


def _placeless() -> UsageError:
    return UsageError("--set needs a MODEL or --cluster", hint="hlaunch env MODEL --set NAME=VALUE")


def _new_findings(target: Target, before: str, after: str, source: str, invocation: Invocation) -> list[Finding]:
    """What lint says of the changed text and did not say of the one before; lines that moved make no new finding."""
    known = {(item.code, item.subject, item.evidence) for item in _findings(target, before, source, invocation)}
    found = _findings(target, after, source, invocation)
    return [item for item in found if (item.code, item.subject, item.evidence) not in known]


def _findings(target: Target, text: str, source: str, invocation: Invocation) -> list[Finding]:
    from dataclasses import replace

    from launcher.fabric.lint import lint
    from launcher.fabric.target import sources_of
    from launcher.registry import parse_registry, resolve, resolve_cluster
    from launcher.registry.resolving import find_cluster

    registry = parse_registry(text, source)
    entry = None if target.entry is None else resolve(registry, target.entry.name, invocation.environ)
    read = replace(target, registry=registry, entry=entry)
    if target.declared is not None:
        cluster = resolve_cluster(registry, target.cluster.name, invocation.environ, entry)
        read = replace(read, cluster=cluster, declared=find_cluster(registry, target.cluster.name))
    return lint(sources_of(read, {}), cluster=read.cluster if target.declared is not None else None)
