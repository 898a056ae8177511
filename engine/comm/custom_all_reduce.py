"""The group of a GPU rank: our own sums over peer memory up to a measured size, NCCL above it and between hosts.

Knows: which way a sum takes, and by its size alone, so that all ranks choose alike. Refuses to know: kernels (behind
`kernels.gpu`), layers. Where GPUs cannot map each other's memory everything goes by NCCL, and nothing sums inside
kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from engine.comm.group import Group
from engine.comm.nccl import NcclGroup, open_group, share_bytes
from engine.placement import RankSpec

if TYPE_CHECKING:
    from kernels.gpu import AllReduce, Exchange

# Up to which size of the tensor, in bytes, each way is the fastest, by the number of ranks; measured with two and four
# H200s, see docs/performance-log.md. Other numbers of ranks take the next larger one's.
ONE_SHOT_BYTES = {2: 12 << 20, 4: 720 << 10, 8: 256 << 10}
FUSED_BYTES = {2: 4 << 20, 4: 900 << 10, 8: 256 << 10}
CUSTOM_BYTES = 12 << 20
INBOX_BYTES = 12 << 20


class DeviceGroup(Group, Protocol):
    """Ranks of one stage on devices that run ahead of their hosts.

    `exchange` lets the decode kernels sum inside themselves; None means that they cannot, and a step of any size takes
    the way of large ones.
    """

    exchange: Any

    def takes_tokens(self, num_tokens: int) -> bool:
        """Whether `add_rms_norm` serves a step of so many tokens."""
        ...

    def add_rms_norm(
        self,
        deltas: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        *,
        slot_weights: Tensor | None = None,
        out: Tensor | None = None,
        expert_out: Tensor | None = None,
    ) -> Tensor:
        """Sum deltas over slots and ranks, then do as `kernels.gpu.add_rms_norm`."""
        ...


class GpuGroup:
    """See `DeviceGroup`. All ranks call the same methods with the same shapes in the same order."""

    def __init__(self, nccl: NcclGroup, custom: AllReduce | None, exchange: Exchange | None) -> None:
        self.rank, self.size = nccl.rank, nccl.size
        self.exchange = exchange
        self._nccl, self._custom = nccl, custom

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Group.all_reduce`."""
        custom = self._custom
        if custom is None or x.dtype != torch.bfloat16 or x.nbytes > CUSTOM_BYTES or x.nbytes % 16:
            return self._nccl.all_reduce(x)
        x = x.contiguous()
        if x.nbytes <= _limit(ONE_SHOT_BYTES, self.size):
            return custom.one_shot(x)
        return custom.two_shot(x)

    def all_gather(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """See `Group.all_gather`."""
        return self._nccl.all_gather(x, widths)

    def takes_tokens(self, num_tokens: int) -> bool:
        """See `DeviceGroup.takes_tokens`."""
        custom = self._custom
        return (
            custom is not None
            and num_tokens * custom.token_bytes <= _limit(FUSED_BYTES, self.size)
            and custom.takes_tokens(num_tokens)
        )

    def add_rms_norm(self, *tensors: Any, **options: Any) -> Tensor:
        """See `DeviceGroup.add_rms_norm`."""
        assert self._custom is not None
        return self._custom.add_rms_norm(*tensors, **options)

    def close(self) -> None:
        """Leave the group. Peer memory stays until the process ends: a peer may still be writing to it."""
        self._nccl.close()


def _limit(table: dict[int, int], size: int) -> int:
    return next((limit for ranks, limit in sorted(table.items()) if size <= ranks), 0)


def open_gpu_group(
    group: Group, stage: Sequence[RankSpec], rank: RankSpec, hidden: int, device: torch.device
) -> GpuGroup:
    """Make the GPU group of a stage's ranks beside their CPU group, by which they tell each other how to be reached.

    Raises: NcclError, KernelError.
    """
    nccl = open_group(group)
    is_near = len({other.node for other in stage}) == 1
    devices = [torch.device(other.device).index or 0 for other in stage]
    if is_near:
        from kernels import gpu

        is_near = gpu.can_reach(device.index or 0, devices)
    # One rank that cannot is enough.
    (*answers,) = share_bytes(group, bytes([is_near]))
    if not all(answer[0] for answer in answers):
        return GpuGroup(nccl, None, None)
    from kernels import gpu

    def shared(num_bytes: int) -> Any:
        memory = gpu.PeerMemory(num_bytes)
        memory.open(group.rank, share_bytes(group, memory.handle))
        return memory

    memory = shared(gpu.all_reduce_bytes(group.size, INBOX_BYTES))
    mail = shared(gpu.mail_bytes(group.size, hidden))
    return GpuGroup(
        nccl,
        gpu.AllReduce(hidden, group.rank, memory, INBOX_BYTES, device),
        gpu.Exchange(group.rank, mail, rank.vocab[0], device),
    )
