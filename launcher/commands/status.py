"""`hlaunch status`: what each node of a launch says, what happened on it, what connects its ranks.

Knows: what is asked of a launch on a cluster, what of one on this host. Refuses to know: where they are recorded
(`launcher.launches`), how nodes are asked (`launcher.supervise`), tables (`launcher.commands.cluster`).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.commands import invocation_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from launcher.console import Console
    from launcher.fabric.transports import PairTransport
    from launcher.launches import Launch
    from launcher.supervise.cluster_run import ClusterRun


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
        from launcher.errors import UsageError
        from launcher.launches import running_launch

        invocation = invocation_of(ctx)
        launch = running_launch(invocation, name)
        if (run := launch.run) is not None:
            facts = (cluster.facts if has_environment else _on_cluster)(run, invocation.environ)
            show = cluster.environment if has_environment else cluster.status
        elif has_environment:
            raise UsageError("--env asks the nodes of a cluster", hint=f"on this host: hlaunch env {launch.name}")
        else:
            facts, show = _here(launch), _show
        if as_json:
            invocation.console.json(facts)
        else:
            show(invocation.console, facts)


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


def _here(launch: Launch) -> dict[str, Any]:
    from launcher.commands.ps import state_now
    from launcher.supervise.local_ranks import transports_here
    from launcher.supervise.procfs import age_seconds

    state = launch.state
    assert state is not None, "what runs is on a cluster or has a launcher here"
    return {
        "name": state.name,
        "model": state.model,
        "state": state_now(state),
        "url": state.url,
        "head_addr": state.head_addr or None,
        "pid": state.launcher.pid,
        "uptime_seconds": round(age_seconds(state.launcher), 1),
        "ready_seconds": state.ready_seconds,
        "events": [{"age_seconds": round(max(0.0, time.time() - at), 1), "text": text} for at, text in state.events],
        "transports": [pair.to_data() for pair in transports_here(launch.folder)],
    }


def _show(console: Console, launch: dict[str, Any]) -> None:
    from launcher.commands import cluster
    from launcher.commands.ps import endpoint_of, uptime

    row = (launch["name"], launch["model"], launch["state"], str(launch["pid"]), endpoint_of(launch))
    columns = ("NAME", "MODEL", "STATE", ">PID", "ENDPOINT", ">UPTIME")
    console.table(columns, [(*row, uptime(launch["uptime_seconds"]))])
    if launch["events"]:
        console.data()
        rows = [(uptime(event["age_seconds"]), event["text"]) for event in launch["events"]]
        console.table((">AGO", "EVENT"), rows)
    cluster.transports(console, launch["transports"])
