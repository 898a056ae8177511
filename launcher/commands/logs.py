"""`hlaunch logs`: the engine's output of a running or past instance. Knows which lines; `log_view`, what they say."""

from __future__ import annotations

from typing import Annotated

import typer

from launcher.commands import invocation_of


def register(app: typer.Typer) -> None:
    @app.command("logs")
    def logs(
        ctx: typer.Context,
        name: Annotated[str, typer.Argument(metavar="NAME", help="A model's name or alias.")],
        is_following: Annotated[bool, typer.Option("--follow", "-f", help="Go on until it ends.")] = False,
        num_lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Lines from the end.")] = 200,
        is_about_fabric: Annotated[
            bool, typer.Option("--transport", help="Only lines about the fabric and known failures.")
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
    ) -> None:
        """Show the log of a running or past model, without secrets, and what its known failures mean."""
        from launcher.commands import cluster
        from launcher.commands.log_view import LogView
        from launcher.errors import HlaunchError, UnknownModel
        from launcher.supervise.cluster_run import read_run
        from launcher.supervise.instance import InstanceFolder, state_root
        from launcher.supervise.logfile import follow, tail
        from launcher.supervise.stopping import instance_folders

        invocation = invocation_of(ctx)

        def made_view(width: int) -> LogView:
            return LogView(
                invocation.console,
                invocation.environ,
                as_json=as_json,
                is_live=is_following,
                is_about_fabric=is_about_fabric,
                width=width,
            )

        root = state_root(invocation.environ)
        folder = InstanceFolder(root, name)
        if (run := read_run(folder)) is not None:
            view = made_view(max(len(node.name) for node in run.nodes))
            cluster.logs(view, run, invocation.environ, num_lines, follow=is_following)
            view.conclude()
            return
        if not folder.log_file.is_file():
            try:
                folder = InstanceFolder(root, invocation.resolve(name).name)
            except HlaunchError:
                folder = InstanceFolder(root, name)
        if not folder.log_file.is_file():
            known = [item.name for item in instance_folders(root) if item.log_file.is_file()]
            raise UnknownModel(f"'{name}' has no log", available=known, hint="a log begins with: hlaunch up NAME")
        view = made_view(0)
        position = folder.log_file.stat().st_size
        for line in tail(folder.log_file, num_lines, position):
            view.show(line)
        if not is_following:
            view.conclude()
            return

        def is_over() -> bool:
            state = folder.read()
            return state is None or not state.is_alive

        for line in follow(folder.log_file, position, is_over):
            view.show(line)
