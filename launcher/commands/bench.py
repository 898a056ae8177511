"""`hlaunch bench`: latency and throughput of a model at several concurrencies: table, JSON, picture, profile.

Two ways: over HTTP, as clients feel it, or `--offline`, the engine alone in a child process. Knows how a measurement is
asked for and shown; `launcher.benchmark` measures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher import __version__
from launcher.commands import invocation_of

if TYPE_CHECKING:
    from launcher.benchmark.load import Workload
    from launcher.benchmark.report import LevelFigures
    from launcher.commands import Invocation

COLUMNS = (
    ">IN FLIGHT", ">REQS", ">TOK/S", ">DECODE/S", ">TTFT p50", ">TTFT p99", ">TPOT p50", ">ITL p99", ">ERRORS",
)  # fmt: skip
UNITS = "tokens per second; latencies in ms: TTFT first token, TPOT and ITL per token"
OFFLINE_COLUMNS = (">REQUESTS", ">DECODE TOK/S", ">PREFILL TOK/S", ">TPOT ms", ">EXPERTS", ">% FLOOR")
PROFILE_COLUMNS = ("OP", "KERNEL", ">CALLS", ">US/STEP", ">SHARE", ">MB", ">% FLOOR")


def register(app: typer.Typer) -> None:
    @app.command("bench")
    def bench(
        ctx: typer.Context,
        name: Annotated[str, typer.Argument(metavar="NAME", help="A model's name or alias.")],
        concurrency: Annotated[str, typer.Option("--concurrency", "-c", help="Requests in flight.")] = "1,4,16",
        requests: Annotated[
            int, typer.Option("--requests", "-r", min=1, max=100_000, help="Requests per level and run: rounds.")
        ] = 1,
        runs: Annotated[int, typer.Option("--runs", min=1, max=100, help="Figures are medians of these.")] = 3,
        input_tokens: Annotated[int, typer.Option("--input", min=1, help="Prompt length in tokens.")] = 128,
        output_tokens: Annotated[int, typer.Option("--output", min=1, help="Answer length in tokens.")] = 64,
        seed: Annotated[int, typer.Option("--seed", help="Of the random prompts.")] = 0,
        offline: Annotated[bool, typer.Option("--offline", help="The engine alone, without a server.")] = False,
        profile: Annotated[
            bool,
            typer.Option(
                "--profile-step",
                help="Take a decode step apart, time per op: also --profile, last or before an option.",
            ),
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
        output: Annotated[Path | None, typer.Option("--out", "-o", help="Write the JSON document here.")] = None,
        plot: Annotated[Path | None, typer.Option("--plot", help="Draw the figures into this PNG.")] = None,
        url: Annotated[str | None, typer.Option("--url", help="Measure the server at this address.")] = None,
        overrides: Annotated[
            list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="For a server started by this command.")
        ] = None,
    ) -> None:
        """Measure latency and throughput of a model.

        Greedy, random prompts of token ids without a common prefix, warm-up not counted, medians of several runs.
        Latencies are in milliseconds: TTFT to the first token, TPOT per token after it, ITL between tokens. Decode
        tokens/s: extra time of full answers over 1-token answers.
        """
        from launcher.errors import UsageError

        levels = _levels(concurrency)
        check_results(output, plot)
        offline = offline or profile
        if offline and url is not None:
            raise UsageError("--offline measures the engine in this machine, --url a server: choose one")
        if offline and requests != 1:
            raise UsageError("--offline hands all requests over at once: --requests does not apply")
        invocation = invocation_of(ctx)
        job = _Job(name, levels, requests, runs, input_tokens, output_tokens, seed, url, overrides or [], profile)
        outcome = _run_offline(invocation, job) if offline else _run_server(invocation, job)
        if output is not None:
            _write(output, json.dumps(outcome.data, indent=2) + "\n")
        if plot is not None:
            from launcher.benchmark.plot import write_plot

            write_plot(plot, f"{name}: {input_tokens} in, {output_tokens} out", outcome.levels)
        console = invocation.console
        if as_json:
            console.json(outcome.data)
        elif offline:
            console.table(OFFLINE_COLUMNS, [_offline_row(level) for level in outcome.levels])
            for item in outcome.data["profile"]:
                console.data()
                console.table(PROFILE_COLUMNS, _profile_rows(item), title=_profile_title(item))
        else:
            console.table(COLUMNS, [_row(level) for level in outcome.levels], title=UNITS)
        if offline and outcome.data["device"].get("kind") == "cpu":
            copy = outcome.data["device"]["copy_bytes_per_second"] / 1e9
            console.note(f"floor: bytes at this machine's copy, {copy:.0f} GB/s; what its caches hold can go faster")
        if outcome.data.get("synthetic_weights"):
            console.note("random weights: these figures are of speed alone")
        if outcome.failures:
            from launcher.errors import EngineFailed

            raise EngineFailed(f"{len(outcome.failures)} requests failed; the first: {outcome.failures[0]}")


@dataclass(frozen=True, slots=True)
class _Job:
    """What was asked for."""

    name: str
    levels: list[int]
    requests: int
    runs: int
    input_tokens: int
    output_tokens: int
    seed: int
    url: str | None
    overrides: Sequence[str]
    profile: bool


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What came of it: figures, the document, requests that failed."""

    levels: list[LevelFigures]
    data: dict[str, Any]
    failures: list[str]


