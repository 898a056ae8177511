"""`hlaunch status`: what each node of a launch says, what happened on it, what connects its ranks.

Knows: where a launch is recorded, on a cluster or on this host. Refuses to know: how nodes are asked
(`launcher.supervise`), tables (`launcher.commands.cluster`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.commands import invocation_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.console import Console
    from launcher.fabric.transports import PairTransport
    from launcher.supervise.cluster_run import ClusterRun
    from launcher.supervise.instance import InstanceFolder, InstanceState


def register(app: typer.Typer) -> None:
    @app.command("status")
    def status(
        ctx: typer.Context,
        name: Annotated[str, typer.Argument(metavar="NAME", help="A running model.")],
        has_environment: Annotated[
            bool, typer.Option("--env", help="Show the fabric's variables that each node really has.")
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Show the nodes of a launch, what happened on them, and what connects its ranks."""
        from launcher.commands import cluster
        from launcher.errors import UnknownModel, UsageError
        from launcher.supervise.cluster_run import read_run, recorded_runs
        from launcher.supervise.instance import InstanceFolder, state_root
        from launcher.supervise.stopping import instance_folders, running_instances

        invocation = invocation_of(ctx)
        root = state_root(invocation.environ)
        folder = InstanceFolder(root, name)
        run = read_run(folder)
        state = folder.read() if run is None else None
        if run is not None:
            facts = _on_cluster(run, invocation.environ)
        elif state is not None and state.is_alive and has_environment:
            raise UsageError("--env asks the nodes of a cluster", hint=f"on this host: hlaunch env {name}")
        elif state is not None and state.is_alive:
            facts = _here(folder, state)
        else:
            known = [item.name for _, item in recorded_runs(root)]
            known += [item.name for _, item in running_instances(list(instance_folders(root)))]
            raise UnknownModel(f"'{name}' does not run", available=known, hint="hlaunch ps shows what runs")
        if as_json:
            invocation.console.json(facts)
        elif run is not None and has_environment:
            cluster.environment(invocation.console, facts)
        elif run is not None:
            cluster.status(invocation.console, facts)
        else:
            _show(invocation.console, facts)


def _on_cluster(run: ClusterRun, environ: Mapping[str, str]) -> dict[str, Any]:
    """Ask the nodes; a restarted node's ranks may be connected otherwise by now, so their logs are read anew."""
    from launcher.commands import cluster
    from launcher.supervise.cluster_logs import transports_in_use

    facts = cluster.facts(run, environ)
    if run.transports and (pairs := transports_in_use(run.placement, run.runtime, run.nodes, environ)):
        facts["transports"] = [_newer(pair, run).to_data() for pair in pairs]
    return facts


def _newer(pair: PairTransport, run: ClusterRun) -> PairTransport:
    """What the record knows of a pair whose lines have left the logs."""
    from launcher.fabric.transports import NOT_TOLD

    if pair.transport != NOT_TOLD:
        return pair
    return next((known for known in run.transports if known.ranks == pair.ranks), pair)


def _here(folder: InstanceFolder, state: InstanceState) -> dict[str, Any]:
    from launcher.supervise.local_ranks import transports_here
    from launcher.supervise.procfs import age_seconds

    return {
        "name": state.name,
        "model": state.model,
        "state": state.state,
        "url": state.url,
        "pid": state.launcher.pid,
        "uptime_seconds": round(age_seconds(state.launcher), 1),
        "ready_seconds": state.ready_seconds,
        "transports": [pair.to_data() for pair in transports_here(folder)],
    }


def _show(console: Console, facts: dict[str, Any]) -> None:
    from launcher.commands import cluster
    from launcher.commands.ps import uptime

    row = (facts["name"], facts["model"], facts["state"], str(facts["pid"]), facts["url"])
    columns = ("NAME", "MODEL", "STATE", ">PID", "ENDPOINT", ">UPTIME")
    console.table(columns, [(*row, uptime(facts["uptime_seconds"]))])
    cluster.transports(console, facts["transports"])
