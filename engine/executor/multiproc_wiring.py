"""What the ranks of one engine on one host share, made before any of them starts: rings, groups, links, a board.

Knows: which ends belong to which rank, by placement. Refuses to know: processes. Everything is a descriptor without a
name, inherited by exactly the rank it belongs to: nothing can be left behind.
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


class RankSetup(msgspec.Struct):
    """Everything that a rank's process is told: configurations as JSON, its place among `members`, its ends.

    `members` are the ranks of its engine, in order; `index` is its own among them. `results` belongs to the one rank
    that answers: tensor rank 0 of the last stage. With a `rendezvous` groups and links are made over TCP instead.
    """

    config: str
    placement: str
    rank: int
    index: int
    members: tuple[int, ...]
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
    """The engine's own ends, and each rank's setup in rank order."""

    def __init__(self, ranks: Sequence[RankSpec], config: EngineConfig, placement_json: str) -> None:
        config_json = config.to_json()
        self.board: Segment = create_board(len(ranks))
        self.plans, readers = create_ring(len(ranks))
        answer, (self.results,) = create_ring(1, slot_bytes=RESULT_SLOT_BYTES)
        members = tuple(rank.rank for rank in ranks)
        self.setups = [
            RankSetup(config_json, placement_json, rank.rank, index, members, readers[index], os.dup(self.board.fd))
            for index, rank in enumerate(ranks)
        ]
        stages: dict[int, list[int]] = {}
        for index, rank in enumerate(ranks):
            stages.setdefault(rank.pp_rank, []).append(index)
        ordered = [stages[stage] for stage in sorted(stages)]
        self.setups[ordered[-1][0]].results = answer
        if config.cpu_communicator == "gloo":
            for setup, place in zip(self.setups, create_rendezvous(config.node_address, len(ranks)), strict=True):
                setup.rendezvous = place
            return
        for indices in ordered:
            if len(indices) > 1:
                widest = max(ranks[index].vocab[1] - ranks[index].vocab[0] for index in indices)
                slot_bytes = max(SLOT_BYTES, -(-4 * widest // 4096) * 4096)
                for index, end in zip(indices, create_group(len(indices), slot_bytes=slot_bytes), strict=True):
                    self.setups[index].group = end
        for before, after in zip(ordered, ordered[1:], strict=False):
            for source, target in zip(before, after, strict=True):
                self.setups[source].next, self.setups[target].previous = create_link()

    def close(self) -> None:
        """Close everything, where not all ranks could be started."""
        for setup in self.setups:
            setup.close()
        self.plans.close()
        self.results.close()
        self.board.close()
