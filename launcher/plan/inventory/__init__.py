"""What machines have: cores, memory, GPUs, NICs; of this host, of a declared cluster, or as saved by another host.

    inventory = read_inventory()                       # this host
    inventory = Inventory.from_json(text, "spark-01")  # saved by `hlaunch inventory --json` elsewhere
    by_node = declared_inventories(cluster)            # what the registry says of every node

Everything is read under a root, so that a fixture tree tests it; NVML comes in as an argument. Refuses to know: torch,
CUDA, what a model needs. Nothing here blocks; what cannot be read counts as absent, and findings say why.
"""

from __future__ import annotations

from launcher.plan.inventory.declared import assumption, declared_inventories
from launcher.plan.inventory.host import read_inventory
from launcher.plan.inventory.values import (
    Finding,
    Gpu,
    GpuLink,
    GpuProcess,
    Inventory,
    InventoryError,
    Nic,
    NumaNode,
    RdmaPort,
)

__all__ = [
    "Finding",
    "Gpu",
    "GpuLink",
    "GpuProcess",
    "Inventory",
    "InventoryError",
    "Nic",
    "NumaNode",
    "RdmaPort",
    "assumption",
    "declared_inventories",
    "read_inventory",
]
