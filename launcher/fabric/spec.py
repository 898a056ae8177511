"""The row of the catalogue: what is known of one variable. Knows its shape, refuses to know any variable."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from launcher.fabric.kinds import Kind


class Scope(StrEnum):
    """Where a value may live."""

    NODE = "N"
    """Differs from node to node: only in a node's block, never carried over."""
    CLUSTER = "C"
    """Must be equal on every node."""
    RANK = "R"
    """Set per rank by the engine; a value from anywhere else leaks into every process."""
    FREE = "F"


SCOPE_WORDS = {
    Scope.NODE: "each node its own",
    Scope.CLUSTER: "equal on every node",
    Scope.RANK: "set per rank by the engine",
    Scope.FREE: "free",
}


@dataclass(frozen=True, slots=True)
class Spec:
    """One variable. `since` and `until` are releases of its owner, empty when nobody knows or it is still there.

    `is_debug`: right while looking for a fault, wrong in production.
    """

    name: str
    owner: str
    kind: Kind
    default: str
    scope: Scope
    effect: str
    since: str = ""
    until: str = ""
    source: str = ""
    is_debug: bool = False


@dataclass(frozen=True, slots=True)
class Dead:
    """A name that nobody reads (any more). `code` is its lint code; `instead` what to write, empty for nothing."""

    name: str
    truth: str
    instead: str
    code: str = "dead-name"
