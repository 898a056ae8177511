"""The rows' state on a GPU rank: what the host knows of each row, and what lies on the device, by row number.

Knows: block tables, last tokens, sampling options, kept up to date from each plan's deltas. Refuses to know: steps,
graphs, the model. Everything that a step sends to the device travels in one pinned buffer (`Upload`), without waiting.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.core.plan import AdmittedRow, ExecutionPlan
from engine.device import new_event, pinned_buffer
from engine.sampling.row import RowSampling
from engine.worker.input_batch import RowError

# Pinned buffers: a copy waits behind the step before it, and a step sends up to four.
NUM_UPLOADS = 16
COLDEST = 1e-5
_ALIGNMENT = 2  # int64 numbers: sections begin at multiples of 16 bytes, or Triton compiles another variant


class GpuRow:
    """One request. `tokens` are those the host knows: the prompt and, after a preemption, the outputs made before it.

    A token sampled on the device never passes through here. `sampling` is set for rows whose logits change before a
    token is chosen, or whose log-probabilities are wanted; its tensors lie on the device.
    """

    __slots__ = ("has_filters", "num_blocks", "num_computed", "sampling", "tokens")

    def __init__(self, admitted: AdmittedRow, vocab_size: int, device: torch.device) -> None:
        params = admitted.params
        self.tokens = admitted.token_ids
        self.num_computed = admitted.num_computed_tokens
        self.num_blocks = [0] * len(admitted.block_ids)
        self.has_filters = params.has_filters and not params.is_greedy
        sampling = RowSampling(admitted, vocab_size, device)
        self.sampling = sampling if sampling.adjusts or params.logprobs is not None else None


class Upload:
    """Numbers on their way to the device: sections of int64, collected on the host, sent by one copy.

    A pinned buffer is used again only when the copy out of it has ended.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._device = device
        self._pinned = [pinned_buffer(capacity, torch.int64, device) for _ in range(NUM_UPLOADS)]
        self._arrays: list[NDArray[np.int64]] = [buffer.numpy() for buffer in self._pinned]
        self._copied = [new_event(device) for _ in range(NUM_UPLOADS)]
        self._turn = 0

    def send(self, sections: Sequence[Sequence[int] | NDArray[np.int64]]) -> list[Tensor]:
        """Copy sections to the device on the current stream; returns one int64 tensor for each."""
        turn = self._turn = (self._turn + 1) % NUM_UPLOADS
        needed = sum(len(section) + _ALIGNMENT for section in sections)
        if needed > len(self._arrays[turn]):
            self._pinned[turn] = pinned_buffer(2 * needed, torch.int64, self._device)
            self._arrays[turn] = self._pinned[turn].numpy()
        else:
            self._copied[turn].synchronize()
        array, at, places = self._arrays[turn], 0, []
        for section in sections:
            array[at : at + len(section)] = section
            places.append((at, at + len(section)))
            at = -(-(at + len(section)) // _ALIGNMENT) * _ALIGNMENT
        sent = self._pinned[turn][:at].to(self._device, non_blocking=True, copy=True)
        self._copied[turn].record()
        return [sent[begin:end] for begin, end in places]


class GpuRows:
    """All rows of this rank. Row `num_rows` is a dummy that padding points at.

    Device tensors by row: tables[g] int32 [R + 1, M]; last_tokens and top_ks int32, temperatures, top_ps and
    min_ps float32, seeds int64 [R + 1].
    """

    def __init__(
        self,
        *,
        num_rows: int,
        num_groups: int,
        max_blocks: int,
        block_size: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        size = num_rows + 1
        self.dummy = num_rows
        self.block_size = block_size
        self._vocab_size, self._device = vocab_size, device
        self._rows: dict[int, GpuRow] = {}
        # A width that is a multiple of 16 keeps rows aligned, and Triton from compiling a second variant.
        self.max_blocks = -(-max_blocks // 16) * 16
        self.tables = [
            torch.zeros((size, self.max_blocks), dtype=torch.int32, device=device) for _ in range(num_groups)
        ]
        self.last_tokens = torch.zeros(size, dtype=torch.int32, device=device)
        self.temperatures = torch.zeros(size, dtype=torch.float32, device=device)
        self.top_ps = torch.ones(size, dtype=torch.float32, device=device)
        self.min_ps = torch.zeros(size, dtype=torch.float32, device=device)
        self.top_ks = torch.zeros(size, dtype=torch.int32, device=device)
        self.seeds = torch.zeros(size, dtype=torch.int64, device=device)
        self._upload = Upload(1 << 14, device)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> GpuRow:
        try:
            return self._rows[index]
        except KeyError:
            raise RowError(f"row {index} was never admitted") from None

    def send(self, sections: Sequence[Sequence[int] | NDArray[np.int64]]) -> list[Tensor]:
        """Send numbers to the device; see `Upload.send`."""
        return self._upload.send(sections)

    def apply(self, plan: ExecutionPlan) -> bool:
        """Take in a plan's deltas; returns whether anything that a step reads from the device has changed."""
        for index in plan.released:
            self._rows.pop(index, None)
        places: list[list[int]] = [[] for _ in self.tables]
        values: list[list[int]] = [[] for _ in self.tables]

        def append(index: int, row: GpuRow, group: int, ids: list[int]) -> None:
            first = index * self.max_blocks + row.num_blocks[group]
            row.num_blocks[group] += len(ids)
            if row.num_blocks[group] > self.max_blocks:
                raise RowError(f"row {index} has {row.num_blocks[group]} blocks, at most {self.max_blocks}")
            places[group] += range(first, first + len(ids))
            values[group] += ids

        for admitted in plan.admits:
            row = self._rows[admitted.row] = GpuRow(admitted, self._vocab_size, self._device)
            for group, ids in enumerate(admitted.block_ids):
                append(admitted.row, row, group, ids)
        for index, group, ids in plan.new_blocks:
            append(index, self[index], group, ids)
        if plan.admits:
            self._send_sampling(plan.admits)
        if not any(values):
            return bool(plan.admits)
        sent = self.send([*places, *values])
        for group, table in enumerate(self.tables):
            if values[group]:
                table.view(-1).index_copy_(0, sent[group], sent[len(places) + group].int())
        return True

    def advance(self, index: int, count: int) -> int:
        """Count `count` tokens of a row as computed; returns the position of the first. Raises: RowError."""
        row = self[index]
        begin = row.num_computed
        if begin + count > min(row.num_blocks) * self.block_size:
            raise RowError(f"row {index} has no blocks for {begin + count} tokens")
        row.num_computed = begin + count
        return begin

    def _send_sampling(self, admits: Sequence[AdmittedRow]) -> None:
        """Send the sampling options of new rows; floats travel as their bits."""
        params = [admitted.params for admitted in admits]
        # Below this a draw is the best token anyhow, and a logit over it would leave float32.
        heats = [p.temperature if p.temperature >= COLDEST else 0.0 for p in params]
        floats = np.array([heats, [p.top_p for p in params], [p.min_p for p in params]], dtype=np.float32)
        bits = floats.view(np.int32).astype(np.int64)
        # Seeds are unsigned 64-bit numbers; the device keeps their bits.
        seeds = np.array([admitted.seed & (1 << 64) - 1 for admitted in admits], dtype=np.uint64).view(np.int64)
        rows, temperatures, top_ps, min_ps, top_ks, seeds_sent = self.send(
            [[admitted.row for admitted in admits], *bits, [min(p.top_k, self._vocab_size) for p in params], seeds]
        )
        for target, sent in ((self.temperatures, temperatures), (self.top_ps, top_ps), (self.min_ps, min_ps)):
            target.index_copy_(0, rows, sent.int().view(torch.float32))
        self.top_ks.index_copy_(0, rows, top_ks.int())
        self.seeds.index_copy_(0, rows, seeds_sent)