def _run_server(invocation: Invocation, job: _Job) -> _Outcome:
    from launcher.benchmark.load import Workload, run_level
    from launcher.benchmark.offline import device_limits, with_floor
    from launcher.benchmark.report import document, median
    from launcher.client import Client, served_model
    from launcher.session import server_for

    console = invocation.console
    with server_for(invocation, job.name, url=job.url, overrides=job.overrides) as server:
        # What runs on this machine is known by its plan; a server elsewhere says nothing of its device.
        plan = _plan(invocation, job) if server.is_here else None
        client = Client(server.url, server.api_key)
        model = served_model(client)
        facts = client.get("/v1/models")["data"][0]
        client.close()
        vocab_size = int(facts.get("vocab_size") or 256)
        workload = Workload(model, job.input_tokens, job.output_tokens, vocab_size, job.seed)
        console.note(f"{model} at {server.url}: {job.input_tokens} tokens in, {job.output_tokens} out")
        run_level(server.url, server.api_key, workload, 1, 1, phase="warm-up")
        measured: list[LevelFigures] = []
        runs_of: list[list[LevelFigures]] = []
        failures: list[str] = []
        with console.phases() as view:
            for level in job.levels:
                found = _server_level(server.url, server.api_key, workload, level, job, view, failures)
                runs_of.append(found)
                measured.append(median(found))
                seconds = sum(run.wall_seconds for run in found)
                view.end(f"{level} in flight", seconds, f"{measured[-1].output_tokens_per_second:.0f} tokens/s")
    device: dict[str, Any] = {"name": "unknown"}
    is_random: bool | None = None
    if plan is not None:
        device, is_random = _local_facts(plan)
        limits = device_limits(device)
        measured = [
            with_floor(plan.model, level, (level.concurrency, job.input_tokens, job.output_tokens), limits)
            for level in measured
        ]
    data = document(
        workload,
        measured,
        __version__,
        {"url": server.url, "model": model},
        mode="server",
        device=device,
        synthetic_weights=is_random,
        runs=_raw(runs_of),
    )
    return _Outcome(measured, data, failures)


def _server_level(
    url: str, api_key: str | None, workload: Workload, level: int, job: _Job, view: Any, failures: list[str]
) -> list[LevelFigures]:
    """Measure one level: per run as many 1-token answers first, for the decode rate. Raises: EngineFailed."""
    from dataclasses import replace

    from launcher.benchmark.load import run_level
    from launcher.benchmark.report import figures
    from launcher.errors import EngineFailed

    label, total = f"{level} in flight", level * job.requests
    found = []
    view.begin(label)
    for run in range(job.runs):

        def show(done: int, run: int = run) -> None:
            view.progress(label, (run + done / total) / job.runs, f"run {run + 1} of {job.runs}, {done}/{total}")

        first = None
        if job.output_tokens > 1:
            short = replace(workload, output_tokens=1)
            result = run_level(url, api_key, short, level, total, phase=f"{run}/first")
            first = None if result.errors else result.wall_seconds
        result = run_level(url, api_key, workload, level, total, show, phase=f"{run}/full")
        failures += result.errors
        if not result.requests:
            raise EngineFailed(f"no request succeeded at {level} in flight: {result.errors[0]}")
        found.append(figures(result, first))
    return found


