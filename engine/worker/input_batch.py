"""The rows' state, and the tensors of one step made from it.

Knows: token ids, computed counts and block tables per row, kept up to date from the deltas of each plan. Refuses to
know: the model, the cache's contents.

The batch order is the plan's. Inside a step, rows with one token come first and those with several after them, so that
attention takes the former in one call; `order` undoes that for the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.core.plan import AdmittedRow, ExecutionPlan
from engine.sampling.row import RowSampling
from kernels.ops import PagedBatch, Prefill


class RowError(Exception):
    """A plan speaks of a row that this rank does not hold, or schedules tokens or slots that the row does not have."""


class Row:
    """One request on this rank. `num_slots[g]` positions of KV group g have blocks."""

    __slots__ = ("generation", "num_computed", "num_slots", "request_id", "sampling", "tokens")

    def __init__(self, admitted: AdmittedRow, vocab_size: int) -> None:
        self.generation = admitted.generation
        self.request_id = admitted.request_id
        self.tokens = list(admitted.token_ids)
        self.num_computed = admitted.num_computed_tokens
        self.num_slots = [0] * len(admitted.block_ids)
        self.sampling = RowSampling(admitted, vocab_size)

    def append(self, token: int) -> None:
        """Add a sampled token."""
        self.tokens.append(token)
        self.sampling.append(token)


class SlotTable:
    """The block tables of one KV group, expanded to one slot per position; see `kernels.paging.PagedBatch.slot_table`.

    Grows by doubling: neither the number of rows nor their length is known in advance.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._offsets = torch.arange(block_size)
        self.tensor = torch.zeros((4, 1 + 16 * block_size), dtype=torch.int64)

    def extend(self, row: int, num_slots: int, block_ids: Sequence[int]) -> int:
        """Append blocks to a row that has `num_slots`; returns its new count."""
        end = num_slots + len(block_ids) * self._block_size
        rows, columns = self.tensor.shape
        if row >= rows or end >= columns:
            shape = (max(rows, 1 << row.bit_length()), max(columns, 2 * end))
            grown = torch.zeros(shape, dtype=torch.int64)
            grown[:rows, :columns] = self.tensor
            self.tensor = grown
        slots = torch.tensor(block_ids)[:, None] * self._block_size + self._offsets
        self.tensor[row, 1 + num_slots : 1 + end] = slots.flatten()
        return end


@dataclass(slots=True)
class StepInputs:
    """One step's tensors. `group_batches[g]` describes KV group g.

    `sampling_rows` stand in the order of `sample_index`, which names their tokens (None: all tokens, in order); `order`
    gives, for each sampling row in plan order, its place among them (None: the same order).
    """

    input_ids: Tensor
    positions: Tensor
    group_batches: list[PagedBatch]
    sampling_rows: list[Row]
    sample_index: Tensor | None
    order: list[int] | None
    result_rows: list[int]


class InputBatch:
    """All rows of this rank."""

    def __init__(self, block_size: int, windows: Sequence[int | None], vocab_size: int) -> None:
        self._windows = tuple(windows)
        self._vocab_size = vocab_size
        self._rows: dict[int, Row] = {}
        self._tables = [SlotTable(block_size) for _ in self._windows]

    def __len__(self) -> int:
        return len(self._rows)

    def apply(self, plan: ExecutionPlan) -> None:
        """Take in a plan's deltas: drop released rows, admit, append blocks; in this order."""
        for index in plan.released:
            self._rows.pop(index, None)
        for admitted in plan.admits:
            row = self._rows[admitted.row] = Row(admitted, self._vocab_size)
            for group, ids in enumerate(admitted.block_ids):
                if ids:
                    row.num_slots[group] = self._tables[group].extend(admitted.row, 0, ids)
        for index, group, ids in plan.new_blocks:
            row = self._row(index)
            row.num_slots[group] = self._tables[group].extend(index, row.num_slots[group], ids)

    def append_tokens(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Append sampled tokens to their rows; a row that was released in the meantime drops its own."""
        for index, token in pairs:
            row = self._rows.get(index)
            if row is not None:
                row.append(token)

    def _row(self, index: int) -> Row:
        try:
            return self._rows[index]
        except KeyError:
            raise RowError(f"row {index} was never admitted") from None

    def prepare(self, plan: ExecutionPlan) -> StepInputs:
        """Make a step's tensors and advance the computed counts."""
        if len(plan.rows) == 1 and plan.num_scheduled[0] == 1:
            return self._prepare_single(plan.rows[0], samples=plan.samples[0])
        counts = plan.num_scheduled
        places = sorted(range(len(plan.rows)), key=lambda i: counts[i] > 1)
        ids: list[int] = []
        positions: list[int] = []
        decode_rows: list[int] = []
        prefills: list[Prefill] = []
        sampling: list[tuple[int, Row, int]] = []
        for i in places:
            index, count = plan.rows[i], counts[i]
            row = self._row(index)
            begin = row.num_computed
            self._check(index, row, begin + count)
            if count == 1:
                decode_rows.append(index)
            else:
                prefills.append(Prefill(index, len(ids), count, begin))
            ids += row.tokens[begin : begin + count]
            positions += range(begin, begin + count)
            row.num_computed += count
            if plan.samples[i]:
                sampling.append((i, row, len(ids) - 1))
        order = sorted(range(len(sampling)), key=lambda j: sampling[j][0])
        return StepInputs(
            input_ids=torch.tensor(ids),
            positions=torch.tensor(positions),
            group_batches=self._describe(decode_rows, positions[: len(decode_rows)], prefills),
            sampling_rows=[row for _, row, _ in sampling],
            sample_index=None if len(sampling) == len(ids) else torch.tensor([token for _, _, token in sampling]),
            order=None if order == list(range(len(sampling))) else order,
            result_rows=[plan.rows[sampling[j][0]] for j in order],
        )

    def _prepare_single(self, index: int, *, samples: bool) -> StepInputs:
        """Make the tensors of one row's single token: the step of a lone decoding request, kept short."""
        row = self._row(index)
        position = row.num_computed
        self._check(index, row, position + 1)
        row.num_computed = position + 1
        batches = []
        for window, table in zip(self._windows, self._tables, strict=True):
            slots = table.tensor[index, position + 1 : position + 2]
            batches.append(PagedBatch(window, table.tensor, slots, [index], [position], []))
        return StepInputs(
            input_ids=torch.tensor([row.tokens[position]]),
            positions=torch.tensor([position]),
            group_batches=batches,
            sampling_rows=[row] if samples else [],
            sample_index=None,
            order=None,
            result_rows=[index] if samples else [],
        )

    def _check(self, index: int, row: Row, end: int) -> None:
        if end > len(row.tokens):
            raise RowError(f"row {index} has {len(row.tokens)} tokens, the plan computes up to {end}")
        if end > min(row.num_slots):
            raise RowError(f"row {index} has blocks for {min(row.num_slots)} tokens, the plan computes up to {end}")

    def _describe(self, decode_rows: list[int], positions: list[int], prefills: list[Prefill]) -> list[PagedBatch]:
        batches = []
        rows_index = torch.tensor(decode_rows)
        columns = torch.tensor(positions) + 1
        for window, table in zip(self._windows, self._tables, strict=True):
            parts = [table.tensor[rows_index, columns]] if decode_rows else []
            parts += [table.tensor[p.row, p.position + 1 : p.position + p.count + 1] for p in prefills]
            slots = parts[0] if len(parts) == 1 else torch.cat(parts)
            batches.append(PagedBatch(window, table.tensor, slots, decode_rows, positions, prefills))
        return batches
