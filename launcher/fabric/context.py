"""What a check of one node is handed. Knows names only; refuses to know what is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from launcher.fabric import selection
from launcher.fabric.environment import as_mapping, node_environment
from launcher.fabric.facts import Hca, Netdev, NodeFacts
from launcher.registry.cluster import Cluster, Node


@dataclass(frozen=True)
class NodeContext:
    """One node of a cluster with what was read there.

    `needed_bytes` is what the model is to take of this node's memory, 0 without a model. `ports` maps each pinned port
    to what listens on it.
    """

    cluster: Cluster
    node: Node
    facts: NodeFacts
    needed_bytes: int = 0
    ports: Mapping[int, str] | None = None

    @property
    def name(self) -> str:
        return self.node.name

    @cached_property
    def platform(self) -> str:
        return selection.platform_of(self.cluster, self.node, self.facts)

    @cached_property
    def environment(self) -> Mapping[str, str]:
        """What this node's processes will see of the fabric: its own environment below, the registry above."""
        return {**self.facts.environ, **as_mapping(node_environment(self.cluster, self.node, {}, self.facts))}

    @property
    def has_rdma(self) -> bool:
        """Say whether this node is to use RDMA at all."""
        return self.cluster.fabric.rdma != "off" and self.platform != "cpu"

    @property
    def needs_rdma(self) -> bool:
        return self.cluster.fabric.rdma == "required" and self.platform != "cpu"

    @cached_property
    def hcas(self) -> tuple[Hca, ...]:
        return selection.hcas_of(self.cluster, self.node, self.facts)

    @cached_property
    def interface(self) -> Netdev | None:
        """The interface of the fabric, as declared or by the node's address."""
        name = selection.interface_of(self.node, self.facts)
        return self.facts.netdev(name) if name is not None else None

    @property
    def interface_name(self) -> str:
        return selection.interface_of(self.node, self.facts) or "<interface>"
