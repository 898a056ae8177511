"""What a node may leave on its host beyond its folder: processes that nothing of ours keeps, names in /dev/shm.

Knows: by what a process or a name is surely the node's. Refuses to know: when a node ends, and who is told.

Ray's agents rename themselves, which overwrites the environment by which everything of a node is found; but they write
into the node's folder, which nobody else does. Compiled graphs keep semaphores and channels in /dev/shm, whose names
say nothing; so they are recorded while their processes hold them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from launcher.errors import PreflightError
from launcher.supervise import procfs
from launcher.supervise.instance import write_private

MARK = "_HLAUNCH_NODE_FOLDER"
"""In the environment of every process of a node: the folder in which it was started."""
SHARED_FILE = "shared_memory.json"
_SHARED = Path("/dev/shm")
_END_SECONDS = 5.0
_MAPPED = re.compile(r" (/dev/shm/[^\n]+?)(?: \(deleted\))?$", re.MULTILINE)
_FLAGS = re.compile(r"^flags:\s+([0-7]+)$", re.MULTILINE)
# What programs such as ours make there, and only they.
_LIKELY = ("sem.", "psm_", "torch_", "plasma")


def processes_of(folder: Path) -> list[int]:
    """List the processes of the node started in `folder`: those that carry its mark, and those that write into it."""
    mark = os.fsencode(f"{MARK}={folder}")
    return [pid for pid in _pids() if _has_mark(pid, mark) or _writes_into(pid, f"{folder}/")]


def end_processes(folder: Path) -> tuple[int, list[str]]:
    """Kill what is left of a node. Returns how many there were, and those that are still there after five seconds."""
    killed: set[int] = set()
    deadline = time.monotonic() + _END_SECONDS
    while (found := processes_of(folder)) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        killed.update(found)
        time.sleep(0.02)
    return len(killed), [f"process {pid}: {procfs.command_line(pid, 200)}" for pid in found]


def record_shared_memory(folder: Path) -> None:
    """Note the names in /dev/shm that the node's processes hold now, with what was noted before."""
    held = {name for pid in processes_of(folder) for name in _mapped(pid)}
    recorded = _recorded(folder)
    known = {name: number for name, number in recorded.items() if _inode(name) == number}
    found = known | {name: number for name in held if (number := _inode(name)) is not None}
    if found != recorded:
        with contextlib.suppress(PreflightError):
            write_private(folder / SHARED_FILE, json.dumps(found, sort_keys=True))


def remove_shared_memory(folder: Path, since: float | None) -> tuple[list[str], list[str]]:
    """Remove what was recorded and nobody holds. `since`: when the node was started, in seconds since the epoch.

    Returns what could not be removed, and what was made since then, is ours and held by nobody, but was not recorded.
    """
    recorded = _recorded(folder)
    held = {name for pid in _pids() for name in _mapped(pid)}
    left = []
    for name, number in sorted(recorded.items()):
        if name in held or _inode(name) != number:
            continue
        try:
            Path(name).unlink()
        except OSError as error:
            left.append(f"{name}: {error.strerror}")
    return left, [] if since is None else [name for name in _unclaimed(since) if name not in held]


def _unclaimed(since: float) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(_SHARED), key=lambda item: item.name):
            with contextlib.suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                is_ours = found.st_uid == os.getuid() and found.st_ctime >= since
                if entry.name.startswith(_LIKELY) and is_ours:
                    yield entry.path


def _recorded(folder: Path) -> dict[str, int]:
    try:
        loaded = json.loads((folder / SHARED_FILE).read_text(encoding="utf-8"))
        return {str(name): int(number) for name, number in loaded.items() if Path(name).parent == _SHARED}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _inode(name: str) -> int | None:
    with contextlib.suppress(OSError):
        return Path(name).lstat().st_ino
    return None


def _pids() -> Iterable[int]:
    own = (os.getpid(), os.getppid())
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) not in own]


def _has_mark(pid: int, mark: bytes) -> bool:
    with contextlib.suppress(OSError):
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False


def _writes_into(pid: int, prefix: str) -> bool:
    """Whether a process holds a file below a folder open for writing; a reader may be anybody's."""
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as descriptors:
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                if os.readlink(descriptor.path).startswith(prefix) and _is_for_writing(pid, descriptor.name):
                    return True
    return False


def _is_for_writing(pid: int, descriptor: str) -> bool:
    found = _FLAGS.search(Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text())
    return found is not None and int(found[1], 8) & os.O_ACCMODE != os.O_RDONLY


def _mapped(pid: int) -> set[str]:
    """Names in /dev/shm that a process has in its memory; one that was taken away already is not there to be found."""
    with contextlib.suppress(OSError):
        return set(_MAPPED.findall(Path(f"/proc/{pid}/maps").read_text(errors="replace")))
    return set()
