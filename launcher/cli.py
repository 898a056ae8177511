"""The `hlaunch` command: global options, lazy commands, and the boundary where every failure becomes one line.

Knows: which commands exist and where they live, global options, exit codes. Refuses to know: what any command does.

How a command registers: it has a row in `COMMANDS` (name -> help line) and a module `launcher/commands/<name>.py` with
`register(app: typer.Typer)`, described in `launcher.commands`. The module is imported only when its command runs, so
`hlaunch --help` loads none of them; a module that is missing breaks its own command and no other.

Global options may stand before or after the command (`-f` only before it: `logs -f` follows). The seed's form is
kept: `MODEL_NAME=x hlaunch` is `up x`, and `--dry-run` goes along.
"""

from __future__ import annotations

import errno
import keyword
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from launcher import __version__
from launcher.commands import Invocation
from launcher.console import Console
from launcher.errors import HlaunchError, UsageError
from launcher.exit_codes import ExitCode
from launcher.help_screen import App

COMMANDS: Mapping[str, str] = {
    "up": "Start a model and serve it until Ctrl-C; -d detaches.",
    "plan": "Show what a start would do: placement, topology, memory, ports.",
    "down": "Stop what `up` started.",
    "restart": "Stop a model and start it again as it was started.",
    "ps": "Show what runs.",
    "status": "Show the nodes of a launch, and what happened on them.",
    "logs": "Show the log of a running or past model.",
    "top": "Watch tokens/s, latency, KV cache, queue; vLLM and SGLang too.",
    "connect": "Set up claude, codex, opencode, openwebui or env for a server.",
    "chat": "Talk to a model in the terminal.",
    "bench": "Measure latency and throughput of a model.",
    "synth": "Write a checkpoint of a model's true shape with random weights.",
    "explain": "Say which kernel serves each op, and why not the others.",
    "fit": "Show whether a model fits, and what would make it fit.",
    "render": "Write the compose files of head and workers.",
    "topo": "Rank the ways to split a model over a cluster.",
    "inventory": "Show cores, memory, GPUs and NICs; --json saves it.",
    "init": "Write a registry to start from, and its schema.",
    "list": "List the models of the registry.",
    "show": "Show one model, resolved; --explain says where values come from.",
    "validate": "Check a registry and report every problem.",
    "env": "Show the fabric's variables of each node; --lint checks them.",
    "doctor": "Examine the hosts of a cluster, and the fabric between them.",
    "schema": "Print the JSON schema of the registry, or its keys.",
    "import": "Turn a vLLM configuration or command line into a registry.",
    "registry": "Begin a registry, add an entry, set a value; the rest stays.",
    "completion": "Let a shell complete commands, options and model names.",
}

SECTIONS: Mapping[str, tuple[str, ...]] = {
    "Run a model": ("up", "down", "restart", "ps", "status", "logs", "top"),
    "Use it": ("chat", "connect", "bench"),
    "Plan": ("plan", "fit", "topo", "render", "inventory"),
    "Registry": ("init", "list", "show", "validate", "registry", "import", "schema"),
    "Examine": ("doctor", "env", "explain", "synth", "completion"),
}
"""How `--help` groups the commands; each is in one section."""

