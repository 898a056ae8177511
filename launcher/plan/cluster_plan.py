"""A launch on a declared cluster as one frozen value: what every node runs, with which ranks, memory, ports, variables.

Knows: the shape. Refuses to know: compose files, ssh, processes; `launcher.compose` renders this value, `up` obeys it.
Everything is in a fixed order (nodes as declared, ranks by number, ports and variables by name), and nothing depends on
the clock: the same registry gives the same value, and `digest` names it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.config import EngineConfig, ModelConfig
from engine.placement import Placement, RankSpec
from launcher.errors import HlaunchError
from launcher.plan.environment import Variable
from launcher.registry.cluster import Cluster, Node
from launcher.registry.types import ResolvedEntry

ExecutorName = Literal["inline", "multiproc", "ray", "ray-cgraph"]


@dataclass(frozen=True, slots=True)
class Port:
    """A TCP port, or an inclusive range of them, that a node listens on.

    `address` is what it binds; `reached_from`: `clients`, `cluster` (the other nodes), or `host` (this node only).
    """

    name: str
    first: int
    last: int
    address: str
    reached_from: Literal["clients", "cluster", "host"]

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Expected bytes of one rank. `kv_tokens` of one request at most; `max_full_requests` of full length at once."""

    rank: int
    device: str
    budget_bytes: int
    weight_bytes: int
    activation_bytes: int
    runtime_bytes: int
    kv_bytes: int
    num_blocks: int
    kv_tokens: int
    max_full_requests: float
    problem: str = ""

    @property
    def required_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes + self.runtime_bytes + self.kv_bytes

    @property
    def fits(self) -> bool:
        return not self.problem


@dataclass(frozen=True, slots=True)
class NodePlan:
    """What one node runs. `node_rank` counts nodes as declared; ranks may be none on a head that only serves.

    `config` is the engine's configuration on this node: the same on all, but for `device`, which is the node's first
    rank's. `config.to_json()` is the file. `environment` is complete for the node, sorted by name.
    """

    node: Node
    node_rank: int
    ranks: tuple[RankSpec, ...]
    config: EngineConfig
    environment: tuple[Variable, ...]
    ports: tuple[Port, ...]
    memory: tuple[RankMemory, ...]

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def is_head(self) -> bool:
        return self.node.role == "head"

    @property
    def gpus(self) -> tuple[int, ...]:
        """Indices of the GPUs that ranks of this node use, in rank order."""
        return tuple(int(rank.device.partition(":")[2]) for rank in self.ranks if rank.device.startswith("cuda:"))


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """One launch on a cluster. `problems` make it impossible, `blockers` are repaired outside it (files, secrets).

    `placement` and `model` are None only when a problem says why; `digest` is the SHA-256 of everything that a node
    would see, as hex.
    """

    entry: ResolvedEntry
    cluster: Cluster
    model: ModelConfig | None
    placement: Placement | None
    executor: ExecutorName
    nodes: tuple[NodePlan, ...]
    digest: str
    problems: tuple[HlaunchError, ...] = ()
    blockers: tuple[HlaunchError, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def head(self) -> NodePlan:
        return next(node for node in self.nodes if node.is_head)

    @property
    def workers(self) -> tuple[NodePlan, ...]:
        return tuple(node for node in self.nodes if not node.is_head)

    @property
    def ready_timeout_seconds(self) -> float:
        return self.entry.number("ready.timeout")

    def check(self) -> None:
        """Raise the first reason why the cluster must not start, if there is one."""
        for error in (*self.problems, *self.blockers):
            raise error
