"""What the scheduler tells the workers, and what they answer.

A plan is a delta: workers keep the state of each row (token ids, computed count, block tables, sampling options).
The order of `rows` is the batch order everywhere; no set ever feeds it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.core.request import TokenLogprobs
from engine.core.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class AdmittedRow:
    """A request that takes a row in this step, with everything a worker needs to know of it.

    `token_ids` holds prompt and, after a preemption, the outputs made so far; the first `num_prompt_tokens` are prompt.
    `block_ids[g]` are the blocks of KV group g covering positions from 0; block 0 is the null block.
    `num_computed_tokens` tokens are already in those blocks (prefix hit).
    """

    row: int
    generation: int
    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: tuple[list[int], ...]
    params: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...]


@dataclass(slots=True)
class ExecutionPlan:
    """One step. For each i: row `rows[i]` computes its next `num_scheduled[i]` tokens; `samples[i]` says whether the
    last of them yields a sampled token. A row's positions follow from the worker's own computed count.

    Order for the worker: drop `released` rows, admit `admits`, append `new_blocks` (row, group, block ids), run.
    The sampled token is appended to the row by the worker itself, so that a following plan can be made before the
    sampled id is known to the scheduler.
    """

    step_id: int
    rows: list[int]
    num_scheduled: list[int]
    samples: list[bool]
    admits: list[AdmittedRow] = field(default_factory=list)
    new_blocks: list[tuple[int, int, list[int]]] = field(default_factory=list)
    released: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(self.num_scheduled)


# Bits of StepResult.flags
FLAG_NAN = 1


@dataclass(slots=True)
class StepResult:
    """Sampled tokens of one step, for the rows that sampled, in batch order.

    `flags[i] & FLAG_NAN` marks a row whose logits were not finite; its token is meaningless.
    `logprobs[i]` is None unless the row's params ask for them (then `logprobs` is not None).
    """

    step_id: int
    rows: list[int]
    token_ids: list[int]
    flags: list[int]
    logprobs: list[TokenLogprobs | None] | None = None
    device_seconds: float = 0.0