ALIASES: Mapping[str, str] = {"serve": "up", "run": "up", "stop": "down"}
"""Words of other programs for ours; no help lists them."""
ELSEWHERE: Mapping[str, str] = {
    "bench-fabric": "hlaunch doctor --cluster NAME --active measures between the nodes",
    "compose": "hlaunch render NAME writes the compose files",
    "dry-run": "hlaunch plan NAME",
    "probe": "hlaunch status NAME asks the nodes; inside a container: python -m launcher.probe ready",
    "import vllm-recipe": "a recipe's command line: hlaunch import vllm-serve 'vllm serve …'",
    "import sparkrun": "a recipe's command line: hlaunch import vllm-serve 'vllm serve …'",
    "topo --format": "as SVG: hlaunch plan NAME --svg FILE; as text and JSON: hlaunch topo [--json]",
}
"""What people look for under another name, and which command does it."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FLAGS = ("--no-color", "--plain", "--debug")


class _LazyGroup(TyperGroup):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        cmd_name = ALIASES.get(cmd_name, cmd_name)
        if cmd_name not in COMMANDS:
            raise _unknown(cmd_name, cmd_name, COMMANDS)
        return _load(cmd_name)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        self.format_commands(ctx, formatter)
        with formatter.section("Options"):
            formatter.write_dl([record for param in self.get_params(ctx) if (record := param.get_help_record(ctx))])

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(map(len, COMMANDS))
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(f"{name:<{width}}", COMMANDS[name]) for name in names])


class _PartGroup(TyperGroup):
    """A command with parts, such as `registry add`."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found = super().get_command(ctx, cmd_name)
        if found is None:
            raise _unknown(f"{ctx.info_name} {cmd_name}", cmd_name, self.commands)
        return found


def _unknown(line: str, word: str, known: Mapping[str, Any]) -> UsageError:
    from launcher.registry.suggest import did_you_mean

    hint = ELSEWHERE.get(line) or did_you_mean(word, known) or f"commands: {', '.join(known)}"
    return UsageError(f"no such command: {line}", hint=hint)


def _load(name: str) -> Any:
    # `import` cannot name a module.
    module_name = f"launcher.commands.{name}_" if keyword.iskeyword(name) else f"launcher.commands.{name}"
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name == module_name:
            raise UsageError(f"'{name}' is not part of this installation") from error
        raise HlaunchError(
            f"'{name}' needs the Python package '{error.name}'",
            hint="install the engine's packages: pip install 'hlaunch[engine]'",
        ) from error
    app = _app(cls=_PartGroup)
    module.register(app)
    return typer.main.get_command(app)


def _app(**options: Any) -> typer.Typer:
    # Typer's rich help costs 0.1 s of imports, and its pretty exceptions print local variables: secrets.
    return App(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, **options)


def _build() -> Any:
    app = _app(
        cls=_LazyGroup,
        help="Launch large language models from a YAML registry.",
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True, epilog="MODEL_NAME=x hlaunch [--dry-run] is short for: hlaunch up x")
    def root(
        ctx: typer.Context,
        file: Annotated[Path | None, typer.Option("--file", "-f", metavar="PATH", help="The registry to use.")] = None,
        profile: Annotated[
            list[str] | None,
            typer.Option("--profile", metavar="NAME", help="Put a profile over the model's settings; may repeat."),
        ] = None,
        plain: Annotated[bool, typer.Option("--plain", help="No colour, no redrawing.")] = False,
        no_color: Annotated[bool, typer.Option("--no-color", help="The same; NO_COLOR=1 also works.")] = False,
        debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something breaks.")] = False,
        version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="With MODEL_NAME set: show the plan, start nothing.")
        ] = False,
    ) -> None:
        environ = dict(os.environ)
        console = Console(is_plain=plain or no_color, environ=environ)
        ctx.obj = Invocation(console, environ, _current_folder(), file, debug, tuple(profile or ()))
        if version:
            console.data(f"hlaunch {__version__}")
            raise typer.Exit
        if ctx.invoked_subcommand is None:
            if dry_run:
                raise UsageError("--dry-run needs a model", hint="MODEL_NAME=tiny-oss hlaunch --dry-run")
            console.raw(ctx.get_help() + "\n")
        elif dry_run:
            raise UsageError(
                "--dry-run stands after the command", hint=f"hlaunch {ctx.invoked_subcommand} NAME --dry-run"
            )

    return typer.main.get_command(app)


def _current_folder() -> Path:
    try:
        return Path.cwd()
    except OSError as error:
        raise UsageError("the current folder is gone", hint="cd into a folder that exists") from error


