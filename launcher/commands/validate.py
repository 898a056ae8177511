"""`hlaunch validate`: every problem of a registry, with position. Knows the verdict's form, not the rules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands import invocation_of
from launcher.exit_codes import ExitCode
from launcher.sizes import counted

if TYPE_CHECKING:
    from launcher.errors import Issue
    from launcher.registry import Registry


def register(app: typer.Typer) -> None:
    @app.command("validate")
    def validate(
        ctx: typer.Context,
        file: Annotated[
            Path | None, typer.Argument(metavar="[FILE]", help="The registry; by default the one that commands use.")
        ] = None,
        strict: Annotated[bool, typer.Option("--strict", help="Fail on warnings too.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
        as_sarif: Annotated[
            bool, typer.Option("--sarif", help="Print SARIF 2.1.0, which code hosts show beside the line.")
        ] = False,
    ) -> None:
        """Check a registry and report every problem."""
        from launcher.registry import check_registry, find_registry
        from launcher.registry.locate import display_path

        invocation = invocation_of(ctx)
        path = find_registry(file or invocation.registry_file, invocation.environ, invocation.cwd)
        registry, issues = check_registry(path, invocation.cwd)
        if registry is not None:
            # Variables make sense only in a file that is right otherwise.
            from launcher.plan.entry_checks import entry_issues

            more = [*_variables(registry), *entry_issues(registry, invocation.environ)]
            # A model of the built-in table is judged by both.
            issues = sorted({*issues, *more}, key=lambda issue: (issue.line or 0, issue.column or 0, issue.path))
        errors = sum(issue.severity == "error" for issue in issues)
        warnings = sum(issue.severity == "warning" for issue in issues)
        is_valid = errors == 0 and not (strict and warnings)
        source = display_path(path, invocation.cwd)
        if as_sarif:
            from launcher import __version__
            from launcher.registry.sarif import sarif

            invocation.console.json(sarif(issues, __version__))
        elif as_json:
            invocation.console.json(
                {
                    "file": source,
                    "valid": is_valid,
                    "models": list(registry.models) if registry is not None else [],
                    "issues": [issue.as_dict() for issue in issues],
                }
            )
        else:
            invocation.console.issues(issues)
            notes = sum(issue.severity == "info" for issue in issues)
            found = ((errors, "error"), (warnings, "warning"), (notes, "note"))
            counts = ", ".join(counted(number, noun) for number, noun in found if number)
            if is_valid and registry is not None:
                models = counted(len(registry.models), "model") if registry.models else ""
                invocation.console.data(f"{source}: valid, {', '.join(part for part in (models, counts) if part)}")
            else:
                invocation.console.error(f"{source} is not valid: {counts}")
        if not is_valid:
            raise typer.Exit(ExitCode.REGISTRY_INVALID)


def _variables(registry: Registry) -> list[Issue]:
    if not (registry.clusters or registry.profiles or registry.defaults.env or any(_has_env(registry))):
        return []
    from launcher.fabric.declared import registry_issues

    return registry_issues(registry)


def _has_env(registry: Registry) -> Iterator[bool]:
    for entry in registry.models.values():
        parts = (entry.options, *entry.profiles.values(), *entry.overrides.values())
        yield any(options.env for options in parts)
