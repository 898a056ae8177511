"""Which registry file is meant. Knows the search order; refuses to read the file."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from launcher.errors import RegistryNotFound
from launcher.registry.values import show_text

REGISTRY_FILE = "model_registry.yml"
_IN_FOLDER = (REGISTRY_FILE, f"config/{REGISTRY_FILE}", "hlaunch.yml")


def find_registry(explicit: Path | None, environ: Mapping[str, str], cwd: Path) -> Path:
    """Return the first registry of: `explicit`, $HLAUNCH_REGISTRY, `cwd`, the XDG config folder, the packaged copy.

    Files are never merged. A file that was named must exist (a pipe will do); a searched place may be absent.
    Raises: RegistryNotFound.
    """
    for named, origin in ((explicit, "on the command line"), (environ.get("HLAUNCH_REGISTRY"), "by $HLAUNCH_REGISTRY")):
        if named is not None and str(named) != "":
            path = cwd / _expanded(Path(named))
            if problem := _problem(path):
                shown = show_text(str(named), 200)
                raise RegistryNotFound(f"registry {shown} {problem}", hint=f"it was named {origin}")
            return path
    for path in _searched(environ, cwd):
        if _is_file(path):
            return path
    raise RegistryNotFound("no registry found", hint=f"write {REGISTRY_FILE} here, or name one: hlaunch --file PATH …")


def packaged_registry() -> Path:
    """The registry that comes with hlaunch; in a checkout it is the file at the root."""
    return Path(__file__).resolve().parent.parent / REGISTRY_FILE


def display_path(path: Path, cwd: Path) -> str:
    """Write a path as a user would: relative to `cwd` when it is inside."""
    try:
        return str(path.relative_to(cwd))
    except ValueError:
        return str(path)


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        # `~nobody/x`: there is no such user, so the text stands for itself.
        return path


def _problem(path: Path) -> str:
    """Why a named file cannot be used, in a few words; empty when it can."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if stat.S_ISDIR(mode):
        return "is a folder"
    return "is a socket" if stat.S_ISSOCK(mode) else ""


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _searched(environ: Mapping[str, str], cwd: Path) -> Iterator[Path]:
    yield from (cwd / name for name in _IN_FOLDER)
    home = environ.get("HOME", "")
    config = environ.get("XDG_CONFIG_HOME") or (f"{home}/.config" if home else "")
    # The XDG specification tells readers to ignore relative paths.
    if config.startswith("/"):
        yield Path(config) / "hlaunch" / REGISTRY_FILE
    yield packaged_registry()
