"""`hlaunch status`: what each node of a launch says, and what happened on it. Knows: words; asks through `cluster`."""

from __future__ import annotations

from typing import Annotated

import typer

from launcher.commands import invocation_of


def register(app: typer.Typer) -> None:
    @app.command("status")
    def status(
        ctx: typer.Context,
        name: Annotated[str, typer.Argument(metavar="NAME", help="A launch on a cluster.")],
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Show the nodes of a launch and what happened on them."""
        from launcher.commands import cluster
        from launcher.errors import UnknownModel
        from launcher.supervise.cluster_run import read_run, recorded_runs
        from launcher.supervise.instance import InstanceFolder, state_root

        invocation = invocation_of(ctx)
        root = state_root(invocation.environ)
        run = read_run(InstanceFolder(root, name))
        if run is None:
            known = [item.name for _, item in recorded_runs(root)]
            raise UnknownModel(f"'{name}' runs on no cluster", available=known, hint="on this host: hlaunch ps")
        facts = cluster.facts(run, invocation.environ)
        if as_json:
            invocation.console.json(facts)
        else:
            cluster.status(invocation.console, facts)
