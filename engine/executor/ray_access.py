"""Whether a Ray cluster may be used at all: with a token here, and not by anyone who has none.

Knows: Ray's authentication settings, what its refusals look like. Refuses to know: Ray as a library; the question
whether a cluster lets in strangers is put by a child process, since a process has one authentication mode for life.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.executor.base import ExecutorError
from engine.executor.ray_layout import RayNode

TOKEN_MODE = "token"  # noqa: S105 - the name of a mode
_VIEW_SECONDS = 20.0


class RayRefused(ExecutorError):
    """Ray cannot be used, and starting again does not change it. `hint` is the fix."""

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = message
        self.hint = hint
        super().__init__(message)


def check_token(environ: Mapping[str, str]) -> None:
    """Hold this process's settings against the rule: a token, in a file that only its owner reads.

    Raises: RayRefused, one clear reason.
    """
    if environ.get("RAY_AUTH_TOKEN"):
        raise RayRefused(
            "RAY_AUTH_TOKEN puts Ray's token into the environment, where every process of this user can read it",
            "write it to a file of mode 0600 and name that in RAY_AUTH_TOKEN_PATH",
        )
    if environ.get("RAY_AUTH_MODE", "").lower() != TOKEN_MODE:
        raise RayRefused(
            "Ray is not used without token authentication, and RAY_AUTH_MODE is not 'token' here",
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE for `ray start` on every node and for the engine",
        )
    path = environ.get("RAY_AUTH_TOKEN_PATH", "")
    if not path:
        raise RayRefused("RAY_AUTH_TOKEN_PATH names no file with Ray's token", "all nodes share one token of 32 bytes")
    try:
        mode = os.stat(path).st_mode
        is_empty = not Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise RayRefused(
            f"Ray's token {path} cannot be read: {reason}", "mode 0600, owned by the engine's user"
        ) from None
    if is_empty:
        raise RayRefused(f"Ray's token {path} is empty", "all nodes share one token of 32 bytes")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise RayRefused(
            f"Ray's token {path} can be read by others (mode {stat.S_IMODE(mode):04o})", f"chmod 600 {path}"
        )


class _View:
    """One look at the cluster by a child, which may import Ray with settings of its own."""

    def __init__(self, address: str, environ: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "engine.executor.ray_view", "--address", address, "--parent", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(environ),
        )

    def answer(self) -> Mapping[str, Any]:
        """Wait for what it saw; see `ray_view`."""
        try:
            said, _ = self._process.communicate(timeout=_VIEW_SECONDS)
            found: Mapping[str, Any] = json.loads(said)
        except (subprocess.TimeoutExpired, ValueError):
            return {"error": "unreachable", "message": f"no answer within {_VIEW_SECONDS:g} s"}
        return found

    def close(self) -> None:
        """End the child, whether it has answered or not. Idempotent."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


class Doors:
    """Looks at a cluster with this process's token and without any, beside whatever else is going on; then `check`."""

    def __init__(self, address: str, environ: Mapping[str, str]) -> None:
        # An empty home: Ray would find a token that was left in ~/.ray by itself.
        stranger = {name: value for name, value in environ.items() if not name.startswith("RAY_AUTH")}
        self._address = address
        self._ours = _View(address, environ)
        self._strangers = _View(address, stranger | {"RAY_AUTH_MODE": "disabled", "HOME": "/nonexistent"})

    def close(self) -> None:
        """End both looks. Idempotent."""
        self._ours.close()
        self._strangers.close()

    def check(self, own_address: str) -> list[RayNode]:
        """See that the cluster lets us in and no stranger, and that a node of it runs at `own_address`.

        Returns the nodes with what they have in all, as if it were free. Raises: RayRefused, ExecutorError.
        """
        try:
            ours = self._ours.answer()
            if ours.get("error") == "refused":
                hint = "all nodes share one token: copy the head's"
                raise RayRefused(f"Ray at {self._address} refused this node's token", hint)
            if "error" in ours:
                raise ExecutorError(f"Ray at {self._address} cannot be reached: {ours.get('message', '')}")
            stranger = self._strangers.answer()
            if "nodes" in stranger:
                raise RayRefused(
                    f"Ray at {self._address} lets in anyone: it was started without token authentication",
                    "stop it, then: RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=FILE ray start ... on every node",
                )
            if stranger.get("error") != "refused":
                # Only a refusal shows that there is a door.
                raise ExecutorError(
                    f"whether Ray at {self._address} lets in anyone cannot be told: {stranger.get('message', '')}"
                )
            nodes = [_ray_node(node) for node in ours["nodes"]]
            alive = sorted(node.address for node in nodes if node.is_alive)
            if own_address not in alive:
                raise ExecutorError(
                    f"no node of the Ray cluster at {self._address} runs at {own_address}, the engine's own address "
                    f"(there: {', '.join(alive) or 'none'})"
                )
            return nodes
        finally:
            self.close()


def _ray_node(seen: Mapping[str, Any]) -> RayNode:
    resources = {"CPU": float(seen.get("cpus", 0)), "GPU": float(seen.get("gpus", 0))}
    return RayNode(str(seen.get("id", "")), str(seen.get("ip", "")), bool(seen.get("is_alive")), resources, resources)
