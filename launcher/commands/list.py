"""`hlaunch list`: the models of the registry. Knows how entries are shown; refuses to know how they are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands import invocation_of

if TYPE_CHECKING:
    from launcher.registry import ModelEntry, Registry


def register(app: typer.Typer) -> None:
    @app.command("list")
    def list_models(
        ctx: typer.Context,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
        tag: Annotated[str | None, typer.Option("--tag", help="Only models with this tag.")] = None,
    ) -> None:
        """List the models of the registry."""
        invocation = invocation_of(ctx)
        registry = invocation.load_registry()
        entries = [entry for entry in registry.models.values() if tag is None or tag in entry.tags]
        if as_json:
            invocation.console.json({"registry": str(registry.path), "models": [_facts(registry, e) for e in entries]})
            return
        invocation.console.issues([issue for issue in registry.issues if issue.severity != "info"])
        rows = [(entry.name, entry.model, entry.description) for entry in entries]
        invocation.console.table(("NAME", "MODEL", "DESCRIPTION"), rows)
        if not rows:
            tags = sorted({known for entry in registry.models.values() for known in entry.tags})
            invocation.console.note(f"no model has the tag '{tag}'; tags: {', '.join(tags) or 'none'}")


def _facts(registry: Registry, entry: ModelEntry) -> dict[str, object]:
    return {
        "name": entry.name,
        "model": entry.model,
        "description": entry.description or None,
        "aliases": list(entry.aliases),
        "tags": list(entry.tags),
        "file": registry.source,
        "line": entry.mark.line,
    }
