"""The secret that the nodes of one engine share: where it is read, and what is wrong with one.

Knows: a file or a variable. Refuses to know: command lines, on which everyone on the host could read it.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

SECRET_VARIABLE = "HLAUNCH_NODE_SECRET"
SECRET_FILE_VARIABLE = "HLAUNCH_NODE_SECRET_FILE"
LEAST_BYTES = 16
MOST_BYTES = 4096


class SecretError(Exception):
    """There is no secret that could be used. `hint` is the fix."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def read_secret(environ: Mapping[str, str]) -> bytes:
    """Read the secret: the file's bytes or the variable's, without white space around them. Raises: SecretError."""
    path = environ.get(SECRET_FILE_VARIABLE, "")
    text = environ.get(SECRET_VARIABLE, "")
    if path and text:
        raise SecretError(f"{SECRET_VARIABLE} and {SECRET_FILE_VARIABLE} are both set", "unset one of them")
    if not path and not text:
        raise SecretError(
            "nodes need a secret that they share, and none is set",
            "on one node: (umask 077; openssl rand -hex 32 > node.secret); copy the file to every node; "
            f"on each: export {SECRET_FILE_VARIABLE}=node.secret",
        )
    secret = _read_file(Path(path)) if path else text.strip().encode()
    if not LEAST_BYTES <= len(secret) <= MOST_BYTES:
        raise SecretError(
            f"the nodes' secret has {len(secret)} bytes, not {LEAST_BYTES} to {MOST_BYTES}",
            "make one: openssl rand -hex 32",
        )
    return secret


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(path.stat().st_mode)
            secret = file.read(MOST_BYTES + 3).strip()
    except OSError as error:
        raise SecretError(f"{SECRET_FILE_VARIABLE}: {path}: {error.strerror}", "every node needs the file") from error
    if mode & 0o077:
        raise SecretError(f"{path} can be read by others (mode {mode:04o})", f"run: chmod 600 {path}")
    return secret
