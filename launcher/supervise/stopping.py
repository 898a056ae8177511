"""Ending instances from outside: ask the launcher, wait for the drain, kill what stays, verify that nothing is left.

Knows: identities and deadlines. Refuses to know: names in registries, output. Idempotent: what is gone is fine.
"""

from __future__ import annotations

import enum
import signal
import time

from launcher.errors import HlaunchError
from launcher.supervise import procfs
from launcher.supervise.instance import InstanceFolder, InstanceState
from launcher.supervise.supervisor import STOP_GRACE_SECONDS

_POLL_SECONDS = 0.05
_LAUNCHER_SECONDS = 3.0
"""What the launcher gets beyond its engine's own deadlines."""


class Ending(enum.Enum):
    """How an instance was found and ended."""

    STOPPED = "stopped"
    KILLED = "killed"
    STALE = "was gone already"
    NOT_RUNNING = "not running"


def stop_instance(folder: InstanceFolder) -> Ending:
    """Stop one instance and wait until all its processes are gone. Blocks up to drain + 10 s.

    Raises: HlaunchError when a process cannot be ended.
    """
    state = folder.read()
    if state is None:
        return Ending.NOT_RUNNING
    if not state.launcher.send(signal.SIGTERM):
        clean_stale(folder, state)
        return Ending.STALE
    deadline = time.monotonic() + state.drain_timeout_seconds + STOP_GRACE_SECONDS + _LAUNCHER_SECONDS
    if _gone_by(state, deadline):
        folder.clear()
        return Ending.STOPPED
    state.launcher.send(signal.SIGKILL)
    clean_stale(folder, state)
    if state.launcher.is_alive:
        raise HlaunchError(
            f"{state.name}: pid {state.launcher.pid} cannot be ended", hint="is it stopped by a debugger?"
        )
    return Ending.KILLED


def clean_stale(folder: InstanceFolder, state: InstanceState) -> None:
    """Remove what a dead launcher left: processes of its engine's session, and its record."""
    if state.engine is not None:
        deadline = time.monotonic() + STOP_GRACE_SECONDS
        while procfs.kill_session(state.engine) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        if procfs.session_members(state.engine):
            raise HlaunchError(f"{state.name}: processes of pid {state.engine.pid} cannot be ended")
    # Somebody may have started it anew meanwhile: only the record that was read is ours to remove.
    current = folder.read()
    if current is not None and current.launcher == state.launcher:
        folder.clear()


def _gone_by(state: InstanceState, deadline: float) -> bool:
    """Wait until launcher and engine session are gone."""
    while time.monotonic() < deadline:
        if not state.launcher.is_alive and (state.engine is None or not procfs.session_members(state.engine)):
            return True
        time.sleep(_POLL_SECONDS)
    return False
