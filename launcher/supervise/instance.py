"""One instance's folder: its state, its engine.json, its log, its lock.

Layout: `<state root>/instances/<name>/{state.json, engine.json, engine.log, lock}`; folders 0700, files 0600; no
secrets. Knows: how a record is written so that it is never half there, and how one that lies is recognised. Refuses to
know: what an instance does. The kernel holds a lock as long as its launcher lives, so a crash never leaves it behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import stat
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from launcher.errors import PreflightError
from launcher.supervise.procfs import ProcessIdentity

MAX_STATE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class InstanceState:
    """What `ps` and `down` know of a running instance. Times are seconds since the epoch, for people only."""

    name: str
    model: str
    state: str
    url: str
    launcher: ProcessIdentity
    engine: ProcessIdentity | None
    started_at: float
    drain_timeout_seconds: float
    is_detached: bool
    ready_seconds: float | None = None
    is_restarting: bool = False
    """Its engine is being started again; its launcher lives."""
    events: tuple[tuple[float, str], ...] = ()
    """What happened since it was ready, oldest first."""
    context_tokens: int | None = None
    """The longest context, by the engine's word when it was ready."""
    head_addr: str = ""
    """HOST:PORT of the head that it joins as a node: it has ranks and no server, and `url` is empty."""
    phase: str = ""
    """Of a node that joins: what it does now, by its own word."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    @property
    def is_alive(self) -> bool:
        """Whether its launcher still runs: the only process whose word this record is."""
        return self.launcher.is_alive


def parse_state(text: str) -> InstanceState | None:
    """Read what `to_json` wrote; None for anything else."""
    try:
        data = json.loads(text)
        data["launcher"] = ProcessIdentity.from_data(data["launcher"])
        data["engine"] = ProcessIdentity.from_data(data["engine"]) if data["engine"] is not None else None
        data["events"] = tuple((float(at), str(text)) for at, text in data.get("events", ()))
        state = InstanceState(**{item.name: data[item.name] for item in fields(InstanceState) if item.name in data})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return state if isinstance(state.name, str) and isinstance(state.launcher.pid, int) else None


def state_root(environ: Mapping[str, str]) -> Path:
    """Choose where instances are recorded: HLAUNCH_STATE_DIR, XDG_STATE_HOME/hlaunch or ~/.local/state/hlaunch."""
    if own := environ.get("HLAUNCH_STATE_DIR"):
        return Path(own).absolute()
    if state_home := environ.get("XDG_STATE_HOME"):
        return Path(state_home).absolute() / "hlaunch"
    home = environ.get("HOME")
    if not home:
        with contextlib.suppress(KeyError):
            home = pwd.getpwuid(os.getuid()).pw_dir
    return Path(home or f"/tmp/hlaunch-{os.getuid()}").absolute() / ".local" / "state" / "hlaunch"


@dataclass(frozen=True, slots=True)
class InstanceFolder:
    """The files of one instance. Making the value touches nothing."""

    root: Path
    name: str

    @property
    def path(self) -> Path:
        # Quoted, so that no registry name points outside; a leading dot too, or `..` would.
        quoted = urllib.parse.quote(self.name, safe="")
        return self.root / "instances" / ("%2E" + quoted[1:] if quoted.startswith(".") else quoted)

    @property
    def state_file(self) -> Path:
        return self.path / "state.json"

    @property
    def config_file(self) -> Path:
        return self.path / "engine.json"

    @property
    def cluster_file(self) -> Path:
        """The record of a launch on a cluster; where it is missing, nothing of this name runs on one."""
        return self.path / "cluster.json"

    @property
    def log_file(self) -> Path:
        return self.path / "engine.log"

    def create(self) -> None:
        """Make the folder, private to this user.

        Raises: PreflightError when it cannot be made or belongs to someone else.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            info = self.path.lstat()
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
                raise PreflightError(
                    f"{self.path} is not a folder of this user", hint="set HLAUNCH_STATE_DIR to another"
                )
            self.path.chmod(0o700)
            self.root.chmod(0o700)
        except OSError as error:
            raise PreflightError(
                f"the state folder {self.path} cannot be made: {error.strerror}",
                hint="set HLAUNCH_STATE_DIR to a folder that you may write",
            ) from error

    def try_lock(self) -> int | None:
        """Take the instance's lock. Returns the descriptor that holds it, or None when another launcher has it."""
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return fd

    def read(self) -> InstanceState | None:
        """Read the state; None when there is none or it is not one of ours."""
        try:
            if self.state_file.stat().st_size > MAX_STATE_BYTES:
                return None
            return parse_state(self.state_file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            return None

    def write(self, state: InstanceState) -> None:
        """Replace the state in one step."""
        write_private(self.state_file, state.to_json())

    def clear(self) -> None:
        """Forget a finished instance; its log stays for `logs`."""
        for path in (self.state_file, self.config_file):
            with contextlib.suppress(OSError):
                path.unlink()


def write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600 so that a reader sees the old or the new content, never a part.

    Raises: PreflightError when the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise PreflightError(f"{path} cannot be written: {error.strerror}", hint="free disk space?") from error


def instance_folders(root: Path) -> Iterator[InstanceFolder]:
    """List all instances that ever left a trace, in name order."""
    try:
        names = sorted(os.listdir(root / "instances"))
    except OSError:
        return
    for quoted in names:
        yield InstanceFolder(root, urllib.parse.unquote(quoted))
