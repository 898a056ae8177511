"""`hlaunch restart`: ends what runs and starts it again as it was started.

Knows: the words of the last `up` of a name. Refuses to know: how anything is checked, ended and started: all of that
is `up --replace`, which stops nothing before it knows that it can start.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands import Invocation, invocation_of

if TYPE_CHECKING:
    from launcher.registry import ResolvedEntry
    from launcher.supervise.instance import InstanceFolder


@dataclass(frozen=True, slots=True)
class Words:
    """How a model was started: words before and after `up`, and variables that held secrets, by name alone."""

    front: list[str]
    rest: list[str]
    variables: list[str]


def register(app: typer.Typer) -> None:
    @app.command("restart")
    def restart(
        ctx: typer.Context,
        name: Annotated[str, typer.Argument(metavar="NAME", help="A running model.")],
    ) -> int:
        """Stop a model and start it again as it was started: the same file, settings, port and cluster.

        It goes on in the background, as after `up -d`. The registry is read anew.
        """
        from launcher.errors import PreflightError
        from launcher.launches import running_launch

        invocation = invocation_of(ctx)
        launch = running_launch(invocation, name)
        words = recorded_words(launch.folder)
        if words is None:
            raise PreflightError(
                f"how {launch.name} was started is not recorded, or holds a secret",
                hint=f"hlaunch down {launch.name}, then: hlaunch up {launch.name} … as before",
            )
        unset = [variable for variable in words.variables if not invocation.environ.get(variable)]
        if unset:
            raise PreflightError(
                f"{launch.name} was started with ${unset[0]}, which is not set here; it runs on",
                details=[f"not set either: ${variable}" for variable in unset[1:]],
                hint=f"export {unset[0]}=…, then: hlaunch restart {launch.name}",
            )
        from launcher.cli import run

        return run([*words.front, "up", "--replace", *words.rest])


def remember(invocation: Invocation, folder: InstanceFolder, entry: ResolvedEntry, options: Sequence[str]) -> None:
    """Record how a model is started now; `options` are those of `up`. A secret among them is recorded nowhere.

    What variables of the environment have set is recorded as settings; of one that holds a secret the name.
    """
    from launcher.supervise.instance import write_private

    if any(_holds_secret(*option.partition("=")[::2]) for option in options):
        with contextlib.suppress(OSError):
            _record(folder).unlink()
        return
    settings, variables = _from_environment(invocation, entry)
    # The same file wherever `restart` is typed, and whatever it would find there.
    front = ["--file", str(entry.registry.absolute())]
    front += [part for profile in entry.profiles for part in ("--profile", profile)]
    # '--' keeps a name such as '--help' a name.
    words = Words(front, [*options, *settings, "--", entry.name], variables)
    write_private(_record(folder), json.dumps(asdict(words)))


def recorded_words(folder: InstanceFolder) -> Words | None:
    """Read what `remember` wrote; None for anything else."""
    try:
        words = Words(**json.loads(_record(folder).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    parts = (words.front, words.rest, words.variables)
    is_ours = all(isinstance(part, list) and all(isinstance(word, str) for word in part) for part in parts)
    return words if is_ours else None


def _from_environment(invocation: Invocation, entry: ResolvedEntry) -> tuple[list[str], list[str]]:
    """List the settings that came from `HLAUNCH_<KEY>` variables, as words, and the variables that hold secrets."""
    from launcher.registry.types import Layer

    settings: list[str] = []
    variables: list[str] = []
    for key, value in entry.values.items():
        if value.origin.layer is not Layer.ENVIRONMENT:
            continue
        variable = str(value.origin.source).removeprefix("$")
        text = invocation.environ[variable]
        if _holds_secret(key, text):
            variables.append(variable)
        else:
            settings += ["--set", f"{key}={text}"]
    return settings, variables


def _holds_secret(key: str, value: str) -> bool:
    from launcher.registry.values import holds_secret

    # A reference such as ${NAME} says where the secret is, and no more.
    return holds_secret(key.rpartition(".")[2].replace("-", "_"), value) and not value.startswith("${")


def _record(folder: InstanceFolder) -> Path:
    return folder.path / "up.json"
