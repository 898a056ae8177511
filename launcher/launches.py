"""What runs under which name: one look-up for every command that means a launch.

Knows: the records of `up`, on this host and on clusters, and that a name may be an alias. Refuses to know: how launches
are started, asked and ended.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.commands import Invocation
from launcher.errors import EngineFailed, HlaunchError, UnknownModel
from launcher.registry import ResolvedEntry, resolve
from launcher.registry.suggest import did_you_mean
from launcher.supervise.cluster_run import ClusterRun, read_run
from launcher.supervise.instance import InstanceFolder, InstanceState, instance_folders, state_root

_MAX_FILE_NAME_BYTES = 255
"""Linux's own limit, on every file system that counts."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What is recorded in one folder. `run`: it is on a cluster; `state`: its launcher on this host, alive or not."""

    folder: InstanceFolder
    run: ClusterRun | None = None
    state: InstanceState | None = None

    @classmethod
    def of(cls, folder: InstanceFolder) -> Launch:
        if not _can_exist(folder):
            return cls(folder)
        run = read_run(folder)
        return cls(folder, run, None if run is not None else folder.read())

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def is_recorded(self) -> bool:
        return self.run is not None or self.state is not None

    @property
    def is_running(self) -> bool:
        """Whether it is on a cluster, whose nodes say more, or its launcher here lives."""
        return self.run is not None or (self.state is not None and self.state.is_alive)


def recorded_launches(root: Path) -> Iterator[Launch]:
    """List what is recorded, in name order; what a dead launcher left is among it."""
    for folder in instance_folders(root):
        if (launch := Launch.of(folder)).is_recorded:
            yield launch


def running_names(root: Path) -> list[str]:
    """Name what runs."""
    return [launch.name for launch in recorded_launches(root) if launch.is_running]


def find_launch(invocation: Invocation, name: str) -> Launch:
    """Find what a name or alias stands for; it may have ended, or never have been started.

    Raises: UnknownModel, with what runs, when neither a record nor the registry has the name.
    """
    root = state_root(invocation.environ)
    own = Launch.of(InstanceFolder(root, name))
    if own.is_recorded:
        return own
    from launcher.registry.resolving import find_model, quoted

    try:
        return Launch.of(InstanceFolder(root, find_model(invocation.load_registry(), name).name))
    except HlaunchError as error:
        # A registry that is gone or broken is no reason not to find what was once started.
        if _can_exist(own.folder) and own.folder.path.is_dir():
            return own
        names = running_names(root)
        hint = did_you_mean(name, names) or "hlaunch ps shows what runs"
        unknown = UnknownModel(f"nothing runs under the name {quoted(name)}", available=names, hint=hint)
        if not isinstance(error, UnknownModel):
            # An alias would have been found in it.
            causes = [issue.headline() for issue in error.issues if issue.severity == "error"] or [error.message]
            unknown.details += (f"the registry cannot be read: {causes[0]}",)
        raise unknown from error


def _can_exist(folder: InstanceFolder) -> bool:
    """Whether a file system has room for the name, which may be anything that was typed."""
    try:
        return folder.name != "" and len(os.fsencode(folder.path.name)) <= _MAX_FILE_NAME_BYTES
    except UnicodeEncodeError:
        return False


def entry_at_hand(invocation: Invocation, name: str) -> ResolvedEntry | None:
    """Resolve the entry of a launch, silently; None where a registry that has it is not at hand."""
    with contextlib.suppress(HlaunchError):
        return resolve(invocation.load_registry(), name, invocation.environ, (), profiles=invocation.profiles)
    return None


def _start_line(invocation: Invocation, name: str) -> str:
    """Write the command that starts a model; on a cluster it goes on by itself."""
    entry = entry_at_hand(invocation, name)
    is_on_cluster = entry is not None and entry.cluster_name is not None
    return f"hlaunch up {name}" if is_on_cluster else f"hlaunch up {name} -d"


def running_launch(invocation: Invocation, name: str) -> Launch:
    """Find what runs under a name or alias. Raises: UnknownModel; EngineFailed for a model that does not run."""
    launch = find_launch(invocation, name)
    if not launch.is_running:
        names = running_names(state_root(invocation.environ))
        raise EngineFailed(
            f"{launch.name} is not running",
            details=(f"what runs: {', '.join(names)}",) if names else (),
            hint=f"start it: {_start_line(invocation, launch.name)}",
        )
    return launch
