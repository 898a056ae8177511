"""Commands on a node: on this host, or over plain `ssh`.

Knows: argv, quoting, deadlines. Refuses to know: what they do.
`HLAUNCH_SSH` names another program with ssh's calling convention (`PROGRAM [options] -- DESTINATION COMMAND`).
"""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.errors import HlaunchError
from launcher.exit_codes import ExitCode

_SSH_FAILED = 255
"""ssh's own exit status; every other one is that of the command."""
_STAGE = 'umask 077; cd && mkdir -p -- "$1" && cd -- "$1" && [ -O . ] && chmod 700 . && tar xf - && pwd -P'
_FOLDER = 'umask 077; cd && mkdir -p -- "$1" && cd -- "$1" && pwd -P'
_REMOVE = 'cd && rm -rf -- "$1"'


class RemoteFailed(HlaunchError):
    """A command on a node failed."""

    exit_code = ExitCode.REMOTE_FAILED


class Unreachable(RemoteFailed):
    """ssh itself failed: nothing was run there."""


@dataclass(frozen=True, slots=True)
class Shell:
    """One node's commands. `ssh` None: this host."""

    node: str
    ssh: str | None
    environ: Mapping[str, str]

    @property
    def python(self) -> str:
        """The interpreter that has hlaunch there: HLAUNCH_REMOTE_PYTHON, else the same path as here."""
        own = self.environ.get("HLAUNCH_REMOTE_PYTHON") if self.ssh is not None else None
        return own or sys.executable

    def argv(self, argv: Sequence[str]) -> list[str]:
        """What to execute here so that `argv` runs there. ssh hands one text to a shell: each word is quoted."""
        if self.ssh is None:
            return list(argv)
        program = self.environ.get("HLAUNCH_SSH", "ssh")
        options = ["-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=8"]
        return [program, *options, "--", self.ssh, shlex.join(argv)]

    def popen(self, argv: Sequence[str]) -> subprocess.Popen[str]:
        """Start a command whose output is read line by line."""
        return subprocess.Popen(
            self.argv(argv),
            env=dict(self.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
        )

    def run(
        self, argv: Sequence[str], *, data: bytes = b"", seconds: float = 60.0, what: str = "", is_checked: bool = True
    ) -> str:
        """Run a command to its end and return its output. Raises: RemoteFailed with the command's own last line."""
        try:
            done = subprocess.run(
                self.argv(argv), env=dict(self.environ), input=data, capture_output=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise RemoteFailed(f"{self.node}: {what or argv[0]} took more than {seconds:g} s") from error
        except OSError as error:
            raise RemoteFailed(f"{self.node}: {argv[0]}: {error.strerror}") from error
        if done.returncode != 0 and is_checked:
            said = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
            if self.ssh is not None and done.returncode == _SSH_FAILED:
                raise self._unreachable(said)
            raise RemoteFailed(
                f"{self.node}: {what or argv[0]} failed: {said[-1] if said else f'exit status {done.returncode}'}",
                details=said[-6:-1],
            )
        return done.stdout.decode(errors="replace")

    def _unreachable(self, said: Sequence[str]) -> Unreachable:
        program = self.environ.get("HLAUNCH_SSH", "ssh")
        words = said[-1].removeprefix("ssh: ") if said else f"exit status {_SSH_FAILED}"
        return Unreachable(
            f"{self.node}: cannot reach {self.ssh} over ssh: {words}",
            details=said[-6:-1],
            hint=f"this has to work without a question: {program} -o BatchMode=yes {shlex.quote(self.ssh or '')} true",
        )

    def folder(self, relative: str) -> str:
        """Make a private folder below the home there and return its absolute path."""
        return self.run(["sh", "-c", _FOLDER, "sh", relative], what="making a folder").strip()

    def stage(self, relative: str, files: Mapping[str, bytes]) -> str:
        """Put files of mode 0600 into a private folder below the home there; return its absolute path."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name, content in sorted(files.items()):
                info = tarfile.TarInfo(name)
                info.size, info.mode, info.uid, info.gid = len(content), 0o600, os.getuid(), os.getgid()
                archive.addfile(info, io.BytesIO(content))
        return self.run(["sh", "-c", _STAGE, "sh", relative], data=packed.getvalue(), what="copying files").strip()

    def remove(self, relative: str) -> None:
        """Remove a folder below the home there; one that is gone is fine."""
        self.run(["sh", "-c", _REMOVE, "sh", relative], what="removing files")
