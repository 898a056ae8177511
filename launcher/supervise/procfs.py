"""Processes as Linux shows them: identity that survives pid reuse, sessions, memory, listening sockets.

Knows: `/proc`. Refuses to know: what the processes are for. Whatever cannot be read counts as absent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PROC = Path("/proc")
_STATE, _SESSION, _START = 0, 3, 19
"""Positions in `/proc/PID/stat` after the command's closing parenthesis."""


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process for as long as it lives: its number, and when it began in clock ticks since boot.

    A number alone is reused; number, start and boot together are not.
    """

    pid: int
    start_ticks: int
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """Identify a running process; None when there is none."""
        fields = _stat(pid)
        return None if fields is None else cls(pid, int(fields[_START]), boot_id())

    def to_data(self) -> dict[str, int | str]:
        """The same as plain values."""
        return {"pid": self.pid, "start_ticks": self.start_ticks, "boot_id": self.boot_id}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> ProcessIdentity:
        """Read what `to_data` made. Raises: KeyError, TypeError, ValueError for anything else."""
        return cls(int(data["pid"]), int(data["start_ticks"]), str(data["boot_id"]))

    @property
    def is_alive(self) -> bool:
        """Whether exactly this process still runs; a zombie does not."""
        fields = _stat(self.pid)
        if fields is None or fields[_STATE] in ("Z", "X"):
            return False
        return int(fields[_START]) == self.start_ticks and boot_id() == self.boot_id

    def send(self, sig: signal.Signals) -> bool:
        """Signal exactly this process, never a later owner of its number. Returns whether it was there."""
        try:
            handle = os.pidfd_open(self.pid)
        except OSError:
            return False
        try:
            # The handle pins the process; only then is the identity check proof against reuse.
            if not self.is_alive:
                return False
            signal.pidfd_send_signal(handle, sig)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True


def boot_id() -> str:
    """Return the kernel's name of this boot."""
    with contextlib.suppress(OSError):
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    return ""


def _stat(pid: int) -> list[str] | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    # The command may hold spaces and parentheses; fields are counted from the last one.
    return text.rpartition(")")[2].split()


def _pids() -> Iterator[int]:
    for entry in os.listdir(_PROC):
        if entry.isdigit():
            yield int(entry)


def session_members(leader: ProcessIdentity) -> list[int]:
    """List the living processes of the session that `leader` began, itself included.

    The kernel does not reuse a number while a session carries it, so members of a dead leader are still its own.
    """
    fields = _stat(leader.pid)
    if boot_id() != leader.boot_id or (fields is not None and int(fields[_START]) != leader.start_ticks):
        return []
    members = []
    for pid in _pids():
        found = _stat(pid)
        if found is not None and int(found[_SESSION]) == leader.pid and found[_STATE] not in ("Z", "X"):
            members.append(pid)
    return members


def kill_session(leader: ProcessIdentity, sig: signal.Signals = signal.SIGKILL) -> int:
    """Signal every process of a session. Returns how many there were."""
    members = session_members(leader)
    for pid in members:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, sig)
    return len(members)


def memory_bytes(pids: Iterable[int]) -> int:
    """Sum the proportional set size of processes: shared pages count once."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def own_age_seconds() -> float:
    """Seconds since this process began, interpreter start and imports included; resolution 10 ms."""
    own = ProcessIdentity.of(os.getpid())
    return 0.0 if own is None else age_seconds(own)


def age_seconds(process: ProcessIdentity) -> float:
    """Seconds since a process of this boot began; no clock change disturbs it."""
    began = process.start_ticks / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)


def oom_kills() -> int:
    """Count the kernel's out-of-memory kills since boot."""
    with contextlib.suppress(OSError, ValueError):
        for line in (_PROC / "vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def cgroup_oom_kills(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Count the out-of-memory kills inside our own control group, as a container sees it (cgroup v2, else v1)."""
    for name in ("memory.events", "memory/memory.oom_control"):
        with contextlib.suppress(OSError, ValueError):
            for line in (root / name).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def command_line(pid: int, limit: int = 4096) -> str:
    """Return a process's command line on one line, at most `limit` characters; empty when it cannot be read."""
    try:
        raw = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return ""
    text = " ".join(part.decode(errors="replace") for part in raw.split(b"\0") if part)
    return "".join(ch if ch.isprintable() else "?" for ch in text)[:limit]


def listener_of(port: int) -> int | None:
    """Return the pid that listens on a TCP port, or None when nobody does or it belongs to another user."""
    inodes = set()
    for table in ("net/tcp", "net/tcp6"):
        with contextlib.suppress(OSError):
            for line in (_PROC / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    if not inodes:
        return None
    for pid in _pids():
        with contextlib.suppress(OSError), os.scandir(_PROC / str(pid) / "fd") as descriptors:
            for descriptor in descriptors:
                with contextlib.suppress(OSError):
                    if os.readlink(descriptor.path) in inodes:
                        return pid
    return None
