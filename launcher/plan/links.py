"""What joins ranks, and what it costs to send over it: the assumptions behind every estimate, in one table.

Knows: figures with their sources. Refuses to know: which ranks exist. A figure is replaced where an inventory knows
better (the rate of an RDMA port); nothing here is measured on the machine at hand, and the printed table says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from launcher.plan.inventory import Inventory
from launcher.registry.cluster import Cluster


@dataclass(frozen=True, slots=True)
class Link:
    """One kind of link. `sum_seconds`: an all-reduce of a few kilobytes by number of ranks (nearest below counts).

    `hop_seconds`: handing a small tensor from one rank to another. `bytes_per_second` in one direction.
    """

    name: str
    bytes_per_second: float
    hop_seconds: float
    sum_seconds: Mapping[int, float]
    source: str

    def all_reduce(self, num_bytes: float, ranks: int) -> float:
        """Time of one all-reduce over `ranks`: a latency by their number, and a ring's share of the bytes."""
        if ranks < 2:
            return 0.0
        latency = self.sum_seconds[max(n for n in self.sum_seconds if n <= ranks)]
        return latency + 2 * (ranks - 1) / ranks * num_bytes / self.bytes_per_second

    def hop(self, num_bytes: float) -> float:
        return self.hop_seconds + num_bytes / self.bytes_per_second


NVLINK = Link("NVLink", 300e9, 8e-6, {2: 3.9e-6, 4: 3.7e-6, 8: 5.7e-6}, "one-shot peer copies, as published for H200")
PCIE = Link("PCIe", 22e9, 15e-6, {2: 12e-6, 4: 18e-6, 8: 30e-6}, "NCCL over host bridges, assumed")
SHARED_MEMORY = Link(
    "shared memory", 12e9, 5e-6, {2: 4e-6, 4: 6e-6, 8: 10e-6}, "two spinning ranks, measured on one host"
)
RDMA = Link("RDMA", 22e9, 20e-6, {2: 30e-6, 4: 40e-6, 8: 50e-6, 16: 60e-6}, "NCCL over one 200 Gb/s port, assumed")
TCP = Link(
    "TCP", 1.1e9, 150e-6, {2: 250e-6, 4: 350e-6, 8: 500e-6, 16: 700e-6}, "10 Gb/s, Gloo on a loopback for latency"
)


def inside_link(inventory: Inventory, *, is_gpu: bool) -> Link:
    """Choose what joins the ranks of one host: NVLink where NVML or the kind of GPU says so."""
    if not is_gpu:
        return SHARED_MEMORY
    links = [link for gpu in inventory.gpus for link in gpu.links]
    if links:
        return NVLINK if all(link.kind == "nvlink" for link in links) else PCIE
    # No links were read: boards of these kinds with several GPUs are joined by a switch.
    names = [gpu.name for gpu in inventory.gpus]
    has_switch = names and all(
        any(kind in name for kind in ("H100 80GB", "H200", "B200", "A100-SXM")) for name in names
    )
    return NVLINK if has_switch else PCIE


def between_link(cluster: Cluster | None, inventories: Mapping[str, Inventory]) -> Link:
    """Choose what joins hosts: RDMA where the cluster says so, at the rate of its slowest known port."""
    if cluster is None or cluster.fabric.rdma == "off":
        return TCP
    rates = [port.rate_gbps for item in inventories.values() for port in item.rdma_ports if port.rate_gbps]
    if not rates:
        return RDMA
    # 0.88: what remains of 200 Gb/s after headers and flow control.
    source = f"NCCL over a port of {min(rates):g} Gb/s as read, latency assumed"
    return replace(RDMA, bytes_per_second=min(rates) / 8 * 1e9 * 0.88, source=source)
