"""`hlaunch ps`: what runs, from the instances' records. Knows columns; dead records are removed on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.commands import invocation_of

if TYPE_CHECKING:
    from launcher.supervise.instance import InstanceState


def register(app: typer.Typer) -> None:
    @app.command("ps")
    def ps(
        ctx: typer.Context,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Show what runs."""
        from launcher.commands import cluster
        from launcher.launches import recorded_launches
        from launcher.supervise.instance import state_root
        from launcher.supervise.stopping import clean_stale

        invocation = invocation_of(ctx)
        facts, launches = [], []
        for launch in recorded_launches(state_root(invocation.environ)):
            if launch.run is not None:
                launches.append(cluster.facts(launch.run, invocation.environ))
            elif launch.state is not None and launch.is_running:
                facts.append(_facts(launch.state))
            elif (state := launch.state) is not None:
                clean_stale(launch.folder, state)
                invocation.console.note(
                    f"{state.name}: its launcher (pid {state.launcher.pid}) is gone; record removed"
                )
        if as_json:
            invocation.console.json([*facts, *launches])
            return
        if launches:
            cluster.table(invocation.console, launches)
        if not facts and launches:
            return
        if not facts:
            invocation.console.note("nothing runs; start with: hlaunch up NAME")
            return
        invocation.console.table(
            ("NAME", "MODEL", "STATE", ">PID", "ENDPOINT", ">MEMORY", ">UPTIME"), [_row(fact) for fact in facts]
        )


def _facts(state: InstanceState) -> dict[str, Any]:
    from launcher.supervise import procfs

    members = [] if state.engine is None else procfs.session_members(state.engine)
    return {
        "name": state.name,
        "model": state.model,
        "state": state_now(state),
        "pid": state.launcher.pid,
        "engine_pid": None if state.engine is None else state.engine.pid,
        "url": state.url,
        "memory_bytes": procfs.memory_bytes([state.launcher.pid, *members]),
        "uptime_seconds": round(procfs.age_seconds(state.launcher), 1),
        "ready_seconds": state.ready_seconds,
        "is_detached": state.is_detached,
    }


def state_now(state: InstanceState) -> str:
    """Say how an instance is by its own word on /health: one that was ready once may not serve now."""
    from launcher.supervise.health import ask_health

    if state.state != "ready":
        return state.state
    found = ask_health(state.url)
    if found.is_serving:
        return found.word or "ready"
    if state.is_restarting:
        return "restarting"
    return found.word or "no answer"


def _row(fact: dict[str, Any]) -> tuple[str, ...]:
    from launcher.sizes import size

    return (
        fact["name"],
        fact["model"],
        fact["state"],
        str(fact["pid"]),
        fact["url"],
        size(fact["memory_bytes"]),
        uptime(fact["uptime_seconds"]),
    )


def uptime(seconds: float) -> str:
    """Write an age with its two largest units: `42s`, `3m10s`, `5h02m`, `2d07h`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"
