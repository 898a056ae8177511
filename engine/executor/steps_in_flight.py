"""Steps that went to ranks and have not come back: their order, their deadlines, and what the next plan has to tell.

Knows: the wire form of plans and results. Refuses to know: how they travel, what a late one means.
"""

from __future__ import annotations

import time
from collections import deque

from engine.core.plan import ExecutionPlan, StepResult
from engine.executor.messages import PlanEncoder, SampledTokens, decode_result, pack_ints


class StepsInFlight:
    """`encode` a plan, send it, `add` it; then `oldest` says what to wait for, and `finish` takes its result."""

    def __init__(self, *, timeout_seconds: float, has_stages: bool) -> None:
        self._timeout = timeout_seconds
        self._has_stages = has_stages
        self._encoder = PlanEncoder()
        self._steps: deque[tuple[ExecutionPlan, float]] = deque()
        self._sampled: tuple[list[int], list[int]] = ([], [])
        self._finished_at = 0.0

    def __len__(self) -> int:
        return len(self._steps)

    def encode(self, plan: ExecutionPlan) -> bytes:
        """Write the next plan as a difference, with the tokens that ranks before the last stage have not seen."""
        rows, tokens = self._sampled
        sampled = None
        if rows:
            sampled = SampledTokens(pack_ints(rows), pack_ints(tokens))
            self._sampled = ([], [])
        return self._encoder.encode(plan, sampled)

    def add(self, plan: ExecutionPlan) -> None:
        """Note that a plan was sent."""
        self._steps.append((plan, time.monotonic()))

    def oldest(self) -> tuple[int, float]:
        """Give the step whose result is due next, and its deadline on the monotonic clock."""
        plan, sent_at = self._steps[0]
        return plan.step_id, max(sent_at, self._finished_at) + self._timeout

    def postpone(self, seconds: float) -> None:
        """Move all deadlines: time has passed in which nobody could do anything."""
        self._steps = deque((plan, sent_at + seconds) for plan, sent_at in self._steps)
        self._finished_at += seconds

    def finish(self, body: bytes) -> StepResult:
        """Take the oldest step's result from its wire form."""
        result = decode_result(body)
        self._steps.popleft()
        self._finished_at = time.monotonic()
        if self._has_stages:
            # Stages before the last did not see what was sampled: they are told with the next plan.
            self._sampled[0].extend(result.rows)
            self._sampled[1].extend(result.token_ids)
        return result

    def clear(self) -> None:
        """Forget all steps: nobody will answer."""
        self._steps.clear()
