"""The environment of the engine process: only what is declared here or in the registry, each with its origin.

Knows: which variables of ours the engine inherits and which it always gets. Refuses to know: what reads them.
A shell full of exports must not change how a model is served, and no secret of the shell reaches the engine.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from launcher.errors import PreflightError
from launcher.registry.types import ResolvedEntry
from launcher.registry.values import redacted

INHERITED = (
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "TMPDIR",
    "VIRTUAL_ENV",
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "XDG_CACHE_HOME",
    "XDG_RUNTIME_DIR",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "KMP_AFFINITY",
    "GOMP_CPU_AFFINITY",
)
"""Copied from our own environment when set there: finding programs and libraries, locale, thread counts."""

FIXED = {
    # The engine serves what is on disk; a missing file is an error to see, not a download to wait for.
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
    # The server tokenizes on its own threads; a pool inside the library would fight them for cores.
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, slots=True)
class Variable:
    """One variable for the engine; `value` None means that a lower layer's one is removed."""

    name: str
    value: str | None
    origin: str

    @property
    def shown(self) -> str:
        """The value as it may be printed: whole secrets are hidden, by name."""
        if self.value is None:
            return "(removed)"
        return redacted(self.name, self.value)


def engine_environment(entry: ResolvedEntry, environ: Mapping[str, str]) -> tuple[Variable, ...]:
    """List the engine's variables in name order: inherited, then fixed, then the registry's, the last one wins."""
    chosen: dict[str, Variable] = {}
    for name in INHERITED:
        if name in environ:
            chosen[name] = Variable(name, environ[name], "inherited")
    for name, value in FIXED.items():
        chosen[name] = Variable(name, value, "built-in")
    for name, resolved in entry.env.items():
        value_or_none = None if resolved.value is None else str(resolved.value)
        chosen[name] = Variable(name, value_or_none, str(resolved.origin))
    return tuple(chosen[name] for name in sorted(chosen))


def as_mapping(variables: tuple[Variable, ...]) -> dict[str, str]:
    """Turn the list into what a process is started with."""
    return {variable.name: variable.value for variable in variables if variable.value is not None}


ENGINE_PACKAGES = ("torch", "msgspec", "orjson", "tokenizers", "safetensors", "uvicorn", "uvloop")
"""What the engine cannot start without; the extra `engine` brings them. Looked for, never imported here."""


def engine_packages_missing(packages: Sequence[str] = ENGINE_PACKAGES) -> PreflightError | None:
    """Say which of the engine's packages are not installed beside the launcher; None when all are."""
    missing = [name for name in packages if find_spec(name) is None]
    if not missing:
        return None
    return PreflightError(
        f"the engine's packages are not installed in {sys.prefix} (missing: {', '.join(missing)})",
        hint="run: pip install 'hlaunch[engine]'",
    )
