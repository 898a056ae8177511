"""`hlaunch schema`: what a registry may hold, for editors (JSON schema) and for people (--keys)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands import invocation_of

if TYPE_CHECKING:
    from launcher.registry.keys import KeySpec


_CLUSTER = "clusters.NAME."
_NODE = "clusters.NAME.nodes[]."


def register(app: typer.Typer) -> None:
    @app.command("schema")
    def schema(
        ctx: typer.Context,
        keys: Annotated[bool, typer.Option("--keys", help="List the keys in a readable form.")] = False,
        as_json: Annotated[
            bool, typer.Option("--json", help="Print JSON: the schema, or with --keys the table of keys.")
        ] = False,
    ) -> None:
        """Print the JSON schema of the registry, or its keys."""
        from textwrap import wrap

        from launcher.registry.schema import json_schema_text

        console = invocation_of(ctx).console
        if not keys:
            console.raw(json_schema_text())
        elif as_json:
            console.json([_facts(where, spec) for where, spec in _rows()])
        else:
            for where, spec in _rows():
                console.heading(", ".join((where + spec.key, *spec.aliases)))
                for text in (spec.summary, _terms(spec)):
                    for line in wrap(text, console.width - 4, break_on_hyphens=False, break_long_words=False):
                        console.data(f"    {line}")


def _rows() -> Iterator[tuple[str, KeySpec]]:
    """Every key with what stands before it: nothing for a model's, `clusters.NAME.` for a cluster's."""
    from launcher.registry.keys import CLUSTER, KEYS, NODE

    for where, specs in (("", KEYS), (_CLUSTER, CLUSTER.specs), (_NODE, NODE.specs)):
        for spec in specs.values():
            yield where, spec


def _terms(spec: KeySpec) -> str:
    facts = [f"default: {spec.describe_default()}"]
    if spec.unit:
        facts.append(f"unit: {spec.unit}")
    if accepted := spec.describe_range():
        facts.append(accepted)
    return "; ".join(facts)


def _facts(where: str, spec: KeySpec) -> dict[str, object]:
    return {
        "key": where + spec.key,
        "aliases": list(spec.aliases),
        "kind": spec.kind.name.lower(),
        "summary": spec.summary,
        "default": spec.describe_default(),
        "unit": spec.unit or None,
        "range": spec.describe_range() or None,
        "variable": None if spec.is_fixed or where else spec.environment,
        "launcher_only": spec.is_launcher_only,
    }
