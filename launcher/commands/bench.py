"""`hlaunch bench`: latency and throughput of a served model at several concurrencies: table, JSON, picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher import __version__
from launcher.commands import invocation_of

if TYPE_CHECKING:
    from launcher.benchmark.report import LevelFigures

COLUMNS = ("IN FLIGHT", "REQUESTS", "OUT TOK/S", "TTFT p50", "p99", "ITL p50", "p99", "ERRORS")


def register(app: typer.Typer) -> None:
    @app.command("bench")
    def bench(
        ctx: typer.Context,
        name: Annotated[str, typer.Argument(metavar="NAME", help="A model's name or alias.")],
        concurrency: Annotated[str, typer.Option("--concurrency", "-c", help="Requests in flight.")] = "1,4,16",
        requests: Annotated[
            int, typer.Option("--requests", "-r", min=1, max=100_000, help="Requests per level: this many rounds.")
        ] = 4,
        input_tokens: Annotated[int, typer.Option("--input", min=1, help="Prompt length in tokens.")] = 128,
        output_tokens: Annotated[int, typer.Option("--output", min=1, help="Answer length in tokens.")] = 64,
        seed: Annotated[int, typer.Option("--seed", help="Of the random prompts.")] = 0,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
        output: Annotated[Path | None, typer.Option("--out", "-o", help="Write the JSON document here.")] = None,
        plot: Annotated[Path | None, typer.Option("--plot", help="Draw the figures into this PNG.")] = None,
        url: Annotated[str | None, typer.Option("--url", help="Measure the server at this address.")] = None,
        overrides: Annotated[
            list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="For a server started by this command.")
        ] = None,
    ) -> None:
        """Measure latency and throughput of a model.

        Closed loop, greedy, random prompts without a common prefix. Latencies are in milliseconds: TTFT to the first
        token, ITL between tokens.
        """
        from launcher.benchmark.load import Workload, run_level
        from launcher.benchmark.report import document, figures
        from launcher.client import Client, served_model
        from launcher.errors import EngineFailed
        from launcher.session import server_for

        levels = _levels(concurrency)
        check_results(output, plot)
        invocation = invocation_of(ctx)
        console = invocation.console
        with server_for(invocation, name, url=url, overrides=overrides or []) as server:
            client = Client(server.url, server.api_key)
            model = served_model(client)
            facts = client.get("/v1/models")["data"][0]
            client.close()
            workload = Workload(model, input_tokens, output_tokens, int(facts.get("vocab_size") or 256), seed)
            console.note(f"{model} at {server.url}: {input_tokens} tokens in, {output_tokens} out")
            run_level(server.url, server.api_key, workload, 1, 1)
            measured: list[LevelFigures] = []
            failures: list[str] = []
            with console.phases() as view:
                for level in levels:
                    label = f"{level} in flight"
                    total = level * requests
                    view.begin(label)

                    def show(done: int, label: str = label, total: int = total) -> None:
                        view.progress(label, done / total, f"{done}/{total}")

                    result = run_level(server.url, server.api_key, workload, level, total, show)
                    measured.append(figures(result))
                    failures += result.errors
                    view.end(label, result.wall_seconds, f"{measured[-1].output_tokens_per_second:.0f} tokens/s")
                    if not result.requests:
                        raise EngineFailed(f"no request succeeded at {level} in flight: {result.errors[0]}")
        data = document(workload, measured, __version__, {"url": server.url, "model": model})
        if output is not None:
            _write(output, json.dumps(data, indent=2) + "\n")
        if plot is not None:
            from launcher.benchmark.plot import write_plot

            write_plot(plot, f"{model}: {input_tokens} in, {output_tokens} out", measured)
        if as_json:
            console.json(data)
        else:
            console.table(COLUMNS, [_row(level) for level in measured])
        if failures:
            raise EngineFailed(f"{len(failures)} requests failed; the first: {failures[0]}")


def check_results(output: Path | None, plot: Path | None) -> None:
    """Find out before the measurement whether its results can be kept.

    Raises: UsageError for a picture that is no PNG, PreflightError for a path that cannot be written or a missing
    package.
    """
    from importlib.util import find_spec

    from launcher.errors import PreflightError, UsageError

    if plot is not None and plot.suffix.lower() != ".png":
        raise UsageError(f"--plot {plot}: the picture is a PNG", hint=f"for example: --plot {plot.with_suffix('.png')}")
    for path in (output, plot):
        if path is not None:
            _try_to_write(path)
    if plot is not None and find_spec("matplotlib") is None:
        raise PreflightError("the plot needs matplotlib", hint="pip install 'hlaunch[bench]'")


def _try_to_write(path: Path) -> None:
    from launcher.errors import PreflightError

    is_new = not path.exists()
    try:
        with path.open("ab"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        raise PreflightError(f"{path}: cannot be written: {error.strerror}") from error


def _write(path: Path, text: str) -> None:
    from launcher.errors import PreflightError

    try:
        path.write_text(text)
    except OSError as error:
        raise PreflightError(f"{path}: cannot be written: {error.strerror}") from error


def _levels(text: str) -> list[int]:
    from launcher.errors import UsageError

    try:
        levels = [int(part) for part in text.split(",")]
    except ValueError:
        levels = []
    if not levels or not all(1 <= level <= 512 for level in levels):
        raise UsageError(f"--concurrency {text}: expected numbers from 1 to 512", hint="for example: -c 1,4,16")
    return levels


def _row(level: LevelFigures) -> tuple[str, ...]:
    return (
        str(level.concurrency),
        str(level.requests),
        f"{level.output_tokens_per_second:.0f}",
        f"{level.ttft_ms_p50:.1f}",
        f"{level.ttft_ms_p99:.1f}",
        f"{level.itl_ms_p50:.2f}",
        f"{level.itl_ms_p99:.2f}",
        str(level.errors),
    )
