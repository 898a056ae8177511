"""A server to talk to: an address that was given, an instance that is up, or one started for as long as it is needed.

Knows: how `chat` and `bench` find their server and what they must stop afterwards. Refuses to know: what is said to it.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launcher.commands import Invocation
from launcher.errors import EngineFailed, UnknownModel, UsageError
from launcher.launches import Launch, find_launch
from launcher.running import running_server, server_of
from launcher.supervise.instance import InstanceFolder, state_root
from launcher.supervise.stopping import stop_instance


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go. `api_key` is a secret: it is sent, never printed. `is_here`: it runs on this machine alone."""

    url: str
    api_key: str | None
    is_here: bool = False


@contextlib.contextmanager
def server_for(invocation: Invocation, name: str, *, url: str | None, overrides: Sequence[str]) -> Iterator[Server]:
    """Yield a ready server for the model `name`; one that had to be started is stopped on leaving.

    Raises: UnknownModel, and everything that `hlaunch up` fails with.
    """
    if url is not None:
        server = running_server(invocation, name, url)
        yield Server(server.url, server.require_key(invocation))
        return
    launch = _launch(invocation, name)
    if launch is not None and launch.is_running:
        if overrides:
            raise UsageError(
                f"{launch.name} is running already; --set cannot change it", hint=f"stop it: hlaunch down {launch.name}"
            )
        server = server_of(invocation, launch)
        yield Server(server.url, server.require_key(invocation), is_here=launch.run is None)
        return
    entry = invocation.resolve(name, overrides)
    if entry.cluster_name is not None:
        # Other machines are not taken and given back for the sake of one command.
        raise EngineFailed(
            f"{entry.name} is not running on cluster {entry.cluster_name}", hint=f"start it: hlaunch up {entry.name}"
        )
    invocation.console.note(f"{entry.name} is not running; starting it for this command")
    _start(invocation, entry.name, overrides)
    folder = InstanceFolder(state_root(invocation.environ), entry.name)
    try:
        started = Launch.of(folder)
        if not started.is_running:
            raise EngineFailed(f"{entry.name} ended right after its start", hint=f"see: hlaunch logs {entry.name}")
        server = server_of(invocation, started)
        yield Server(server.url, server.require_key(invocation), is_here=True)
    finally:
        stop_instance(folder)


def _launch(invocation: Invocation, name: str) -> Launch | None:
    """Find what may run; a name without a record is the registry's to know, since it can be started."""
    with contextlib.suppress(UnknownModel):
        return find_launch(invocation, name)
    return None


def _start(invocation: Invocation, name: str, overrides: Sequence[str]) -> None:
    """Run `hlaunch up NAME --detach` as any user would; its own last line is the cause when it fails."""
    argv = [sys.executable, "-m", "launcher.cli"]
    if invocation.registry_file is not None:
        argv += ["--file", str(invocation.registry_file)]
    argv += [part for profile in invocation.profiles for part in ("--profile", profile)]
    argv += ["up", "--detach", "--transient", *(part for item in overrides for part in ("--set", item)), "--", name]
    process = subprocess.Popen(argv, env=dict(invocation.environ), stdout=subprocess.DEVNULL)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # It got the same Ctrl-C and ends what it began; killed half-way it would leave an engine behind.
        process.wait()
        raise
    if code != 0:
        raise EngineFailed(f"{name} could not be started", exit_code=code)
