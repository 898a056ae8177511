"""What the ranks of one engine on one node share, made before any of them starts: rings, groups, links, a board.

Knows: which ends belong to which rank, by placement; which ranks must meet others over TCP. Refuses to know: processes.
Everything is a descriptor without a name, inherited by exactly the rank it belongs to: nothing can be left behind.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import msgspec

from engine.comm.board import create_board
from engine.comm.ends import SLOT_BYTES, GroupEnd, Rendezvous, create_group, create_link, create_rendezvous
from engine.comm.ring import RingEnd, create_ring
from engine.comm.segment import Segment
from engine.config import EngineConfig
from engine.placement import RankSpec

RESULT_SLOT_BYTES = 256 << 10
LEAST_PLAN_SLOTS = 8


class RankSetup(msgspec.Struct):
    """Everything that a rank's process is told: configurations as JSON, its ends, its place `index` on the board.

    `results` belongs to the one rank that answers: tensor rank 0 of the last stage. Where a neighbour is but `group`,
    `previous` or `next` is not, the two meet at `rendezvous`, over TCP.
    """

    config: str
    placement: str
    rank: int
    index: int
    plans: RingEnd
    board: int
    results: RingEnd | None = None
    group: GroupEnd | None = None
    previous: RingEnd | None = None
    next: RingEnd | None = None
    rendezvous: Rendezvous | None = None

    @property
    def _ends(self) -> list[RingEnd | GroupEnd | Rendezvous]:
        ends = (self.plans, self.results, self.group, self.previous, self.next, self.rendezvous)
        return [end for end in ends if end is not None]

    @property
    def fds(self) -> tuple[int, ...]:
        return (self.board, *(fd for end in self._ends for fd in end.fds))

    def close(self) -> None:
        """Close what the rank's process has inherited."""
        for end in self._ends:
            end.close()
        with contextlib.suppress(OSError):
            os.close(self.board)


class Wiring:
    """A node's own ends, and the setups of its ranks, `local` of the engine's `members`, in rank order.

    `store` is where ranks that talk over TCP meet, when a rank of this node keeps it; the setups of ranks on other
    nodes get it by `meet_at`. `results` is None where the answering rank is on another node.
    """

    def __init__(
        self, members: Sequence[RankSpec], local: Sequence[RankSpec], config: EngineConfig, placement_json: str
    ) -> None:
        config_json = config.to_json()
        num_stages = 1 + max(rank.pp_rank for rank in members)
        self.board: Segment = create_board(len(local))
        # A slot for every plan in flight: who writes them must not have to wait for a slow reader.
        self.plans, readers = create_ring(len(local), slots=max(LEAST_PLAN_SLOTS, num_stages + 2))
        self.setups = [
            RankSetup(config_json, placement_json, rank.rank, index, readers[index], os.dup(self.board.fd))
            for index, rank in enumerate(local)
        ]
        self._by_rank = {setup.rank: setup for setup in self.setups}
        stages: list[list[RankSpec]] = [[] for _ in range(num_stages)]
        for rank in members:
            stages[rank.pp_rank].append(rank)
        self.results: RingEnd | None = None
        if (answering := self._by_rank.get(stages[-1][0].rank)) is not None:
            answering.results, (self.results,) = create_ring(1, slot_bytes=RESULT_SLOT_BYTES)
        is_met = [self._make_group(stage, config) for stage in stages]
        is_met += [
            self._make_link(source, target, config)
            for before, after in zip(stages, stages[1:], strict=False)
            for source, target in zip(before, after, strict=True)
        ]
        self.needs_store = not all(is_met)
        self.store: tuple[str, int] | None = None
        if self.needs_store and (keeper := self._by_rank.get(members[0].rank)) is not None:
            keeper.rendezvous, *_ = create_rendezvous(config.node_address, 1)
            self.meet_at((keeper.rendezvous.host, keeper.rendezvous.port))

    def meet_at(self, store: tuple[str, int]) -> None:
        """Tell all ranks where the store is."""
        self.store = store
        for setup in self.setups:
            setup.rendezvous = setup.rendezvous or Rendezvous(*store)

    def close(self) -> None:
        """Close everything, where not all ranks could be started."""
        for setup in self.setups:
            setup.close()
        self.plans.close()
        if self.results is not None:
            self.results.close()
        self.board.close()

    def _make_group(self, stage: Sequence[RankSpec], config: EngineConfig) -> bool:
        """Make a stage's shared memory if it can have one; whether that is all it needs."""
        if len(stage) == 1:
            return True
        ours = [self._by_rank[rank.rank] for rank in stage if rank.rank in self._by_rank]
        if not _shares_memory(config, *stage):
            return False
        if ours:  # all of them, then
            widest = max(rank.vocab[1] - rank.vocab[0] for rank in stage)
            slot_bytes = max(SLOT_BYTES, -(-4 * widest // 4096) * 4096)
            for setup, end in zip(ours, create_group(len(ours), slot_bytes=slot_bytes), strict=True):
                setup.group = end
        return True

    def _make_link(self, source: RankSpec, target: RankSpec, config: EngineConfig) -> bool:
        if not _shares_memory(config, source, target):
            return False
        if source.rank in self._by_rank:
            self._by_rank[source.rank].next, self._by_rank[target.rank].previous = create_link()
        return True


def _shares_memory(config: EngineConfig, *ranks: RankSpec) -> bool:
    """Whether ranks reach each other through the memory of one host: rings and groups carry CPU tensors."""
    return (
        config.cpu_communicator == "shared_memory"
        and len({rank.node for rank in ranks}) == 1
        and all(rank.backend == "cpu" for rank in ranks)
    )
