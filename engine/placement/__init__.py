"""Which rank runs where and owns what: a frozen value, computed once, before anything starts.

Pure: the launcher prints it, the executor obeys it, and nothing downstream asks a rank what kind of device it is in
order to decide policy. Rank order is `(dp * PP + pp) * TP + tp`, as vLLM's.

    placement = place(model, ParallelSizes(data=2, pipeline=2, tensor=4), nodes)
    placement.tp_groups, placement.crossing(placement.pp_groups), remarks(placement, model)

Refuses to know: how fast anything is (shares come in as numbers), processes, sockets, torch.
"""

from __future__ import annotations

from engine.placement.place import PlacementOptions, Strategy, find_sizes, place
from engine.placement.remarks import Remark, remarks
from engine.placement.shard import embedding_rows, shard
from engine.placement.shares import MLP_UNIT, Shares, apportion, split_evenly, split_layers
from engine.placement.values import (
    Device,
    HostSpec,
    KVLink,
    KVRoute,
    ParallelSizes,
    Placement,
    PlacementError,
    RankSpec,
    single_rank,
)

__all__ = [
    "MLP_UNIT",
    "Device",
    "HostSpec",
    "KVLink",
    "KVRoute",
    "ParallelSizes",
    "Placement",
    "PlacementError",
    "PlacementOptions",
    "RankSpec",
    "Remark",
    "Shares",
    "Strategy",
    "apportion",
    "embedding_rows",
    "find_sizes",
    "place",
    "remarks",
    "shard",
    "single_rank",
    "split_evenly",
    "split_layers",
]
