"""`hlaunch down`: ends what `up` started and says how. Idempotent; a name that nobody knows is an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands import Invocation, invocation_of

if TYPE_CHECKING:
    from launcher.supervise.instance import InstanceFolder


def register(app: typer.Typer) -> None:
    @app.command("down")
    def down(
        ctx: typer.Context,
        name: Annotated[str | None, typer.Argument(metavar="NAME", help="A running model.")] = None,
        is_all: Annotated[bool, typer.Option("--all", help="Stop everything that runs.")] = False,
    ) -> None:
        """Stop a model: drain, then end."""
        from launcher.commands import cluster
        from launcher.errors import UsageError
        from launcher.supervise.cluster_run import read_run
        from launcher.supervise.stopping import stop_instance

        if (name is None) != is_all:
            raise UsageError("down takes a NAME or --all", hint="hlaunch ps shows what runs")
        invocation = invocation_of(ctx)
        folders = _recorded(invocation) if name is None else [_named(invocation, name)]
        for folder in folders:
            if (run := read_run(folder)) is not None:
                cluster.down(invocation.console, folder, run, invocation.environ)
                continue
            invocation.console.data(f"{folder.name}: {stop_instance(folder).value}")
        if not folders:
            invocation.console.note("nothing runs")


def _recorded(invocation: Invocation) -> list[InstanceFolder]:
    from launcher.supervise.cluster_run import read_run
    from launcher.supervise.instance import state_root
    from launcher.supervise.stopping import instance_folders

    folders = instance_folders(state_root(invocation.environ))
    return [folder for folder in folders if folder.read() is not None or read_run(folder) is not None]


def _named(invocation: Invocation, name: str) -> InstanceFolder:
    """Find the instance that a name or alias means. Raises: UnknownModel when neither record nor registry has it."""
    from launcher.errors import HlaunchError, UnknownModel
    from launcher.supervise.instance import InstanceFolder, state_root

    root = state_root(invocation.environ)
    folder = InstanceFolder(root, name)
    if folder.path.is_dir():
        return folder
    try:
        return InstanceFolder(root, invocation.resolve(name).name)
    except HlaunchError as error:
        running = [recorded.name for recorded in _recorded(invocation)]
        raise UnknownModel(
            f"nothing runs under the name '{name}'", available=running, hint="hlaunch ps shows what runs"
        ) from error
