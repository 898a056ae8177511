"""One file per command, and what every command is handed.

Knows: the global options of one invocation and what follows from them. Refuses to know: any single command.

A command module `launcher/commands/<name>.py` has one public function, `register(app: typer.Typer) -> None`, and takes
`ctx: typer.Context` to reach its `Invocation`:

    def register(app: typer.Typer) -> None:
        @app.command("logs")
        def logs(ctx: typer.Context, follow: Annotated[bool, typer.Option("--follow", "-f")] = False) -> None:
            invocation = invocation_of(ctx)
            entry = invocation.resolve("tiny-oss", ["max-num-seqs=4"])
            invocation.console.data("…")

Failures are raised as `launcher.errors.HlaunchError`; `launcher.cli.main` prints them and picks the exit code. A
command that ends with another code raises `typer.Exit(code)`. Heavy imports belong inside the command's function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

    from launcher.console import Console
    from launcher.registry import Registry, ResolvedEntry

__all__ = ["Invocation", "invocation_of"]


@dataclass(frozen=True, slots=True)
class Invocation:
    """The global options of this run, and the process facts that commands may not read themselves."""

    console: Console
    environ: Mapping[str, str]
    cwd: Path
    registry_file: Path | None = None
    is_debug: bool = False
    profiles: tuple[str, ...] = ()

    def find_registry(self) -> Path:
        """Return the registry file that this run means. Raises: RegistryNotFound."""
        from launcher.registry import find_registry

        return find_registry(self.registry_file, self.environ, self.cwd)

    def load_registry(self) -> Registry:
        """Find and load the registry. Raises: RegistryError."""
        from launcher.registry import load_registry

        return load_registry(self.find_registry(), self.cwd)

    def resolve(
        self, name: str, overrides: Sequence[str] = (), *, node: str | None = None, platform: str | None = None
    ) -> ResolvedEntry:
        """Resolve one entry with this run's environment and profiles; warnings go to stderr.

        Raises: as `registry.resolve`.
        """
        from launcher.registry import resolve

        entry = resolve(
            self.load_registry(),
            name,
            self.environ,
            overrides,
            profiles=self.profiles,
            platform=platform,
            node=node,
        )
        self.console.issues(entry.issues)
        return entry


def invocation_of(ctx: typer.Context) -> Invocation:
    """Return the invocation that `launcher.cli` left in the Typer context."""
    found = ctx.find_object(Invocation)
    if found is None:
        raise RuntimeError("commands run under launcher.cli.main")
    return found
