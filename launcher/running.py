"""Which server a command means: the one model that runs, the one named, or an address.

Knows: by which reference a server's API key is reached. Refuses to know: where launches are recorded
(`launcher.launches`), how anything is started (`launcher.session`), what is asked of the server.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launcher.commands import Invocation
from launcher.errors import EngineFailed, PreflightError, UsageError
from launcher.launches import Launch, entry_at_hand, running_launch, running_names
from launcher.registry.values import BadValue, SecretRef
from launcher.supervise.cluster_run import read_run
from launcher.supervise.instance import state_root

KEY_VARIABLE = "HLAUNCH_API_KEY"
"""The variable whose key goes before the registry's, and that stands in where no reference is known."""
_OURS = SecretRef("env", KEY_VARIABLE)


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

    def require_key(self, invocation: Invocation) -> str | None:
        """Read the key, if the registry says that there is one. Raises: PreflightError when it cannot be read."""
        try:
            return self.key.reveal(invocation.environ)
        except BadValue as error:
            if self.key == _OURS:
                return None
            raise PreflightError(f"api-key: {error.message}", hint=error.hint) from error


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
    if name is None:
        names = running_names(state_root(invocation.environ))
        if not names:
            raise EngineFailed("nothing runs", hint="start a model: hlaunch up NAME, or give an address: --url URL")
        if len(names) > 1:
            raise UsageError(f"{len(names)} models run: {', '.join(names)}", hint="say which one: NAME")
        name = names[0]
    return server_of(invocation, running_launch(invocation, name))


def server_of(invocation: Invocation, launch: Launch) -> RunningServer:
    """Say where a launch that runs is served. Raises: EngineFailed when it is not ready, or only joins its head."""
    name, folder, state = launch.name, launch.folder, launch.state
    if state is None:
        url = "" if launch.run is None else launch.run.url
        if not url:
            raise EngineFailed(f"{name} is not ready yet", hint=f"see: hlaunch status {name}")
        return RunningServer(name, url, _key(invocation, name), lambda: read_run(folder) is not None)
    if state.head_addr:
        raise EngineFailed(
            f"{name} here is a node of the head at {state.head_addr}, which serves it",
            hint="run this on the head, or give the address of its API: --url http://HOST:PORT",
        )
    if state.state not in ("ready", "draining"):
        raise EngineFailed(f"{name} is {state.state}", hint="try again in a moment, or see: hlaunch ps")

    def is_alive() -> bool:
        now = folder.read()
        return now is not None and now.is_alive

    return RunningServer(name, state.url, _key(invocation, name), is_alive)


def _key(invocation: Invocation, name: str | None) -> SecretRef:
    """Say where the key of a model is. A key that the registry itself holds has no reference but our variable."""
    if name is None or invocation.environ.get(KEY_VARIABLE):
        return _OURS
    # A server may run from a registry that is not at hand; its name is then all we know.
    entry = entry_at_hand(invocation, name)
    return (None if entry is None else entry.secret("api-key")) or _OURS
