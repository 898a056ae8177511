"""`hlaunch top`: a server watched in the terminal. Knows the three forms of output: screen, lines, JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands import invocation_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from launcher.console import Console
    from launcher.top.watching import Moment

HEADER_EVERY = 20


def register(app: typer.Typer) -> None:
    @app.command("top")
    def top(
        ctx: typer.Context,
        name: Annotated[
            str | None, typer.Argument(metavar="NAME", help="A model that runs; left out: the only one.")
        ] = None,
        url: Annotated[
            str | None, typer.Option("--url", help="Any server with vLLM's or SGLang's /metrics instead.")
        ] = None,
        once: Annotated[bool, typer.Option("--once", help="One picture, over one interval, and leave.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")] = False,
        interval: Annotated[
            float, typer.Option("--interval", min=0.1, max=3600, help="Seconds between two readings.")
        ] = 1.0,
    ) -> int:
        """Watch a server: tokens/s, latency, KV cache, queue.

        On a terminal it redraws one screen; elsewhere, and with --plain, it writes a line per reading. Rates are over
        the last interval, latencies and prefix hits over the last 30 s. Ctrl-C leaves.
        """
        from launcher.exit_codes import ExitCode
        from launcher.running import running_server
        from launcher.top.watching import watch

        invocation = invocation_of(ctx)
        server = running_server(invocation, name, url)
        key = server.reveal_key(invocation)
        moments = watch(server.url, key, interval, is_alive=server.is_alive)
        # Ctrl-C is how one leaves what has no end.
        try:
            if once:
                _one(invocation.console, moments, server.name, server.url, interval, as_json=as_json)
            elif as_json:
                _json_lines(invocation.console, moments)
            elif invocation.console.has_screen:
                _screen(invocation.console, moments, server.name, server.url, interval)
            else:
                _lines(invocation.console, moments)
        except KeyboardInterrupt:
            invocation.console.note("")
            if once:
                return ExitCode.INTERRUPTED
        return ExitCode.OK


def _one(console: Console, moments: Iterator[Moment], name: str, url: str, interval: float, *, as_json: bool) -> None:
    """Show the second reading: rates are differences."""
    from launcher.errors import EngineFailed
    from launcher.top.view import screen

    next(moments)
    moment = next(moments)
    if moment.trouble:
        raise EngineFailed(f"{url}: {moment.trouble}")
    if as_json:
        console.json({"url": url, **moment.figures.to_json()})
        return
    # The last two lines are about the next picture.
    title, has_unicode = _title(name, moment, url), console.has_unicode
    lines = screen(moment.figures, title, width=console.width, interval=interval, has_unicode=has_unicode)
    for line in lines[:-2]:
        console.styled(line)


def _json_lines(console: Console, moments: Iterator[Moment]) -> None:
    import json

    for moment in moments:
        console.raw(json.dumps({**moment.figures.to_json(), "trouble": moment.trouble or None}) + "\n")


def _lines(console: Console, moments: Iterator[Moment]) -> None:
    from launcher.top.view import log_header, log_line

    for number, moment in enumerate(moments):
        if number % HEADER_EVERY == 0:
            console.data(log_header())
        if moment.trouble:
            console.warning(moment.trouble)
        else:
            console.data(log_line(moment.figures))


def _screen(console: Console, moments: Iterator[Moment], name: str, url: str, interval: float) -> None:
    from launcher.top.view import screen

    with console.screen() as draw:
        for moment in moments:
            draw(
                screen(
                    moment.figures,
                    _title(name, moment, url),
                    width=console.width,
                    interval=interval,
                    trouble=moment.trouble,
                    has_unicode=console.has_unicode,
                )
            )


def _title(name: str, moment: Moment, url: str) -> str:
    shown = name or ", ".join(moment.figures.reading.models[:3])
    return f"{shown} at {url}" if shown else url
