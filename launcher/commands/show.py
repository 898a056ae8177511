"""`hlaunch show`: one model with every layer merged. Knows how values and origins are shown, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands import invocation_of

if TYPE_CHECKING:
    from launcher.registry import Origin, ResolvedEntry, ResolvedValue


def register(app: typer.Typer) -> None:
    @app.command("show")
    def show(
        ctx: typer.Context,
        name: Annotated[str, typer.Argument(metavar="NAME", help="A model's name or alias.")],
        overrides: Annotated[
            list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may repeat.")
        ] = None,
        explain: Annotated[
            bool, typer.Option("--explain", help="Show every key, its origin and what it hides.")
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Show one model, resolved."""
        invocation = invocation_of(ctx)
        entry = invocation.resolve(name, overrides or [])
        if as_json:
            invocation.console.json(facts(entry))
            return
        invocation.console.heading(entry.name)
        if explain:
            rows = [(item.key, _value(item), "\n".join((str(item.origin), *_hidden(item)))) for item in _items(entry)]
            for key, value, origin in rows:
                invocation.console.data(f"  {key}: {value}")
                for line in origin.splitlines():
                    invocation.console.data(f"      {line}")
            return
        rows_set = [(item.key, _value(item)) for item in _items(entry) if item.origin.source is not None]
        invocation.console.table(("KEY", "VALUE"), rows_set)
        unset = sum(item.origin.source is None for item in _items(entry))
        invocation.console.note(f"{unset} more keys have their built-in value: add --explain")


def facts(entry: ResolvedEntry) -> dict[str, object]:
    """A resolved entry as plain values: each key with its value, origin and what it hides."""
    return {
        "name": entry.name,
        "registry": str(entry.registry),
        "values": {item.key: _fact(item) for item in entry.values.values()},
        "env": {item.key: _fact(item) for item in entry.env.values()},
        "warnings": [issue.as_dict() for issue in entry.issues],
    }


def _items(entry: ResolvedEntry) -> list[ResolvedValue]:
    from dataclasses import replace

    return [*entry.values.values(), *(replace(item, key=f"env.{item.key}") for item in entry.env.values())]


def _fact(item: ResolvedValue) -> dict[str, object]:
    return {
        "value": _plain(item),
        "origin": _origin(item.origin),
        "shadowed": [{"value": _plain(below), "origin": _origin(below.origin)} for below in item.shadowed],
    }


def _origin(origin: Origin) -> dict[str, object]:
    return {"layer": str(origin.layer), "source": origin.source, "line": origin.line, "column": origin.column}


def _plain(item: ResolvedValue) -> object:
    from launcher.registry import SecretRef

    if isinstance(item.value, SecretRef):
        return str(item.value)
    return list(item.value) if isinstance(item.value, tuple) else item.value


def _value(item: ResolvedValue) -> str:
    from launcher.registry.keys import KEYS, show_value

    spec = KEYS.get(item.key)
    return str(item.value) if spec is None else show_value(spec, item.value)


def _hidden(item: ResolvedValue) -> list[str]:
    return [f"hides {_value(below)} from {below.origin}" for below in reversed(item.shadowed)]
