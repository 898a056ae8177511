"""One step while it is planned, and while it is in flight. Lists run parallel, in batch order.

Knows: which request computes how many tokens. Refuses to know why.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.core.plan import AdmittedRow, ExecutionPlan
from engine.core.request import Request


@dataclass(slots=True)
class StepInFlight:
    """A plan whose result has not arrived: the requests that sample in it, their rows, and all its rows."""

    step_id: int
    sampling: list[Request]
    sampling_rows: list[int]
    rows: list[int]


@dataclass(slots=True)
class Batch:
    """The rows of a plan in the making."""

    requests: list[Request] = field(default_factory=list)
    num_scheduled: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    admits: list[AdmittedRow] = field(default_factory=list)
    new_blocks: list[tuple[int, int, list[int]]] = field(default_factory=list)
    # Requests that compute more than one token, and so may fill blocks.
    chunks: list[Request] = field(default_factory=list)

    def undo(self, request: Request) -> int:
        """Take a request out if it is in, and set its counts back; returns the tokens that it was to compute."""
        if request not in self.requests:
            return 0
        i = self.requests.index(request)
        count = self.num_scheduled[i]
        request.num_computed -= count
        request.num_tokens -= self.samples[i]
        del self.requests[i], self.num_scheduled[i], self.samples[i]
        self.new_blocks = [entry for entry in self.new_blocks if entry[0] != request.row]
        return count

    def close(self, step_id: int, released: list[int]) -> tuple[ExecutionPlan, StepInFlight]:
        """Turn the batch into a plan and the record that its result is held against."""
        requests = self.requests
        rows = [request.row for request in requests]
        plan = ExecutionPlan(step_id, rows, self.num_scheduled, self.samples, self.admits, self.new_blocks, released)
        if all(self.samples):
            return plan, StepInFlight(step_id, requests, rows, rows)
        sampling = [request for request, samples in zip(requests, self.samples, strict=True) if samples]
        return plan, StepInFlight(step_id, sampling, [request.row for request in sampling], rows)


def admitted_row(request: Request) -> AdmittedRow:
    """Describe an admitted request to the ranks. Lists are copied: the scheduler goes on changing its own."""
    source = request.source
    return AdmittedRow(
        row=request.row,
        generation=request.generation,
        request_id=request.request_id,
        token_ids=request.token_ids.copy(),
        num_prompt_tokens=request.num_prompt_tokens,
        num_computed_tokens=request.num_computed,
        block_ids=tuple(table.copy() for table in request.tables),
        params=source.params,
        seed=source.seed,
        stop_token_ids=source.stop_token_ids,
    )
