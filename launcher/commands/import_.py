"""`hlaunch import vllm-config | vllm-serve | mixvllm`: another program's configuration as a registry.

Knows: files, and how the report reads. Refuses to know: options (`launcher.registry.importing`).
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands import Invocation, invocation_of
from launcher.errors import RegistryInvalid, UsageError

if TYPE_CHECKING:
    from launcher.registry.importing import Change, Imported
    from launcher.registry.importing.changes import Judge

_ACTIONS = ("kept", "renamed", "dropped")

Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the registry here.")]
Force = Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print registry and report as JSON.")]
Name = Annotated[str | None, typer.Option("--name", metavar="NAME", help="Name of the entry; by default the model's.")]


def register(app: typer.Typer) -> None:
    @app.callback()
    def group() -> None:
        """Turn another program's configuration into a registry; a report says what was kept, renamed and dropped."""

    @app.command("vllm-config")
    def vllm_config(
        ctx: typer.Context,
        file: Annotated[Path, typer.Argument(metavar="FILE", help="What `vllm serve --config` takes.")],
        name: Name = None,
        output: Output = None,
        force: Force = False,
        as_json: AsJson = False,
    ) -> None:
        """Import a vLLM configuration file."""
        from launcher.registry.importing import from_config_file

        invocation = invocation_of(ctx)
        imported = from_config_file(_read(invocation, file), str(file), name, _judge(invocation, output))
        _finish(invocation, imported, output, force=force, as_json=as_json)

    @app.command("vllm-serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def vllm_serve(
        ctx: typer.Context,
        line: Annotated[str, typer.Argument(metavar="LINE", help="The whole command line, in quotes.")],
        name: Name = None,
        output: Output = None,
        force: Force = False,
        as_json: AsJson = False,
    ) -> None:
        """Import a `vllm serve …` command line."""
        from launcher.registry.importing import from_serve_line

        invocation = invocation_of(ctx)
        # Without quotes the shell has split it: the words are put together again.
        whole = shlex.join([line, *ctx.args]) if ctx.args else line
        read_config = partial(_config, invocation)
        imported = from_serve_line(whole, name, read_config, _judge(invocation, output))
        _finish(invocation, imported, output, force=force, as_json=as_json)

    @app.command("mixvllm")
    def mixvllm(
        ctx: typer.Context,
        file: Annotated[Path, typer.Argument(metavar="FILE", help="A registry that has only `models`.")],
        env: Annotated[
            Path | None, typer.Option("--env", metavar="FILE", help="The .env of the containers beside it.")
        ] = None,
        output: Output = None,
        force: Force = False,
        as_json: AsJson = False,
    ) -> None:
        """Import a mixvllm registry and its .env."""
        from launcher.registry.importing import from_model_registry

        invocation = invocation_of(ctx)
        dotenv = None if env is None else _read(invocation, env)
        imported = from_model_registry(_read(invocation, file), str(file), dotenv, _judge(invocation, output))
        _finish(invocation, imported, output, force=force, as_json=as_json)


def _config(invocation: Invocation, file: str) -> str | None:
    """Return the text of a file that a command line names; None when it is not there."""
    return _read(invocation, Path(file)) if (invocation.cwd / file).is_file() else None


def _judge(invocation: Invocation, output: Path | None) -> Judge:
    """Judge by the files of models that are on this machine, as `validate` will where the registry is to stand."""
    from launcher.plan.entry_checks import entry_issues
    from launcher.registry.locate import REGISTRY_FILE

    path = invocation.cwd / (output or REGISTRY_FILE)
    return lambda registry: entry_issues(replace(registry, path=path), invocation.environ)


def _read(invocation: Invocation, file: Path) -> str:
    from launcher.registry.document import DocumentError
    from launcher.registry.editing import read_text

    try:
        return read_text(invocation.cwd / file, str(file))
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}", hint="name an existing file") from error
    except DocumentError as error:
        raise RegistryInvalid(f"{file} has 1 error", issues=[error.issue]) from error


def _finish(invocation: Invocation, imported: Imported, output: Path | None, *, force: bool, as_json: bool) -> None:
    console = invocation.console
    if output is not None:
        _write(invocation.cwd / output, imported.text, force=force)
    if as_json:
        changes = [change.as_dict() for change in imported.changes]
        console.json({"registry": imported.text, "output": str(output) if output else None, "changes": changes})
        return
    if output is None:
        console.raw(imported.text)
    if imported.changes:
        console.note_table(("", "OPTION", "BECOMES, OR WHY NOT"), _rows(imported.changes))
    console.note(_sum(imported.changes))
    if output is not None:
        console.data(f"wrote {output}; next: hlaunch --file {output} list")
    else:
        console.note("to write it: -o model_registry.yml")


def _write(path: Path, text: str, *, force: bool) -> None:
    from launcher.registry.document import DocumentError
    from launcher.registry.editing import read_text, write_registry

    try:
        before = read_text(path, str(path)) if path.exists() else None
    except (OSError, DocumentError) as error:
        raise UsageError(f"{path.name} is there and cannot be read", hint="choose another file") from error
    if before is not None and not force:
        raise UsageError(f"{path.name} exists", hint="choose another file, or add --force")
    write_registry(path, text, before)


def _rows(changes: tuple[Change, ...]) -> list[tuple[str, str, str]]:
    """One row per option, grouped by what became of it."""
    return [
        (action, change.source, "; ".join(part for part in (_result(change), change.reason) if part))
        for action in _ACTIONS
        for change in changes
        if change.action == action
    ]


def _result(change: Change) -> str:
    return change.result if change.action == "renamed" else ""


def _sum(changes: tuple[Change, ...]) -> str:
    return ", ".join(f"{sum(item.action == action for item in changes)} {action}" for action in _ACTIONS)
