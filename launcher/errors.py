"""The launcher's exception tree: every way a command can end badly, with its exit code.

Knows: messages, hints, exit codes, how a located problem reads as text. Refuses to know: rich, Typer, YAML.

    HlaunchError                      exit 1
    ├── UsageError                    exit 2   bad flag, bad argument
    │   └── OverrideError             exit 2   bad --set or HLAUNCH_<KEY>; carries issues
    ├── RegistryError                 exit 3
    │   ├── RegistryNotFound          exit 3
    │   └── RegistryInvalid           exit 3   carries every issue of the run
    ├── UnknownName                   exit 4   profile, cluster, node; carries the available names
    │   └── UnknownModel              exit 4
    ├── PreflightError                exit 5   port in use, weights missing
    ├── DoesNotFit                    exit 6
    ├── EngineFailed                  exit 1, or the child's own code
    └── NotReady                      exit 8   the readiness deadline passed

A user sees `error: <message>`, then the details, then `hint: <hint>`; never a traceback without `--debug`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.exit_codes import ExitCode

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True, slots=True)
class Issue:
    """One located problem. `line` and `column` count from 1; both are None for a flag or a variable.

    `source` is the file as the user named it, or the flag (`--set port=x`), or the variable (`$HLAUNCH_PORT`).
    `path` is dotted: `models.gpt-oss-20b.max-num-seqs`; empty for the whole document.
    """

    severity: Severity
    code: str
    source: str
    line: int | None
    column: int | None
    path: str
    message: str
    hint: str = ""

    @property
    def where(self) -> str:
        """`file:line:column`, or the bare source when there is no position."""
        if self.line is None:
            return self.source
        return f"{self.source}:{self.line}:{self.column}"

    def headline(self) -> str:
        """The problem in one line, the form editors and CI understand."""
        subject = f"{self.path}: " if self.path else ""
        return f"{self.where}: {self.severity}[{self.code}] {subject}{self.message}"

    def as_dict(self) -> dict[str, str | int | None]:
        """The same as plain values, for `--json`."""
        return {
            "severity": self.severity,
            "code": self.code,
            "file": self.source,
            "line": self.line,
            "column": self.column,
            "path": self.path,
            "message": self.message,
            "hint": self.hint or None,
        }


class HlaunchError(Exception):
    """A failure the user can understand: one line, optional detail lines, one hint, one exit code."""

    exit_code: int = ExitCode.ENGINE_FAILED

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        details: Iterable[str] = (),
        issues: Sequence[Issue] = (),
        exit_code: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = tuple(details)
        self.issues = tuple(issues)
        if exit_code is not None:
            self.exit_code = exit_code


class UsageError(HlaunchError):
    """The command line does not make sense."""

    exit_code = ExitCode.USAGE


class OverrideError(UsageError):
    """A `--set` or an `HLAUNCH_<KEY>` variable does not fit the schema."""


class RegistryError(HlaunchError):
    """The registry cannot be used."""

    exit_code = ExitCode.REGISTRY_INVALID


class RegistryNotFound(RegistryError):
    """No registry at the place that was asked for."""


class RegistryInvalid(RegistryError):
    """The registry has errors; `issues` holds all of them, warnings included, in file order."""


class UnknownName(HlaunchError):
    """Nothing of this kind has this name; `available` lists the names in file order."""

    exit_code = ExitCode.UNKNOWN_MODEL

    def __init__(self, message: str, *, available: Sequence[str], hint: str = "") -> None:
        super().__init__(message, hint=hint, details=(f"available: {', '.join(available)}",) if available else ())
        self.available = tuple(available)


class UnknownModel(UnknownName):
    """No entry has this name or alias."""


class PreflightError(HlaunchError):
    """A check before the start failed."""

    exit_code = ExitCode.PREFLIGHT


class DoesNotFit(HlaunchError):
    """The model does not fit the hardware, or no placement is valid."""

    exit_code = ExitCode.DOES_NOT_FIT


class EngineFailed(HlaunchError):
    """The engine died; pass its exit status as `exit_code` when it has one."""


class NotReady(HlaunchError):
    """The engine did not become ready before the deadline."""

    exit_code = ExitCode.NOT_READY
