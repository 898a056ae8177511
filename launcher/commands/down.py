"""`hlaunch down`: ends what `up` started and says how. Idempotent; a name that nobody knows is an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands import Invocation, invocation_of

if TYPE_CHECKING:
    from launcher.launches import Launch


def register(app: typer.Typer) -> None:
    @app.command("down")
    def down(
        ctx: typer.Context,
        name: Annotated[str | None, typer.Argument(metavar="NAME", help="A running model.")] = None,
        is_all: Annotated[bool, typer.Option("--all", help="Stop everything that runs.")] = False,
    ) -> None:
        """Stop a model: drain, then end."""
        from launcher.errors import HlaunchError, UsageError
        from launcher.launches import find_launch, recorded_launches
        from launcher.supervise.instance import state_root

        if (name is None) != is_all:
            raise UsageError("down takes a NAME or --all", hint="hlaunch ps shows what runs")
        invocation = invocation_of(ctx)
        root = state_root(invocation.environ)
        launches = [find_launch(invocation, name)] if name is not None else list(recorded_launches(root))
        failures = []
        for launch in launches:
            try:
                stop_launch(invocation, launch)
            except HlaunchError as error:
                # What else runs can be ended all the same.
                failures.append(error)
        for failure in failures[:-1]:
            invocation.console.failure(failure)
        if failures:
            raise failures[-1]
        if not launches:
            invocation.console.note("nothing runs")


def stop_launch(invocation: Invocation, launch: Launch) -> None:
    """End one launch and say how. Raises: HlaunchError naming what is left."""
    from launcher.commands import cluster
    from launcher.supervise.stopping import stop_instance

    if launch.run is not None:
        cluster.down(invocation.console, launch.folder, launch.run, invocation.environ)
    else:
        invocation.console.data(f"{launch.name}: {stop_instance(launch.folder).value}")
