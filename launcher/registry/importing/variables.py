"""Environment variables of others -> those that an engine of ours should get, or the reason why not.

Knows: which kinds of variables a registry may hold. Refuses to know: each variable; the catalogue of `launcher.fabric`
says which are dead, per node, or per rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from launcher.registry.importing.changes import Change
from launcher.registry.values import holds_secret, is_secret_name, redacted, show_text

_NODE_FIELDS = {
    "NCCL_IB_HCA": "hcas",
    "NCCL_SOCKET_IFNAME": "ifname",
    "GLOO_SOCKET_IFNAME": "ifname",
    "NCCL_IB_GID_INDEX": "gid-index",
}
_REWRITTEN = frozenset({"level-int", "level-word", "octal"})
"""Lint codes whose fix means what the source meant."""
_ELSEWHERE = {
    "MODEL_NAME": "name the model: hlaunch up NAME",
    "RAY_ADDRESS": "the head of the cluster says it",
    "HF_HOME": "exported variables reach the engine; in containers it is set for you",
    "CUDA_VISIBLE_DEVICES": "gpus of the node, and the engine, say it",
    "NVIDIA_VISIBLE_DEVICES": "gpus of the node, and the engine, say it",
}


def apply_variables(variables: Mapping[str, str]) -> tuple[dict[str, str], list[Change]]:
    """Sort variables into those for `env` and a report on all of them. Pure."""
    from launcher.fabric.catalogue import find, find_dead, is_ours_to_judge

    env: dict[str, str] = {}
    changes: list[Change] = []
    places: dict[str, int] = {}
    for name, text in variables.items():
        value = text.strip()
        source = name if is_secret_name(name) else f"{name}={_cut(redacted(name, value))}"
        row, dead = find(name), find_dead(name)
        if not value:
            reason = "no value"
        elif name in _ELSEWHERE:
            reason = _ELSEWHERE[name]
        elif dead is not None and find(dead.instead) is not None:
            env[dead.instead] = value
            places[dead.instead] = len(changes)
            changes.append(Change("renamed", source, f"env.{dead.instead}: {_cut(value)}", f"{name} {dead.truth}"))
            continue
        elif dead is not None:
            reason = f"{dead.truth}; instead: {dead.instead}" if dead.instead else dead.truth
        elif holds_secret(name, value):
            reason = f"a secret has no place in a registry: export {name}"
        elif row is not None and str(row.scope) == "R":
            reason = "the engine sets it per rank"
        elif row is not None and str(row.scope) == "N":
            field = _NODE_FIELDS.get(name)
            reason = f"each node has its own: write {field or 'env'} in the node of a cluster"
        elif not is_ours_to_judge(name):
            reason = "exported variables reach the engine by themselves"
        elif "$" in value or "\0" in value:
            reason = "its value refers to another variable"
        else:
            env[name] = value
            places[name] = len(changes)
            changes.append(Change("kept", source, f"env.{name}: {_cut(value)}"))
            continue
        changes.append(Change("dropped", source, "", reason))
    _examine(env, changes, places)
    return env, changes


def _examine(env: dict[str, str], changes: list[Change], places: Mapping[str, int]) -> None:
    """Say what lint has against the variables: an error is left out, a digit becomes its word, a warning is told."""
    from launcher.fabric.lint import lint
    from launcher.fabric.sources import Source

    for item in lint([Source("the source", "file", dict(env))]):
        name = item.subject
        if item.severity == "info" or name not in env or name not in places:
            continue
        change = changes[places[name]]
        better = item.fix.removeprefix(f"{name}=")
        reason = "; ".join(part for part in (change.reason, item.cause) if part)
        if item.severity == "error":
            del env[name]
            changes[places[name]] = Change("dropped", change.source, "", item.cause)
        elif item.code in _REWRITTEN and better != item.fix:
            env[name] = better
            changes[places[name]] = Change("renamed", change.source, f"env.{name}: {better}", reason)
        else:
            changes[places[name]] = replace(change, reason=reason)


def without_comment(value: str) -> str:
    """Cut what a `.env` reader such as Compose takes for a comment: ` #` and all behind it."""
    return re.split(r"\s#", value, maxsplit=1)[0].rstrip()


def _cut(value: str) -> str:
    return value if value.isprintable() and len(value) <= 60 else show_text(value)
