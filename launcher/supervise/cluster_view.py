"""Who has joined: lines of the Ray-view child -> which declared nodes are there, which are missing and why.

Knows: the child's lines, peers by address. Refuses to know: Ray, and what to do about a missing node.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.supervise.node_spec import NodeSpec, Peer
from launcher.supervise.status import LineSplitter, one_line

VIEW_SECONDS = 0.5
"""How often the child asks; one question costs the head about a millisecond."""


@dataclass(frozen=True, slots=True)
class Member:
    """A node as Ray sees it."""

    ip: str
    is_alive: bool
    gpus: int = 0
    cpus: int = 0
    reason: str = ""
    id: str = ""


@dataclass(frozen=True, slots=True)
class ClusterView:
    """One answer: members, or an error (`refused`, `unreachable`, `failed`) with its message."""

    members: tuple[Member, ...] = ()
    error: str = ""
    message: str = ""

    def is_alive(self, ip: str) -> bool:
        """Whether a node of this address is in the cluster; after a restart the old entry stays, dead."""
        return any(member.ip == ip and member.is_alive for member in self.members)

    def ids(self, ip: str) -> frozenset[str]:
        """Identities of the living entries of an address. A node that died a moment ago may still stand beside its
        successor: Ray takes up to a minute to believe a death."""
        return frozenset(member.id for member in self.members if member.ip == ip and member.is_alive)

    def last_words(self, ip: str) -> str:
        """Why the node of this address was lost, as Ray says it; empty when it lives or never came."""
        found = [member.reason for member in self.members if member.ip == ip and not member.is_alive]
        return found[-1] if found and not self.is_alive(ip) else ""

    def missing(self, peers: Sequence[Peer]) -> tuple[Peer, ...]:
        return tuple(peer for peer in peers if not self.is_alive(peer.ip))

    def short_of_gpus(self, peers: Sequence[Peer]) -> tuple[str, ...]:
        """Say which living nodes have fewer GPUs than declared."""
        alive = {member.ip: member for member in self.members if member.is_alive}
        return tuple(
            f"{peer.name} ({peer.ip}) has {alive[peer.ip].gpus} of {peer.gpus} GPUs"
            for peer in peers
            if peer.ip in alive and alive[peer.ip].gpus < peer.gpus
        )

    def strangers(self, peers: Sequence[Peer]) -> tuple[str, ...]:
        """Addresses that are in the cluster and declared nowhere."""
        known = {peer.ip for peer in peers}
        return tuple(sorted({member.ip for member in self.members if member.is_alive} - known))


def parse_view(line: bytes) -> ClusterView | None:
    """Read one line; None for anything that is no answer."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    if isinstance(data.get("error"), str):
        return ClusterView(error=data["error"], message=one_line(str(data.get("message", "")), 300))
    nodes = data.get("nodes")
    if not isinstance(nodes, list):
        return None
    return ClusterView(tuple(_member(node) for node in nodes if isinstance(node, dict)))


def _member(node: Mapping[str, Any]) -> Member:
    gpus, cpus = node.get("gpus"), node.get("cpus")
    return Member(
        str(node.get("ip", "")),
        node.get("is_alive") is True,
        gpus if isinstance(gpus, int) else 0,
        cpus if isinstance(cpus, int) else 0,
        one_line(str(node.get("reason", "")), 300),
        str(node.get("id", "")),
    )


class ViewProcess:
    """The child that may import Ray. `fd` is the non-blocking end of its answers; it ends when we do."""

    def __init__(self, spec: NodeSpec, environment: Mapping[str, str], working_folder: str) -> None:
        argv = [sys.executable, "-m", "engine.executor.ray_view", "--address", spec.head_address]
        self._process = subprocess.Popen(
            [*argv, "--every", str(VIEW_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(environment),
            cwd=working_folder,
        )
        assert self._process.stdout is not None
        self.fd = self._process.stdout.fileno()
        os.set_blocking(self.fd, False)
        self._splitter = LineSplitter()

    def read(self) -> tuple[list[ClusterView], bool]:
        """Take what has arrived. Returns the answers, and False once the child is gone."""
        try:
            data = os.read(self.fd, 1 << 16)
        except BlockingIOError:
            return [], True
        views = [view for line in self._splitter.feed(data) if (view := parse_view(line)) is not None]
        return views, bool(data)

    def close(self) -> None:
        """End the child and reap it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
