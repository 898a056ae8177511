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
from kernels.ops import PagedBatch, Prefill, slots_of


class RowError(Exception):
    """A plan speaks of a row that this rank does not hold, or schedules tokens that the row does not have."""


class Row:
    """One request on this rank. `blocks[g]` are its blocks in KV group g, from position 0."""

    __slots__ = ("blocks", "generation", "num_computed", "request_id", "sampling", "tokens")

    def __init__(self, admitted: AdmittedRow, vocab_size: int) -> None:
        self.generation = admitted.generation
        self.request_id = admitted.request_id
        self.tokens = list(admitted.token_ids)
        self.num_computed = admitted.num_computed_tokens
        self.blocks = [list(ids) for ids in admitted.block_ids]
        self.sampling = RowSampling(admitted, vocab_size)

    def append(self, token: int) -> None:
        """Add a sampled token."""
        self.tokens.append(token)
        self.sampling.append(token)


@dataclass(slots=True)
class StepInputs:
    """One step's tensors. `group_batches[g]` describes KV group g.

    `sampling_rows` stand in the order of `sample_index`, which names their tokens; `order` gives, for each sampling row
    in plan order, its place among them.
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
        self._block_size = block_size
        self._windows = tuple(windows)
        self._vocab_size = vocab_size
        self._rows: dict[int, Row] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def apply(self, plan: ExecutionPlan) -> None:
        """Take in a plan's deltas: drop released rows, admit, append blocks; in this order."""
        for row in plan.released:
            self._rows.pop(row, None)
        for admitted in plan.admits:
            self._rows[admitted.row] = Row(admitted, self._vocab_size)
        for row, group, ids in plan.new_blocks:
            self._row(row).blocks[group] += ids

    def _row(self, index: int) -> Row:
        try:
            return self._rows[index]
        except KeyError:
            raise RowError(f"row {index} was never admitted") from None

    def prepare(self, plan: ExecutionPlan) -> StepInputs:
        """Make a step's tensors and advance the computed counts."""
        rows = [self._row(index) for index in plan.rows]
        counts = plan.num_scheduled
        places = sorted(range(len(rows)), key=lambda i: counts[i] > 1)
        ids: list[int] = []
        position_parts: list[int] = []
        decode: list[Row] = []
        spans: list[tuple[Row, int, int]] = []
        sampling: list[tuple[int, Row, int]] = []
        for i in places:
            row, count = rows[i], counts[i]
            begin = row.num_computed
            end = begin + count
            if end > len(row.tokens):
                raise RowError(f"row {plan.rows[i]} has {len(row.tokens)} tokens, the plan computes up to {end}")
            if count == 1:
                decode.append(row)
            else:
                spans.append((row, len(ids), count))
            ids += row.tokens[begin:end]
            position_parts += range(begin, end)
            if plan.samples[i]:
                sampling.append((i, row, len(ids) - 1))
        batches = [self._describe(group, decode, spans, len(ids)) for group in range(len(self._windows))]
        for i, row in enumerate(rows):
            row.num_computed += counts[i]
        is_all = len(sampling) == len(ids)
        plan_order = sorted(range(len(sampling)), key=lambda j: sampling[j][0])
        return StepInputs(
            input_ids=torch.tensor(ids),
            positions=torch.tensor(position_parts),
            group_batches=batches,
            sampling_rows=[row for _, row, _ in sampling],
            sample_index=None if is_all else torch.tensor([token for _, _, token in sampling]),
            order=None if plan_order == list(range(len(sampling))) else plan_order,
            result_rows=[plan.rows[sampling[j][0]] for j in plan_order],
        )

    def _describe(
        self, group: int, decode: list[Row], spans: list[tuple[Row, int, int]], num_tokens: int
    ) -> PagedBatch:
        size = self._block_size
        slots = [0] * len(decode)
        positions = [row.num_computed for row in decode]
        longest = max((position // size + 1 for position in positions), default=0)
        tables = []
        for i, row in enumerate(decode):
            blocks = row.blocks[group]
            used = positions[i] // size + 1
            slots[i] = blocks[used - 1] * size + positions[i] % size
            tables.append(blocks[:used] + [0] * (longest - used))
        parts = [torch.tensor(slots, dtype=torch.int64)] if decode else []
        prefills = []
        for row, token, count in spans:
            begin, end = row.num_computed, row.num_computed + count
            table = torch.tensor(row.blocks[group][: -(-end // size)])
            prefills.append(Prefill(token, count, begin, table))
            parts.append(slots_of(table, begin, end, size))
        return PagedBatch(
            block_size=size,
            window=self._windows[group],
            slots=parts[0] if len(parts) == 1 else torch.cat(parts),
            decode_positions=positions,
            decode_tables=torch.tensor(tables) if decode else None,
            prefills=prefills,
        )
