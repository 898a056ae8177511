"""`hlaunch init`: the first command in a new folder. Knows nothing by itself: it is `hlaunch registry init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.commands import invocation_of


def register(app: typer.Typer) -> None:
    @app.command("init")
    def init(
        ctx: typer.Context,
        path: Annotated[
            Path | None, typer.Argument(metavar="[FILE]", help="Where to write; --file, else ./model_registry.yml.")
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Write a registry to start from, every key commented, and its JSON schema; the same as: registry init.

        Never replaces a registry that is there.
        """
        from launcher.commands.registry import write_registry

        write_registry(invocation_of(ctx), path, as_json=as_json)
