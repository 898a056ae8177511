"""A rank among others: the ranks of its stage, and its ways to them and to the stages beside it.

Knows: which of a stage's ranks adds what all of them hold. Refuses to know: how tensors travel (`engine.comm`).
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.comm.group import Group
from engine.comm.link import Receiver, Sender
from engine.placement import RankSpec


@dataclass(slots=True)
class RankLinks:
    """`stage` lists the ranks of the tensor-parallel group, this one among them; empty means that it is alone.

    `receiver` is None on the first stage, `sender` on the last. `store` is where ranks over TCP meet: who keeps it must
    hold it until all have met, and holds it as long as it lives.
    """

    stage: tuple[RankSpec, ...] = ()
    group: Group | None = None
    receiver: Receiver | None = None
    sender: Sender | None = None
    store: object = None
