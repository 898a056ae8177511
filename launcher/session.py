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
from launcher.errors import EngineFailed, UsageError
from launcher.supervise.instance import InstanceFolder, state_root
from launcher.supervise.stopping import stop_instance


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go. `api_key` is a secret: it is sent, never printed."""

    url: str
    api_key: str | None


@contextlib.contextmanager
def server_for(invocation: Invocation, name: str, *, url: str | None, overrides: Sequence[str]) -> Iterator[Server]:
    """Yield a ready server for the model `name`; one that had to be started is stopped on leaving.

    Raises: UnknownModel, and everything that `hlaunch up` fails with.
    """
    entry = invocation.resolve(name, overrides)
    secret = entry.secret("api-key")
    api_key = invocation.environ.get("HLAUNCH_API_KEY") or (secret.reveal(invocation.environ) if secret else None)
    if url is not None:
        yield Server(url.rstrip("/"), api_key)
        return
    folder = InstanceFolder(state_root(invocation.environ), entry.name)
    state = folder.read()
    if state is not None and state.is_alive:
        if overrides:
            raise UsageError(
                f"{entry.name} is running already; --set cannot change it", hint=f"stop it: hlaunch down {entry.name}"
            )
        if state.state != "ready":
            raise EngineFailed(f"{entry.name} is {state.state}", hint="try again in a moment, or see: hlaunch ps")
        yield Server(state.url, api_key)
        return
    invocation.console.note(f"{entry.name} is not running; starting it for this command")
    _start(invocation, entry.name, overrides)
    try:
        started = folder.read()
        if started is None or not started.is_alive:
            raise EngineFailed(f"{entry.name} ended right after its start", hint=f"see: hlaunch logs {entry.name}")
        yield Server(started.url, api_key)
    finally:
        stop_instance(folder)


def _start(invocation: Invocation, name: str, overrides: Sequence[str]) -> None:
    """Run `hlaunch up NAME --detach` as any user would; its own last line is the cause when it fails."""
    argv = [sys.executable, "-m", "launcher.cli"]
    if invocation.registry_file is not None:
        argv += ["--file", str(invocation.registry_file)]
    argv += ["up", "--detach", *(part for item in overrides for part in ("--set", item)), "--", name]
    process = subprocess.Popen(argv, env=dict(invocation.environ), stdout=subprocess.DEVNULL)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # It got the same Ctrl-C and ends what it began; killed half-way it would leave an engine behind.
        process.wait()
        raise
    if code != 0:
        raise EngineFailed(f"{name} could not be started", exit_code=code)
