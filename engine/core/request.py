"""A request as the engine core sees it, and what it gives back: integers only, no text.

`EngineRequest` and `RequestOutput` cross the process border (msgpack); `Request` is the scheduler's own record.

Errors: `RequestRejected` (refused before admission: the request's own fault or a full queue, never the engine's).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from engine.core.sampling_params import SamplingParams


class RequestStatus(enum.IntEnum):
    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2
    FINISHED_STOP = 3
    FINISHED_LENGTH = 4
    FINISHED_ABORT = 5
    FINISHED_ERROR = 6

    @property
    def is_finished(self) -> bool:
        return self >= RequestStatus.FINISHED_STOP


class RequestRejected(Exception):
    """A request that never entered the queue. `code` is one word for programs, `message` one line for people.

    Codes: queue_full, too_long, never_fits, duplicate_id, empty_prompt, bad_token.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class FinishReason(enum.StrEnum):
    """Why a request ended; `stop` and `length` are the wire names of the OpenAI API."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to generate. A client's `n=k` becomes k of these (`params.n` is then ignored).

    Units: `arrival_time` is a monotonic second of the sender and only orders requests. `priority`: lower runs first.
    `seed` is always set (drawn by the sender when the client gave none). `stop_token_ids` holds eos and the client's
    stop ids; the engine finishes with STOP after emitting one of them (unless fewer than `min_tokens` were made).
    `max_tokens` is resolved: never above the room in the context. Requests of one `conversation` go to the same one of
    several engines, where their common prefix lies.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    seed: int
    stop_token_ids: tuple[int, ...] = ()
    priority: int = 0
    arrival_time: float = 0.0
    cache_salt: str = ""
    conversation: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural log) of one output position, of the distribution before temperature and filters.

    `top_ids`/`top_logprobs` hold the k most likely tokens, best first. -inf is clamped to -9999.0.
    """

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(slots=True)
class RequestOutput:
    """New tokens of one request after one step, and its end when it ended in this step."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None
    new_logprobs: list[TokenLogprobs] | None = None
    # Prompt tokens found in the prefix cache; set on the first output of a request.
    num_cached_tokens: int | None = None
    # Fixed sentence for FinishReason.ERROR, never a stack trace.
    error: str | None = None
    # The stop id that ended the request, if one did.
    stop_token_id: int | None = None


@dataclass(slots=True)
class SchedulerStats:
    """Gauges of the core at one moment, and counters since start."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_used_blocks: int = 0
    num_cached_blocks: int = 0
    num_preemptions: int = 0
    prefix_queries_tokens: int = 0
    prefix_hits_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_steps: int = 0


@dataclass(slots=True)
class StepOutputs:
    """What `advance` returns: request outputs in batch order."""

    outputs: list[RequestOutput] = field(default_factory=list)


class Request:
    """The scheduler's record of one request. Counts are tokens; a plain slotted class, because steps touch only ints.

    `token_ids` holds prompt and outputs whose ids are known. `num_tokens` counts them and the placeholders: tokens
    that a planned step samples and whose ids have not arrived. `num_computed` counts tokens whose KV a planned step
    has written or will write before any later plan runs.
    """

    __slots__ = (
        "block_contents",
        "block_hashes",
        "capacity",
        "end",
        "generation",
        "is_hashable",
        "min_end",
        "num_cached_tokens",
        "num_computed",
        "num_hashed_blocks",
        "num_prompt_tokens",
        "num_tokens",
        "order",
        "request_id",
        "row",
        "slow_append_from",
        "source",
        "status",
        "steady_until",
        "stop_token_ids",
        "tables",
        "token_ids",
        "window_starts",
    )

    def __init__(self, source: EngineRequest, end: int, order: tuple[float, ...]) -> None:
        self.source = source
        self.request_id = source.request_id
        self.token_ids = list(source.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_tokens = self.num_prompt_tokens
        self.num_computed = 0
        # The token count that ends the request (max_tokens or context), and the one below which no stop id ends it.
        self.end = end
        self.min_end = self.num_prompt_tokens + source.params.min_tokens
        self.stop_token_ids = frozenset(source.stop_token_ids)
        # Sorts the waiting queue and picks victims: smallest first, largest preempted.
        self.order = order
        self.status = RequestStatus.WAITING
        self.row = -1
        self.generation = 0
        # Steady decode: while num_computed is below this, a step needs no block and does not reach the end.
        self.steady_until = -1
        # A token that makes the list longer than this may end the request, or is its first: look closely.
        self.slow_append_from = 0
        self.tables: tuple[list[int], ...] = ()
        # Positions that `tables` cover, and per group the first table entry that is not yet null.
        self.capacity = 0
        self.window_starts: list[int] = []
        self.num_hashed_blocks = 0
        self.is_hashable = True
        self.block_hashes: list[bytes] = []
        self.block_contents: list[bytes] = []
        # Prompt tokens found in the prefix cache at the first admission; None before it and after it was reported.
        self.num_cached_tokens: int | None = None