def _run_offline(invocation: Invocation, job: _Job) -> _Outcome:
    from launcher.benchmark.load import Workload
    from launcher.benchmark.offline import measure_offline
    from launcher.benchmark.report import document

    console = invocation.console
    plan = _plan(invocation, job)
    points = [(level, job.input_tokens, job.output_tokens) for level in job.levels]
    console.note(f"{plan.name} on {plan.config.device}, offline: {job.input_tokens} in, {job.output_tokens} out")
    with console.phases() as view:
        view.begin("start")

        def show(event: Mapping[str, Any]) -> None:
            kind = event["event"]
            if kind == "ready":
                view.end("start", event["ready_seconds"], "ready")
            elif kind in ("warm-up", "run"):
                label = f"{event['num_requests']} in flight"
                view.begin(label)
                done = 0 if kind == "warm-up" else event["run"] + 1
                view.progress(label, done / job.runs, "warm-up" if kind == "warm-up" else f"run {done} of {job.runs}")
                if done == job.runs:
                    rate = event.get("decode_tokens_per_second") or event["prefill_tokens_per_second"]
                    view.end(label, event.get("full_seconds", event["first_seconds"]), f"{rate:,.0f} tokens/s")

        result = measure_offline(
            plan,
            points,
            runs=job.runs,
            seed=job.seed,
            profile=job.levels if job.profile else (),
            on_event=show,
        )
    vocab_size = 0 if plan.model is None else plan.model.vocab_size
    data = document(
        Workload(plan.name, job.input_tokens, job.output_tokens, vocab_size, job.seed),
        result.levels,
        __version__,
        {"url": None, "model": plan.name},
        mode="offline",
        device=dict(result.device),
        versions=dict(result.versions),
        synthetic_weights=result.is_synthetic,
        ready=dict(result.ready),
        profile=result.profiles,
        skipped=result.skipped,
    )
    return _Outcome(result.levels, data, [])


def _plan(invocation: Invocation, job: _Job) -> Any:
    from launcher.plan import make_plan, read_inventory
    from launcher.supervise.instance import InstanceFolder, state_root

    entry = invocation.resolve(job.name, job.overrides)
    folder = InstanceFolder(state_root(invocation.environ), entry.name)
    return make_plan(entry, read_inventory(), invocation.environ, folder.path)


def _local_facts(plan: Any) -> tuple[dict[str, Any], bool]:
    """Give the device and whether weights are random, as this machine's plan of the model says."""
    from launcher.benchmark.synthetic import is_synthetic

    name = plan.gpu.name if plan.gpu is not None else plan.config.device
    has_random_weights = plan.files.folder is not None and is_synthetic(plan.files.folder)
    return {"kind": plan.config.device, "name": name}, plan.config.load_format == "dummy" or has_random_weights


def _raw(runs_of: Sequence[Sequence[LevelFigures]]) -> list[list[dict[str, Any]]]:
    from dataclasses import asdict

    return [[asdict(run) for run in runs] for runs in runs_of]


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
        f"{level.requests:,}",
        f"{level.output_tokens_per_second:,.0f}",
        _number(level.decode_tokens_per_second, 0),
        _number(level.ttft_ms_p50, 1),
        _number(level.ttft_ms_p99, 1),
        _number(level.tpot_ms_p50, 2),
        _number(level.itl_ms_p99, 2),
        str(level.errors),
    )


def _offline_row(level: LevelFigures) -> tuple[str, ...]:
    floor = level.floor or {}
    fraction = floor.get("fraction_spec") or floor.get("fraction_copy") or floor.get("fraction")
    return (
        str(level.requests),
        _number(level.decode_tokens_per_second, 0),
        _number(level.prefill_tokens_per_second, 0),
        _number(level.tpot_ms_p50, 2),
        _number(level.distinct_experts, 1),
        _number(None if fraction is None else 100 * fraction, 0),
    )


def _profile_title(profile: Mapping[str, Any]) -> str:
    fraction = profile.get("fraction")
    share = "" if fraction is None else f", {100 * fraction:.0f}% of the floor"
    step = 1e3 * profile["step_seconds"]
    return f"one decode step, {profile['num_requests']} in flight: {step:.3f} ms at context {profile['context']}{share}"


def _profile_rows(profile: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row per op, longest first, and one for what is left of the step: the host, sampling, gaps."""
    step = profile["step_seconds"]
    rows: list[tuple[str, ...]] = []
    for op in profile["ops"]:
        amount, fraction = op.get("bytes"), op.get("fraction")
        rows.append(
            (
                op["name"],
                op["spec"],
                f"{op['calls']:.0f}",
                f"{1e6 * op['seconds']:.1f}",
                f"{100 * op['seconds'] / step:.0f}%",
                _number(None if amount is None else amount / 1e6, 1),
                _number(None if fraction is None else 100 * fraction, 0),
            )
        )
    rest = step - sum(op["seconds"] for op in profile["ops"])
    rows.append(("(outside ops)", "", "", f"{1e6 * rest:.1f}", f"{100 * rest / step:.0f}%", "-", "-"))
    return rows


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
