"""`hlaunch fit`: does a model fit, with bars, and what would make it fit. The memory part of `plan`, alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.commands import invocation_of


def register(app: typer.Typer) -> None:
    @app.command("fit")
    def fit(
        ctx: typer.Context,
        name: Annotated[str, typer.Argument(metavar="NAME", help="A model's name or alias.")],
        overrides: Annotated[
            list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may repeat.")
        ] = None,
        cluster: Annotated[str | None, typer.Option("--cluster", metavar="NAME", help="Fit to this cluster.")] = None,
        inventory: Annotated[
            list[Path] | None,
            typer.Option("--inventory", metavar="FILE", help="A saved inventory in place of this host; may repeat."),
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> int:
        """Show the memory of every rank, and the smallest changes that would fit."""
        from launcher.commands.plan import conclude, data_of, picture_of_any, show_memory
        from launcher.plan.gather import plan_for

        invocation = invocation_of(ctx)
        plan = plan_for(invocation, name, list(overrides or []), cluster, list(inventory or []))
        picture = picture_of_any(plan)
        if as_json:
            data = data_of(plan)
            kept = ("name", "model", "fit", "memory", "notes", "problems")
            invocation.console.json({key: data[key] for key in kept if key in data})
        elif picture is not None:
            show_memory(invocation.console, picture)
        return conclude(invocation.console, plan)
