"""Who of a launch's nodes is in its cluster, from one view to the next: who came, left, is awaited, is lost.

Pure: views and times in, words out. Refuses to know: Ray, processes, what follows from it (`node_supervisor`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from launcher.supervise.cluster_view import ClusterView
from launcher.supervise.node_spec import Peer


class Membership:
    """One node's memory of the views. `tell` takes one event, in words."""

    def __init__(self, peers: Sequence[Peer], own_ip: str, tell: Callable[[str], None]) -> None:
        self._peers = peers
        self._own_ip = own_ip
        self._tell = tell
        self._seen: dict[str, frozenset[str]] = {}
        self._ghosts: frozenset[str] = frozenset()
        self._lost_since: float | None = None
        self.view = ClusterView(error="unreachable", message="not asked yet")
        """The last answer, or why there was none."""

    def take(self, view: ClusterView) -> bool:
        """Take in one answer and tell who came and went. Returns False when it is an error."""
        self.view = view
        if view.error:
            return False
        for peer in self._peers:
            ids, before = view.ids(peer.ip), self._seen.get(peer.ip)
            who = f"{peer.role} {peer.name} ({peer.ip})"
            if before is None and ids:
                self._tell(f"{who} joined")
            elif before and not ids:
                words = view.last_words(peer.ip)
                self._tell(f"{who} left" + (f": {words}" if words else ""))
            elif before is not None and ids - before:
                self._tell(f"{who} was restarted and joined again")
            if ids or before is not None:
                self._seen[peer.ip] = ids
        return True

    def to_data(self) -> list[dict[str, Any]]:
        """Every declared node and whether it lives, for the report."""
        return [
            {"name": peer.name, "ip": peer.ip, "role": peer.role, "is_alive": self.view.is_alive(peer.ip)}
            for peer in self._peers
        ]

    def begin_to_join(self) -> None:
        """Remember who stands under our address now: a node that was killed is listed for a while, and is not us."""
        self._ghosts = self.view.ids(self._own_ip)

    @property
    def has_joined(self) -> bool:
        """Whether this node, not its ghost, is in the cluster."""
        return bool(self.view.ids(self._own_ip) - self._ghosts)

    @property
    def num_here(self) -> int:
        return len(self._peers) - len(self.view.missing(self._peers))

    @property
    def is_complete(self) -> bool:
        """Whether every declared node is there, with the GPUs that it was declared with."""
        return not self.awaited()

    def awaited(self) -> str:
        """Name what is not there yet: nodes, and GPUs of nodes; empty when nothing is."""
        missing = [f"{peer.name} ({peer.ip})" for peer in self.view.missing(self._peers)]
        return ", ".join([*missing, *self.view.short_of_gpus(self._peers)])

    def reasons(self) -> list[str]:
        """Say why nodes are missing that were there, as far as the cluster knows it."""
        missing = self.view.missing(self._peers)
        return [f"{peer.name}: {words}" for peer in missing if (words := self.view.last_words(peer.ip))]

    def seconds_lost(self, now: float) -> float:
        """How long, by views up to `now` (CLOCK_MONOTONIC), the cluster has not listed this node; 0 when it does."""
        if self.view.is_alive(self._own_ip):
            self._lost_since = None
            return 0.0
        if self._lost_since is None:
            self._lost_since = now
        return now - self._lost_since
