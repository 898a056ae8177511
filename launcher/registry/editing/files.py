"""A registry file is replaced whole, or not at all.

Knows: temporary files, permissions, links. Refuses to know: what changed.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
import tempfile
from pathlib import Path

from launcher.errors import HlaunchError, UsageError
from launcher.exit_codes import ExitCode
from launcher.registry.document import decode
from launcher.registry.locate import packaged_registry

_BOM = b"\xef\xbb\xbf"


def read_text(path: Path, source: str) -> str:
    """Read a registry's text as it is written, line ends included. Raises: DocumentError; OSError."""
    with path.open("rb") as handle:
        return decode(handle.read((1 << 20) + 1), source)


def write_registry(path: Path, text: str, expected: str | None) -> None:
    """Replace a registry file atomically, with its permissions; a link keeps pointing at the replaced file.

    `expected` is the text that was edited; None: the file must not exist.
    Raises: HlaunchError when the file is another one by now, is write-protected, or cannot be written.
    """
    target = Path(os.path.realpath(path))
    try:
        before = target.read_bytes() if target.exists() else None
        info = target.stat() if before is not None else None
        has_bom = before is not None and before.startswith(_BOM)
        known = None if expected is None else (_BOM if has_bom else b"") + expected.encode()
        if before != known:
            raise HlaunchError(f"{path} was changed by somebody else meanwhile", hint="run the command again")
        if info is not None:
            _check_writable(path, target, stat.S_IMODE(info.st_mode))
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write((_BOM if has_bom else b"") + text.encode())
                stream.flush()
                os.fsync(stream.fileno())
            if info is not None:
                # Another's file, that its group may write, stays theirs where the kernel lets us say so.
                with contextlib.suppress(PermissionError):
                    os.chown(name, info.st_uid, info.st_gid)
            os.chmod(name, 0o644 if info is None else stat.S_IMODE(info.st_mode))
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise HlaunchError(
            f"{path} cannot be written: {error.strerror}",
            hint="check the permissions of the file and its folder",
            exit_code=ExitCode.ENGINE_FAILED,
        ) from error


def _check_writable(path: Path, target: Path, mode: int) -> None:
    """Refuse what a rename would replace all the same: permission to that comes from the folder, not from the file."""
    if not mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
        # Somebody's wish, which root's rights do not overrule.
        raise HlaunchError(
            f"{path} is write-protected (mode {mode:04o})", hint=f"run: chmod u+w {shlex.quote(str(path))}"
        )
    if not os.access(target, os.W_OK):
        raise HlaunchError(
            f"{path} is not yours to write (mode {mode:04o})", hint="copy it, and name the copy with --file"
        )


def write_starter(path: Path) -> tuple[Path, Path]:
    """Write the registry that comes with hlaunch to `path`, and the schema that its first line names beside it.

    Returns both. Raises: UsageError when a file is there already, or another's schema is; HlaunchError when one cannot
    be written.
    """
    from launcher.registry.schema import SCHEMA_FILE, json_schema_text

    schema = path.with_name(SCHEMA_FILE)
    if os.path.lexists(path):
        raise UsageError(f"{path} is there already", hint="add to it: hlaunch registry add NAME --model ...")
    text = packaged_registry().read_text(encoding="utf-8")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(schema) and not _is_our_schema(schema):
            raise UsageError(f"{schema} is there already and is not hlaunch's", hint="move it, or name another folder")
        # First: a registry that stands can be begun only once.
        schema.write_text(json_schema_text(), encoding="utf-8")
        # Exclusive: a registry that somebody else writes at this moment is theirs.
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except FileExistsError as error:
        raise UsageError(f"{path} is there already", hint="run the command again") from error
    except OSError as error:
        raise HlaunchError(
            f"{error.filename} cannot be written: {error.strerror}",
            hint="check the permissions of the folder",
            exit_code=ExitCode.ENGINE_FAILED,
        ) from error
    return path, schema


def _is_our_schema(path: Path) -> bool:
    from launcher.registry.schema import SCHEMA_TITLE

    with path.open(encoding="utf-8", errors="replace") as file:
        return f'"title": "{SCHEMA_TITLE}"' in file.read(1024)
