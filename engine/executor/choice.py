"""Which executor runs an engine's ranks, seen from the node that holds the engine core.

Knows: the configuration's words for it. Refuses to know: how any of them works; each is imported when it is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from engine.config import ConfigError, EngineConfig
from engine.executor.messages import PhaseReport
from engine.placement import Placement

if TYPE_CHECKING:
    from engine.executor.compiled_graph import CompiledGraphExecutor
    from engine.executor.multinode import MultiNodeExecutor
    from engine.executor.node_starter import NodeStarter

    RanksExecutor = MultiNodeExecutor | CompiledGraphExecutor


def runs_in_process(config: EngineConfig, placement: Placement) -> bool:
    """Whether an engine is one rank of this node, which needs no process of its own."""
    return placement.only_rank(config.data_parallel_rank, config.core_node) is not None


def open_executor(
    config: EngineConfig,
    placement: Placement,
    *,
    on_phase: Callable[[PhaseReport], None] = lambda _: None,
    on_nodes: Callable[[str], None] = lambda _: None,
    starter: NodeStarter | None = None,
) -> RanksExecutor:
    """Start the ranks of the configuration's engine; `starter` is for nodes that join by themselves.

    Raises: ConfigError when nothing can start ranks where the placement wants them, RankFailure.
    """
    dp_rank = config.data_parallel_rank
    if config.executor == "ray-cgraph":
        from engine.executor.compiled_graph import CompiledGraphExecutor

        return CompiledGraphExecutor(config, placement, dp_rank=dp_rank, on_phase=on_phase, on_nodes=on_nodes)
    from engine.executor.multinode import MultiNodeExecutor

    nodes = dict.fromkeys(rank.node for rank in placement.engine(dp_rank))
    if not config.has_other_nodes:
        return MultiNodeExecutor(config, placement, dp_rank=dp_rank, on_phase=on_phase)
    here = config.nodes.names[0]
    if config.executor == "ray":
        from engine.executor.ray_starter import RayStarter

        starter = RayStarter(config, placement, on_nodes)
    if starter is None and any(node != here for node in nodes):
        raise ConfigError("nodes", "nothing starts ranks on other nodes in this process", "serve with: hlaunch up")
    return MultiNodeExecutor(
        replace(config, node_address=config.nodes.head_host),
        placement,
        dp_rank=dp_rank,
        on_phase=on_phase,
        starter=starter,
        node=here,
        on_nodes=on_nodes,
    )
