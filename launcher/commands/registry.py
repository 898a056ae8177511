"""`hlaunch registry init | add | set`: begin a registry file, and change it without touching the rest of it.

Knows: which file is meant and what is said about the change. Refuses to know: YAML (`launcher.registry.editing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands import Invocation, invocation_of
from launcher.errors import RegistryInvalid, UsageError

if TYPE_CHECKING:
    from launcher.registry.editing import Edit

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the difference, write nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    @app.callback()
    def group() -> None:
        """Begin a registry, or change it; comments and all other lines stay as they are."""

    @app.command("init", short_help="Write a registry to start from, and its schema.")
    def init(
        ctx: typer.Context,
        path: Annotated[
            Path | None, typer.Argument(metavar="[FILE]", help="Where to write; --file, else ./model_registry.yml.")
        ] = None,
        as_json: AsJson = False,
    ) -> None:
        """Write a registry to start from, every key commented, and its JSON schema beside it for editors.

        Never replaces a registry that is there.
        """
        write_registry(invocation_of(ctx), path, as_json=as_json)

    @app.command("add", short_help="Add an entry; begin a registry where there is none.")
    def add(
        ctx: typer.Context,
        name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new entry.")],
        model: Annotated[str, typer.Option("--model", metavar="MODEL", help="Hugging Face id or folder.")],
        settings: Annotated[
            list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A key of the entry; may repeat.")
        ] = None,
        is_dry: DryRun = False,
        as_json: AsJson = False,
    ) -> None:
        """Add an entry at the end of `models`; without a registry of your own, begin one here."""
        from launcher.registry.editing import add_entry, begin_registry

        invocation = invocation_of(ctx)
        pairs = [("model", model), *map(_pair, settings or [])]
        path, source, text = own_file(invocation)
        edit = begin_registry(source, name, pairs) if text is None else add_entry(text, source, name, pairs)
        finish(invocation, path, source, text, [edit], "added", is_dry=is_dry, as_json=as_json)

    @app.command("set")
    def set_(
        ctx: typer.Context,
        name: Annotated[str, typer.Argument(metavar="NAME", help="A model's name or alias.")],
        settings: Annotated[list[str], typer.Argument(metavar="KEY=VALUE…", help="What to set: max-num-seqs=8.")],
        is_dry: DryRun = False,
        as_json: AsJson = False,
    ) -> None:
        """Set values of an entry, as `--set` would for one run."""
        from launcher.registry.editing import set_value

        invocation = invocation_of(ctx)
        path, source, text = own_file(invocation)
        if text is None:
            raise UsageError("there is no registry of your own here", hint="run: hlaunch registry add NAME --model …")
        edits: list[Edit] = []
        current = text
        for key, value in map(_pair, settings):
            # By its own name from the second on: the first may have changed the alias.
            edits.append(set_value(current, source, edits[-1].entry if edits else name, key, value))
            current = edits[-1].text
        finish(invocation, path, source, text, edits, "set", is_dry=is_dry, as_json=as_json)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError("a setting is KEY=VALUE", hint="write max-num-seqs=8")
    return key.strip(), value


def write_registry(invocation: Invocation, path: Path | None, *, as_json: bool) -> None:
    """Write a starting registry and its schema, and say where."""
    from launcher.registry.editing import write_starter
    from launcher.registry.locate import REGISTRY_FILE, display_path

    target = invocation.cwd / (path or invocation.registry_file or REGISTRY_FILE)
    if target.is_dir():
        target /= REGISTRY_FILE
    written = [display_path(each, invocation.cwd) for each in write_starter(target)]
    if as_json:
        invocation.console.json({"file": written[0], "schema": written[1]})
        return
    invocation.console.data(f"{written[0]}: written, with its schema {written[1]}")
    invocation.console.note("next: hlaunch list, hlaunch registry add NAME --model ..., hlaunch plan NAME")


def own_file(invocation: Invocation) -> tuple[Path, str, str | None]:
    """Find the registry to write, its name for messages, and its text; None where a new one is to be begun.

    The copy that is installed with hlaunch belongs to nobody: it is read by everyone and replaced by updates.
    """
    from launcher.registry.document import DocumentError
    from launcher.registry.editing import read_text
    from launcher.registry.locate import REGISTRY_FILE, display_path, packaged_registry

    path = invocation.find_registry()
    if path == packaged_registry() and invocation.registry_file is None:
        return invocation.cwd / REGISTRY_FILE, REGISTRY_FILE, None
    source = display_path(path, invocation.cwd)
    try:
        return path, source, read_text(path, source)
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror}") from error
    except DocumentError as error:
        raise RegistryInvalid(f"{source} has 1 error", issues=[error.issue]) from error


def finish(
    invocation: Invocation,
    path: Path,
    source: str,
    before: str | None,
    edits: Sequence[Edit],
    verb: str,
    *,
    is_dry: bool,
    as_json: bool,
) -> None:
    """Write the last of several edits unless it is a rehearsal, and say what was changed."""
    from launcher.registry.editing import write_registry

    after = edits[-1].text
    is_changed = after != before
    if is_changed and not is_dry:
        write_registry(path, after, before)
    if as_json:
        facts = [
            {"key": edit.key or None, "line": edit.line, "old": _shown(edit, edit.old), "new": _shown(edit, edit.new)}
            for edit in edits
        ]
        invocation.console.json(
            {
                "file": source,
                "entry": edits[-1].entry,
                "action": verb,
                "written": is_changed and not is_dry,
                "changes": facts,
            }
        )
        return
    if is_dry:
        invocation.console.difference(_difference(before or "", after, source))
        return
    for edit in edits:
        what = f"{edit.key} " if edit.key else ""
        was = f" (was {_shown(edit, edit.old)})" if edit.old is not None else ""
        value = f"= {_shown(edit, edit.new)}{was}" if edit.key else ""
        invocation.console.data(f"{source}:{edit.line}: {verb} {edit.entry} {what}{value}".rstrip())
    if not is_changed:
        invocation.console.note("nothing changed")


def _shown(edit: Edit, value: str | None) -> str | None:
    """A value as it may be shown; a key's literal and a secret variable are hidden."""
    from launcher.registry import redacted

    if value is None:
        return None
    if edit.key == "api-key":
        return value if value.strip('"').startswith(("${", "file:")) else "<hidden>"
    return redacted(edit.key.removeprefix("env."), value) if edit.key.startswith("env.") else value


def _difference(before: str, after: str, source: str) -> list[str]:
    """The changed lines and two around them, without secrets."""
    import difflib

    from launcher.redaction import Redaction
    from launcher.registry.editing import secret_values

    redaction = Redaction(
        secret_values(before) | {f"new_{name}": value for name, value in secret_values(after).items()}
    )
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), source, source, lineterm="", n=2)
    return [redaction.line(line) for line in lines]
