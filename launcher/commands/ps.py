"""`hlaunch ps`: what runs, from the instances' records. Knows columns; dead records are removed on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.commands import Invocation, invocation_of

if TYPE_CHECKING:
    from launcher.console import Console
    from launcher.launches import Launch
    from launcher.supervise.instance import InstanceState

_WIDEST = 1 << 20
"""More columns than any row has."""


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
        here, on_clusters = [], []
        for launch in recorded_launches(state_root(invocation.environ)):
            if launch.run is not None:
                facts = cluster.facts(launch.run, invocation.environ)
                memory = _rank_memory(invocation, launch, facts["state"])
                on_clusters.append({**facts, "head_addr": None, "rank_memory_bytes": memory})
            elif launch.state is not None and launch.is_running:
                here.append(_facts(invocation, launch, launch.state))
            elif (state := launch.state) is not None:
                clean_stale(launch.folder, state)
                invocation.console.note(
                    f"{state.name}: its launcher (pid {state.launcher.pid}) is gone; record removed"
                )
        if as_json:
            invocation.console.json([*here, *on_clusters])
            return
        if not here and not on_clusters:
            invocation.console.note("nothing runs; start with: hlaunch up NAME")
            return
        print_launches(invocation.console, [*here, *on_clusters])
        if on_clusters:
            invocation.console.data()
            cluster.table(invocation.console, on_clusters)


def _facts(invocation: Invocation, launch: Launch, state: InstanceState) -> dict[str, Any]:
    from launcher.footprint import local_layout
    from launcher.supervise import procfs

    members = [] if state.engine is None else procfs.session_members(state.engine)
    num_nodes, cpu_share = local_layout(launch.folder)
    word = state_now(state)
    return {
        "name": state.name,
        "model": state.model,
        "state": word,
        "pid": state.launcher.pid,
        "engine_pid": None if state.engine is None else state.engine.pid,
        "url": state.url,
        "head_addr": state.head_addr or None,
        "memory_bytes": procfs.memory_bytes([state.launcher.pid, *members]),
        "uptime_seconds": round(procfs.age_seconds(state.launcher), 1),
        "ready_seconds": state.ready_seconds,
        "is_detached": state.is_detached,
        "num_nodes": num_nodes,
        "cpu_share": cpu_share,
        "context_tokens": state.context_tokens,
        "rank_memory_bytes": _rank_memory(invocation, launch, word),
    }


def _rank_memory(invocation: Invocation, launch: Launch, state: str) -> int | None:
    """Ask the server of a launch that serves; None where it does not, or tells only those with another key."""
    from launcher.errors import EngineFailed
    from launcher.footprint import rank_memory_bytes
    from launcher.running import server_of

    if state not in ("ready", "degraded"):
        return None
    try:
        server = server_of(invocation, launch)
    except EngineFailed:
        return None
    return rank_memory_bytes(server.url, server.reveal_key(invocation))


_NODE_STATES = {"join": "waiting", "wait": "waiting", "serve": "serving"}
"""A node beside the head waits for it, serves with it, or is on the way to that."""


def state_now(state: InstanceState) -> str:
    """Say how an instance is by its own word: one that was ready once may not serve now.

    A server is asked on /health. A node that joins has none, and its port is the head's, or a stranger's.
    """
    from launcher.supervise.health import ask_health

    if state.head_addr and state.state != "stopping":
        return _NODE_STATES.get(state.phase, "starting")
    if state.state != "ready":
        return state.state
    found = ask_health(state.url)
    if found.is_serving:
        return found.word or "ready"
    if state.is_restarting:
        return "restarting"
    return found.word or "no answer"


_WHAT = ("NAME", "MODEL", "STATE")
_TAKES = (">NODES", "PROCESSOR", ">MEM", ">CONTEXT")
_WHERE = ("ENDPOINT", ">UPTIME")


def print_launches(console: Console, facts: list[dict[str, Any]]) -> None:
    """One line per launch; where that is too long, a second table, for an endpoint must not be broken."""
    from launcher.console import layout_table

    rows = [(_what(fact), _takes(fact), _where(fact)) for fact in facts]
    columns, whole = (*_WHAT, *_TAKES, *_WHERE), [(*what, *takes, *where) for what, takes, where in rows]
    if layout_table(columns, whole, console.width) == layout_table(columns, whole, _WIDEST):
        console.table(columns, whole)
        return
    console.table((*_WHAT, *_WHERE), [(*what, *where) for what, _, where in rows])
    console.data()
    console.table(("NAME", *_TAKES), [(what[0], *takes) for what, takes, _ in rows])


def _what(fact: dict[str, Any]) -> tuple[str, str, str]:
    return fact["name"], fact["model"], fact["state"]


def _takes(fact: dict[str, Any]) -> tuple[str, str, str, str]:
    from launcher.sizes import size

    held = fact["rank_memory_bytes"] or fact.get("memory_bytes")
    return (
        str(fact["num_nodes"]),
        _processor(fact["cpu_share"]),
        size(held) if held else "-",
        str(fact["context_tokens"] or "-"),
    )


def _processor(cpu_share: float | None) -> str:
    """Write who computes: `100% GPU`, `38%/62% CPU/GPU`."""
    if cpu_share is None:
        return "-"
    if cpu_share in (0, 1):
        return "100% CPU" if cpu_share else "100% GPU"
    # A share that is there is not rounded away.
    percent = min(99, max(1, round(100 * cpu_share)))
    return f"{percent}%/{100 - percent}% CPU/GPU"


def _where(fact: dict[str, Any]) -> tuple[str, str]:
    seconds = fact["uptime_seconds"]
    return endpoint_of(fact), "-" if seconds is None else uptime(seconds)


def endpoint_of(fact: dict[str, Any]) -> str:
    """Where its API is; of a node that joins, whose API it is."""
    return f"head {fact['head_addr']}" if fact["head_addr"] else str(fact["url"])


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
