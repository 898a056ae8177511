"""What a start that takes another's place may count on: the memory that the running one gives back.

Knows: which processes a launch of this host has, and what they hold. Refuses to know: how a start is planned, and how
anything is stopped.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.plan import Gpu, Inventory
    from launcher.supervise.instance import InstanceFolder


def inventory_without(inventory: Inventory, folder: InstanceFolder) -> Inventory:
    """Give the machine as it is once the launch of this folder has ended; as it is now where none runs.

    A GPU whose driver does not tell what each process holds has as much free as if nothing were known of it.
    """
    from launcher.supervise import procfs

    state = folder.read()
    if state is None or not state.is_alive:
        return inventory
    members = procfs.session_members(state.engine) if state.engine is not None else ()
    pids = frozenset((state.launcher.pid, *members))
    held = procfs.memory_bytes(pids)
    unified = (item for gpu in inventory.gpus if gpu.is_unified for item in gpu.processes)
    held += sum(item.memory_bytes for item in unified if item.pid in pids)
    is_on_gpus = _uses_gpus(folder)
    # In a container the driver names the host's numbers of processes: none of them is one that we know.
    is_told = any(item.pid in pids and item.memory_bytes for gpu in inventory.gpus for item in gpu.processes)
    return replace(
        inventory,
        memory_available_bytes=min(inventory.memory_total_bytes, inventory.memory_available_bytes + held),
        gpus=tuple(_without(gpu, pids, is_told=is_told or not is_on_gpus) for gpu in inventory.gpus),
    )


def _without(gpu: Gpu, pids: Set[int], *, is_told: bool) -> Gpu:
    if not is_told:
        return replace(gpu, free_bytes=0, processes=())
    held = sum(item.memory_bytes for item in gpu.processes if item.pid in pids)
    others = tuple(item for item in gpu.processes if item.pid not in pids)
    free = min(gpu.memory_bytes, gpu.free_bytes + held) if held else gpu.free_bytes
    return replace(gpu, free_bytes=free, processes=others)


def _uses_gpus(folder: InstanceFolder) -> bool:
    try:
        return '"cuda' in folder.config_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
