"""`hlaunch logs`: the engine's output of a running or past instance. Knows which lines; `log_view`, what they say."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands import Invocation, invocation_of

if TYPE_CHECKING:
    from launcher.launches import Launch
    from launcher.supervise.instance import InstanceFolder


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
        from launcher.supervise.logfile import follow, tail

        invocation = invocation_of(ctx)

        def made_view(width: int) -> LogView:
            return LogView(
                invocation.console,
                invocation.environ,
                as_json=as_json,
                is_about_fabric=is_about_fabric,
                width=width,
            )

        launch = _find(invocation, name)
        if (run := launch.run) is not None:
            view = made_view(max(len(node.name) for node in run.nodes))
            if is_following:
                view.go_live()
            cluster.logs(invocation.console, view, run, invocation.environ, num_lines, follow=is_following)
            view.conclude()
            return
        folder = launch.folder
        if lines := _kept(launch, num_lines):
            view = made_view(max(len(node) for node, _ in lines))
            for node, line in lines:
                view.show(line, node)
            view.conclude()
            return
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

        view.go_live()
        for line in follow(folder.log_file, position, is_over):
            view.show(line)
        view.conclude()


def _find(invocation: Invocation, name: str) -> Launch:
    """Find the launch whose log is meant, running or past. Raises: UnknownModel with the names that have a log."""
    from launcher.errors import UnknownModel
    from launcher.launches import find_launch
    from launcher.supervise.instance import instance_folders, state_root

    with contextlib.suppress(UnknownModel):
        launch = find_launch(invocation, name)
        if launch.run is not None or _has_log(launch.folder):
            return launch
    known = [folder.name for folder in instance_folders(state_root(invocation.environ)) if _has_log(folder)]
    raise UnknownModel(f"'{name}' has no log", available=known, hint="a log begins with: hlaunch up NAME")


def _has_log(folder: InstanceFolder) -> bool:
    from launcher.supervise.kept_logs import kept_file

    return folder.log_file.is_file() or kept_file(folder).is_file()


def _kept(launch: Launch, num_lines: int) -> list[tuple[str, str]]:
    """Return what was kept of a launch on nodes, if that was the last one of its name."""
    from launcher.supervise.kept_logs import kept_file, kept_lines

    kept, own = kept_file(launch.folder), launch.folder.log_file
    if launch.state is not None or not kept.is_file():
        return []
    if own.is_file() and own.stat().st_mtime > kept.stat().st_mtime:
        return []
    return kept_lines(launch.folder, num_lines)