def arrange(args: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Move global options to the front, and turn the seed's bare form into `up`. Pure."""
    front: list[str] = []
    rest: list[str] = []
    waiting = iter(_bench_profile(args))
    for arg in waiting:
        if arg == "--":
            rest += [arg, *waiting]
        elif arg in _FLAGS or arg.startswith(("--file=", "--profile=")):
            front.append(arg)
        elif arg in ("--file", "--profile") or (arg == "-f" and not rest):
            front += [arg, *([value] if (value := next(waiting, None)) is not None else [])]
        else:
            rest.append(arg)
    model = environ.get("MODEL_NAME", "")
    if model and all(arg == "--dry-run" for arg in rest):
        # '--' keeps a name such as '--help' a name.
        return [*front, "up", *rest, "--", model]
    return front + rest


def _bench_profile(args: Sequence[str]) -> list[str]:
    """Tell `bench --profile`, which takes no value, from the global `--profile NAME`."""
    return [
        "--profile-step"
        if arg == "--profile" and "bench" in args[:at] and (args[at + 1 : at + 2] or ["-"])[0].startswith("-")
        else arg
        for at, arg in enumerate(args)
    ]


def main(args: Sequence[str] | None = None) -> None:
    """Run one command and exit the process. No exception gets past it."""
    code = run(list(sys.argv[1:] if args is None else args))
    # All is done and said: a late Ctrl-C has nothing left to end, and would only print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def run(args: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    is_debug = "--debug" in args
    console = Console(is_plain=any(flag in args for flag in ("--plain", "--no-color")), environ=os.environ)
    try:
        outcome = _build().main(args=arrange(args, os.environ), prog_name="hlaunch", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except HlaunchError as error:
        if is_debug:
            _print_traceback()
        console.failure(error)
        return int(error.exit_code)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`hlaunch list | head -1`); nothing is wrong here.
        _silence_stdout()
        return ExitCode.OK
    except SystemExit:
        # Typer ends with 1 by itself when that happens inside a command, and leaves its wrapper on stdout.
        if type(sys.stdout).__name__ != "PacifyFlushWrapper":
            raise
        _silence_stdout()
        return ExitCode.OK
    except OSError as error:
        if error.errno not in _FULL:
            return _unexpected(error, console, is_debug)
        _silence_stdout()
        console.error(f"cannot write {error.filename or 'the output'}: {error.strerror}", hint="free some space")
        return ExitCode.ENGINE_FAILED
    except Exception as error:  # noqa: BLE001 - the process boundary: a user never sees a traceback
        return _unexpected(error, console, is_debug)
    return outcome if isinstance(outcome, int) else ExitCode.OK


def _silence_stdout() -> None:
    """Send what is still buffered nowhere, so that the interpreter's own flush at exit cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unexpected(error: Exception, console: Console, is_debug: bool) -> int:
    """Tell a bad command line (Typer's own exceptions carry a message for the user) from a bug."""
    describe = getattr(error, "format_message", None)
    if callable(describe):
        context = getattr(error, "ctx", None)
        hint = f"see: {context.command_path} --help" if context is not None else "see: hlaunch --help"
        option = getattr(error, "option_name", None)
        hint = ELSEWHERE.get(f"{getattr(context, 'info_name', '')} {option}", hint)
        console.error(str(describe()).rstrip("."), hint=hint)
        return ExitCode.USAGE
    if isinstance(error, typer.Abort):
        return ExitCode.INTERRUPTED
    if is_debug:
        _print_traceback()
    hint = "" if is_debug else "this is a bug in hlaunch; run again with --debug for the traceback"
    console.error(f"internal error: {type(error).__name__}: {error}", hint=hint)
    return ExitCode.INTERNAL


def _print_traceback() -> None:
    import traceback

    traceback.print_exc()


if __name__ == "__main__":
    main()
