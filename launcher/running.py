"""Which server a command means: the one model that runs, the one named, or an address.

Knows: the records of `up`, on this host and on clusters, and by which reference a server's API key is reached. Refuses
to know: how anything is started (`launcher.session`), what is asked of the server.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.commands import Invocation
from launcher.errors import EngineFailed, HlaunchError, UsageError
from launcher.registry.values import BadValue, SecretRef
from launcher.supervise.cluster_run import read_run, recorded_runs
from launcher.supervise.instance import InstanceFolder, state_root
from launcher.supervise.stopping import instance_folders, running_instances

KEY_VARIABLE = "HLAUNCH_API_KEY"
"""The variable whose key goes before the registry's, and that stands in where no reference is known."""


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server to look at. `name` is empty for a bare address; `key` says where its API key is, not what it is."""

    name: str
    url: str
    key: SecretRef
    is_alive: Callable[[], bool]

    def reveal_key(self, invocation: Invocation) -> str | None:
        """Read the key, to be sent and never printed; None when there is none to be had."""
        try:
            return self.key.reveal(invocation.environ)
        except BadValue:
            return None


def running_server(invocation: Invocation, name: str | None, url: str | None = None) -> RunningServer:
    """Find the server that `name` (a model or alias), `url`, or the fact that only one runs, stands for.

    Raises: EngineFailed when it does not run or is not ready, UsageError when several run and none is named,
    UnknownModel.
    """
    if url is not None:
        # Given as clients are given it; its routes begin above.
        return RunningServer(
            name or "", url.rstrip("/").removesuffix("/v1").rstrip("/"), _key(invocation, name), lambda: True
        )
    root = state_root(invocation.environ)
    if name is None:
        local = [state.name for _, state in running_instances(list(instance_folders(root)))]
        names = sorted({*local, *(run.name for _, run in recorded_runs(root))})
        if not names:
            raise EngineFailed("nothing runs", hint="start a model: hlaunch up NAME, or give an address: --url URL")
        if len(names) > 1:
            raise UsageError(f"{len(names)} models run: {', '.join(names)}", hint="say which one: NAME")
        name = names[0]
    found = _recorded(invocation, root, name)
    if found is None:
        # An alias, or a name to be refused with the names that exist.
        canonical = invocation.resolve(name).name
        found = _recorded(invocation, root, canonical)
        if found is None:
            raise EngineFailed(f"{canonical} is not running", hint=f"start it: hlaunch up {canonical} -d")
    return found


def _recorded(invocation: Invocation, root: Path, name: str) -> RunningServer | None:
    folder = InstanceFolder(root, name)
    if (run := read_run(folder)) is not None:
        if not run.url:
            raise EngineFailed(f"{name} is not ready yet", hint=f"see: hlaunch status {name}")
        return RunningServer(name, run.url, _key(invocation, name), lambda: read_run(folder) is not None)
    state = folder.read()
    if state is None or not state.is_alive:
        return None
    if state.state not in ("ready", "draining"):
        raise EngineFailed(f"{name} is {state.state}", hint="try again in a moment, or see: hlaunch ps")

    def is_alive() -> bool:
        now = folder.read()
        return now is not None and now.is_alive

    return RunningServer(name, state.url, _key(invocation, name), is_alive)


def _key(invocation: Invocation, name: str | None) -> SecretRef:
    """Say where the key of a model is. A key that the registry itself holds has no reference but our variable."""
    ours = SecretRef.parse(f"${{{KEY_VARIABLE}}}")
    if name is None or invocation.environ.get(KEY_VARIABLE):
        return ours
    reference = None
    # A server may run from a registry that is not at hand; its name is then all we know.
    with contextlib.suppress(HlaunchError):
        from launcher.registry import resolve

        entry = resolve(invocation.load_registry(), name, invocation.environ, (), profiles=invocation.profiles)
        reference = entry.secret("api-key")
    return reference or ours
