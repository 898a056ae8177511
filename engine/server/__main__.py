"""The server process: `python -m engine.server --config engine.json [--status-fd N]`.

Order matters for time to ready: the engine core is spawned first, so that its heavy imports and the weights load while
this process imports the HTTP stack and reads the tokenizer. Every end has one cause: it goes up the status pipe as a
`fatal` line, to stderr, and into the exit code.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from engine import ipc
from engine.config import ConfigError, EngineConfig, load_generation_defaults
from engine.data_parallel import DataParallelEngine
from engine.process import StatusPipe, dump_stacks_on_signal, follow_parent, say, say_trace

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_REGISTRY_INVALID = 3
EXIT_PREFLIGHT = 5


@dataclass(slots=True)
class _Fatal(Exception):
    """The one cause of an exit."""

    phase: str
    error_type: str
    message: str
    hint: str = ""
    exit_code: int = EXIT_FAILED


class _Asked(BaseException):
    """A signal asked this process to end before it serves, which is when HTTP's drain takes the signals over."""


def main() -> int:
    """Serve until a signal, the parent's death or a fatal cause; returns the exit code."""
    parser = argparse.ArgumentParser(prog="engine.server", description="Serve one model over HTTP.")
    parser.add_argument("--config", type=Path, required=True, help="engine.json")
    parser.add_argument("--status-fd", type=int, default=None, help="where phases are reported, one JSON line each")
    arguments = parser.parse_args()
    if arguments.status_fd is not None:
        follow_parent(arguments.status_fd)
    dump_stacks_on_signal()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    # uvicorn tells its life under the name of an error log; ours is told by the status pipe.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    status = StatusPipe(arguments.status_fd)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end_the_start)
    try:
        config = _read_config(arguments.config)
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config, status))
    except _Fatal as fatal:
        status.fatal(fatal.phase, fatal.error_type, fatal.message, fatal.hint, fatal.exit_code)
        say(f"error: {fatal.message}" + (f"\nhint: {fatal.hint}" if fatal.hint else ""))
        return fatal.exit_code
    except _Asked:
        pass
    return EXIT_OK


def _end_the_start(*_: object) -> None:
    # Once: the engine is stopped now, and a second signal is for the impatient.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_DFL)
    raise _Asked


def _read_config(path: Path) -> EngineConfig:
    try:
        return EngineConfig.read(path)
    except ConfigError as error:
        raise _Fatal("config", "ConfigError", str(error), error.hint, EXIT_REGISTRY_INVALID) from error


async def _serve(config: EngineConfig, status: StatusPipe) -> None:
    """Start the core, answer from the first second on, report ready, drain on a signal.

    Raises: _Fatal with the cause when the core or this process cannot go on.
    """
    causes: list[ipc.FatalMessage] = []
    failed = asyncio.Event()

    def on_phase(message: ipc.PhaseMessage) -> None:
        status.phase(message.phase, message.state, message.fraction, message.detail)  # type: ignore[arg-type]

    def on_fatal(message: ipc.FatalMessage) -> None:
        causes.append(message)
        failed.set()

    status.phase("spawn", "begin")
    try:
        engine = DataParallelEngine(config, on_phase, on_fatal)
    except ConfigError as error:
        # Nodes that cannot be let in are a matter of this host's secret and addresses, to be mended before the start.
        code = EXIT_PREFLIGHT if error.where in ("nodes", "head-addr") else EXIT_FAILED
        raise _Fatal("config", "ConfigError", str(error), error.hint, code) from error
    try:
        await _serve_engine(config, status, engine, failed)
    finally:
        await engine.stop()
    if causes:
        cause = causes[0]
        raise _Fatal(cause.phase, cause.error_type, cause.message, cause.hint, cause.exit_code)


async def _serve_engine(
    config: EngineConfig, status: StatusPipe, engine: DataParallelEngine, failed: asyncio.Event
) -> None:
    engine.start()
    from engine.server.app import create_app
    from engine.server.listen import bind, serve, url_of
    from engine.text import TextError, Tokenizer, chat_format_for

    try:
        listener = bind(config.server)
    except OSError as error:
        where = f"{config.server.host}:{config.server.port}"
        hint = "stop the other server or choose another port" if error.errno == errno.EADDRINUSE else ""
        raise _Fatal(
            "spawn", type(error).__name__, f"cannot listen on {where}: {error.strerror}", hint, EXIT_PREFLIGHT
        ) from error
    status.phase("spawn", "end", None, url_of(listener))
    try:
        tokenizer = Tokenizer.from_folder(engine.folder)
        chat_format = chat_format_for(engine.model.model_type, tokenizer)
        defaults = load_generation_defaults(engine.folder)
    except (TextError, ConfigError) as error:
        raise _Fatal("load", type(error).__name__, str(error)) from error
    app = create_app(config, engine, tokenizer, chat_format, generation_defaults=defaults)

    async def announce() -> None:
        await engine.ready.wait()
        status.phase("ready", "end")
        status.ready(url_of(listener), app.model_names[0], dict(engine.facts))

    async def stop_when_failed() -> None:
        await failed.wait()
        app.begin_drain()

    watchers = [asyncio.create_task(announce()), asyncio.create_task(stop_when_failed())]
    try:
        await serve(app, config.server, sock=listener)
    finally:
        for task in watchers:
            task.cancel()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:  # noqa: BLE001 - the process border: the launcher names the exit, the log holds the trace
        say_trace(error)
        sys.exit(EXIT_FAILED)
