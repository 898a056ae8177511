"""`hlaunch restart`: ends what runs and starts it again as it was started.

Knows: the words of the last `up` of a name. Refuses to know: how anything is started (`launcher.commands.up`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands import Invocation, invocation_of

if TYPE_CHECKING:
    from launcher.supervise.instance import InstanceFolder


def register(app: typer.Typer) -> None:
    @app.command("restart")
    def restart(
        ctx: typer.Context,
        name: Annotated[str, typer.Argument(metavar="NAME", help="A running model.")],
    ) -> int:
        """Stop a model and start it again as it was started: the same file, settings, port and cluster.

        It goes on in the background, as after `up -d`. The registry is read anew.
        """
        from launcher.commands.down import stop_launch
        from launcher.errors import PreflightError
        from launcher.launches import running_launch

        invocation = invocation_of(ctx)
        launch = running_launch(invocation, name)
        words = _words(launch.folder)
        if words is None:
            raise PreflightError(
                f"how {launch.name} was started is not recorded, or holds a secret",
                hint=f"hlaunch down {launch.name}, then: hlaunch up {launch.name} … as before",
            )
        from launcher.cli import run

        stop_launch(invocation, launch)
        return run(words)


def remember(invocation: Invocation, folder: InstanceFolder, name: str, options: Sequence[str]) -> None:
    """Record how a model is started now; `options` are those of `up`. A secret among them is recorded nowhere."""
    from launcher.supervise.instance import write_private

    if _holds_secret(options):
        with contextlib.suppress(OSError):
            _record(folder).unlink()
        return
    front = ["--file", str(invocation.registry_file.absolute())] if invocation.registry_file is not None else []
    front += [part for profile in invocation.profiles for part in ("--profile", profile)]
    # '--' keeps a name such as '--help' a name.
    write_private(_record(folder), json.dumps([*front, "up", *options, "--", name]))


def _holds_secret(options: Sequence[str]) -> bool:
    from launcher.registry.values import holds_secret

    pairs = [option.partition("=") for option in options]
    # A reference such as ${NAME} says where the secret is, and no more.
    return any(
        holds_secret(key.rpartition(".")[2].replace("-", "_"), value) and not value.startswith("${")
        for key, _, value in pairs
    )


def _record(folder: InstanceFolder) -> Path:
    return folder.path / "up.json"


def _words(folder: InstanceFolder) -> list[str] | None:
    try:
        words = json.loads(_record(folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return words if isinstance(words, list) and all(isinstance(word, str) for word in words) else None
