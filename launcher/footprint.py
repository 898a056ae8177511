"""What a launch takes: hosts, the kinds of processors that its layers are on, the memory that its ranks hold.

Knows: where each figure comes from: the engine's configuration, the placement, the server's `/metrics`. Refuses to
know: columns. What nobody tells is None.
"""

from __future__ import annotations

from typing import Any

from engine.config import ConfigError, EngineConfig
from engine.placement import Placement, PlacementError, RankSpec
from launcher.client import Client
from launcher.errors import HlaunchError
from launcher.supervise.instance import InstanceFolder
from launcher.top.exposition import MAX_TEXT_BYTES, parse
from launcher.top.ranks import read_ranks

METRICS_SECONDS = 3.0
"""How long a server may take for its figures: a list of launches does not wait for one that hangs."""


def local_layout(folder: InstanceFolder) -> tuple[int, float | None]:
    """Return on how many hosts a launch of this one runs, and the CPUs' share of it, 0 to 1."""
    try:
        config = EngineConfig.from_json(folder.config_file.read_text(encoding="utf-8"), str(folder.config_file))
    except (OSError, ValueError, ConfigError):
        return 1, None
    return max(1, len(config.nodes.names)), cpu_share(config.placement, config.device)


def cpu_share(placement: str, device: str = "") -> float | None:
    """Return which share of a model CPU ranks own, 0 to 1: of the layers, each by its experts and MLP columns.

    `placement` is its JSON; where it is empty all is on `device`.
    """
    if not placement:
        kind = device.partition(":")[0]
        return {"cpu": 1.0, "cuda": 0.0}.get(kind)
    try:
        ranks = Placement.from_json(placement).ranks
    except PlacementError:
        return None
    whole = sum(_owned(rank) for rank in ranks)
    return sum(_owned(rank) for rank in ranks if rank.backend == "cpu") / whole if whole else None


def _owned(rank: RankSpec) -> int:
    """Most of a model is its MLPs: dense ones are shared by columns, experts by number or by columns."""
    columns, experts = (end - begin for begin, end in (rank.mlp_units, rank.experts))
    return rank.num_layers * columns * max(1, experts)


def rank_memory_bytes(url: str, api_key: str | None) -> int | None:
    """Ask a server how much memory its ranks hold now: a GPU's in use, a CPU rank's own. Blocks for METRICS_SECONDS."""
    try:
        client = Client(url, api_key, read_timeout_seconds=METRICS_SECONDS)
        try:
            ranks = read_ranks(parse(client.text("/metrics", MAX_TEXT_BYTES))).ranks
        finally:
            client.close()
    except HlaunchError:
        return None
    # Ranks of one GPU all tell the memory of that GPU.
    held: dict[Any, float] = {
        (rank.node, rank.device) if rank.device.startswith("cuda") else rank.key: rank.values["memory_bytes"]
        for rank in ranks
        if "memory_bytes" in rank.values
    }
    return int(sum(held.values())) if held else None
