"""`hlaunch show`: one model with every layer merged. Knows how values and origins are shown, nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands import invocation_of
from launcher.commands.plan import note_registry
from launcher.errors import UsageError

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
        node: Annotated[str | None, typer.Option("--node", metavar="NODE", help="With this node's variables.")] = None,
        platform: Annotated[
            str | None, typer.Option("--platform", metavar="NAME", help="As on this platform, where no cluster says.")
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Show one model, resolved."""
        invocation = invocation_of(ctx)
        entry = invocation.resolve(name, overrides or [], node=node, platform=_known_platform(platform))
        if as_json:
            invocation.console.json(facts(entry))
            return
        console = invocation.console
        if explain:
            rows = [row for item in _items(entry) if _is_set(item) for row in _explained(item)]
            console.table(("KEY", "VALUE", "ORIGIN"), rows, title=f"{entry.name}: what is set")
            console.data()
            rest = [(item.key, _value(item)) for item in _items(entry) if not _is_set(item)]
            console.table(("KEY", "VALUE"), rest, title="built-in")
            note_registry(console, entry)
            return
        console.table(("KEY", "VALUE"), [(item.key, _value(item)) for item in _items(entry) if _is_set(item)])
        console.note(f"{sum(not _is_set(item) for item in _items(entry))} more keys are built-in; see --explain")


def facts(entry: ResolvedEntry) -> dict[str, object]:
    """A resolved entry as plain values: each key with its value, origin and what it hides."""
    return {
        "name": entry.name,
        "registry": str(entry.registry),
        "cluster": entry.cluster_name,
        "platform": entry.platform,
        "profiles": list(entry.profiles),
        "values": {item.key: _fact(item) for item in entry.values.values()},
        "env": {item.key: _fact(item) for item in entry.env.values()},
        "warnings": [issue.as_dict() for issue in entry.issues],
    }


def _known_platform(name: str | None) -> str | None:
    from launcher.registry.keys import PLATFORMS
    from launcher.registry.suggest import did_you_mean

    if name is None or name in PLATFORMS:
        return name
    hint = did_you_mean(name, PLATFORMS) or f"platforms: {', '.join(PLATFORMS)}"
    raise UsageError(f"no such platform: {name}", hint=hint)


def _items(entry: ResolvedEntry) -> list[ResolvedValue]:
    return [*entry.values.values(), *(replace(item, key=f"env.{item.key}") for item in entry.env.values())]


def _fact(item: ResolvedValue) -> dict[str, object]:
    return {
        "value": _plain(item),
        "origin": _origin(item.origin),
        "shadowed": [{"value": _plain(below), "origin": _origin(below.origin)} for below in item.shadowed],
    }


def _origin(origin: Origin) -> dict[str, object]:
    return {
        "layer": str(origin.layer),
        "name": origin.name or None,
        "source": origin.source,
        "line": origin.line,
        "column": origin.column,
    }


def _plain(item: ResolvedValue) -> object:
    """A value for JSON. Options are keyed by a key of the table, variables by their own name."""
    from launcher.registry import SecretRef, redacted
    from launcher.registry.keys import KEYS

    if isinstance(item.value, SecretRef):
        return str(item.value)
    if isinstance(item.value, str):
        return item.value if item.key in KEYS else redacted(item.key, item.value)
    return list(item.value) if isinstance(item.value, tuple) else item.value


def _value(item: ResolvedValue) -> str:
    from launcher.registry import redacted
    from launcher.registry.keys import KEYS, show_value

    spec = KEYS.get(item.key)
    if spec is not None:
        return show_value(spec, item.value)
    return "(removed)" if item.value is None else redacted(item.key.removeprefix("env."), str(item.value))


def _is_set(item: ResolvedValue) -> bool:
    return item.origin.source is not None


def _explained(item: ResolvedValue) -> list[tuple[str, str, str]]:
    """One row for the value, then one for each value that it hides, nearest first."""
    hidden = [below for below in reversed(item.shadowed) if below.value is not None]
    return [
        (item.key, _value(item), item.origin.brief()),
        *(("", f"over {_value(below)}", below.origin.brief()) for below in hidden),
    ]
