"""A worker that models what is in the KV cache, and the loop around it.

The model's next token is a function of the exact prefix alone. The cache holds, for every slot of every block, which
prefix its KV belongs to; a row that attends to anything but its own prefix fails the test at once.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.config import SchedulerConfig
from engine.core.plan import FLAG_NAN, AdmittedRow, ExecutionPlan, StepResult
from engine.core.request import EngineRequest, FinishReason, RequestOutput
from engine.core.sampling_params import SamplingParams
from engine.core.scheduler import Scheduler

VOCAB_SIZE = 11
MODULUS = (1 << 61) - 1


def extend_prefix(prefix: int, token: int) -> int:
    """Name the prefix that is one token longer."""
    return (prefix * 1_000_003 + token + 7) % MODULUS


def next_token(prefix: int, banned: Sequence[int]) -> int:
    """The model: the token after a prefix, never one of `banned` (as long as that leaves any)."""
    token = (prefix // 97) % VOCAB_SIZE
    while token in banned and len(set(banned)) < VOCAB_SIZE:
        token = (token + 1) % VOCAB_SIZE
    return token


def expected_output(request: EngineRequest, max_model_len: int) -> tuple[list[int], FinishReason]:
    """What a request must yield, whatever else runs."""
    prefix = 0
    for token in request.prompt_token_ids:
        prefix = extend_prefix(prefix, token)
    output: list[int] = []
    room = min(request.max_tokens, max_model_len - len(request.prompt_token_ids))
    while len(output) < room:
        banned = request.stop_token_ids if len(output) < request.params.min_tokens else ()
        token = next_token(prefix, banned)
        output.append(token)
        if token in request.stop_token_ids and len(output) >= request.params.min_tokens:
            return output, FinishReason.STOP
        prefix = extend_prefix(prefix, token)
    return output, FinishReason.LENGTH


@dataclass
class FakeRow:
    """One row as a worker keeps it: tokens, the name of each prefix, tables."""

    admitted: AdmittedRow
    tokens: list[int]
    prefixes: list[int]
    computed: int
    tables: list[list[int]]
    salt: str

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.prefixes.append(extend_prefix(self.prefixes[-1] if self.prefixes else 0, token))


@dataclass
class FakeWorker:
    """Executes plans in order on a KV cache that remembers whose prefix each slot holds."""

    num_blocks: int
    block_size: int
    windows: tuple[int | None, ...]
    max_num_seqs: int
    salts: dict[str, str] = field(default_factory=dict)
    rows: dict[int, FakeRow] = field(default_factory=dict)
    generations: dict[int, int] = field(default_factory=dict)
    cache: dict[tuple[int, int], tuple[int, int, str]] = field(default_factory=dict)
    poisoned: set[str] = field(default_factory=set)
    num_computed_tokens: int = 0

    def execute(self, plan: ExecutionPlan) -> StepResult:
        for row in plan.released:
            del self.rows[row]
        for admitted in plan.admits:
            self._admit(admitted)
        for row, group, blocks in plan.new_blocks:
            self.rows[row].tables[group] += blocks
        assert len(plan.rows) == len(set(plan.rows)) == len(plan.num_scheduled) == len(plan.samples)
        # What a row reads from before this step must be there before anyone writes in this step, and still be after.
        for row in plan.rows:
            self._attend(self.rows[row], self.rows[row].computed, 0)
        for row, count in zip(plan.rows, plan.num_scheduled, strict=True):
            self._write(self.rows[row], count)
        for row, count in zip(plan.rows, plan.num_scheduled, strict=True):
            self._attend(self.rows[row], self.rows[row].computed, count)
        result = StepResult(plan.step_id, [], [], [])
        for row, count, samples in zip(plan.rows, plan.num_scheduled, plan.samples, strict=True):
            state = self.rows[row]
            state.computed += count
            self.num_computed_tokens += count
            assert samples == (state.computed == len(state.tokens))
            if samples:
                self._sample(row, state, result)
        return result

    def _admit(self, admitted: AdmittedRow) -> None:
        assert admitted.row not in self.rows
        assert 0 <= admitted.row < self.max_num_seqs
        assert admitted.generation == self.generations.get(admitted.row, 0) + 1
        self.generations[admitted.row] = admitted.generation
        state = FakeRow(
            admitted,
            [],
            [],
            admitted.num_computed_tokens,
            [list(ids) for ids in admitted.block_ids],
            self.salts.get(admitted.request_id, ""),
        )
        for token in admitted.token_ids:
            state.append(token)
        assert admitted.num_computed_tokens < len(admitted.token_ids)
        self.rows[admitted.row] = state

    def _write(self, row: FakeRow, count: int) -> None:
        for position in range(row.computed, row.computed + count):
            for group, table in enumerate(row.tables):
                block = table[position // self.block_size]
                assert 0 < block < self.num_blocks
                self.cache[block, position % self.block_size] = (group, row.prefixes[position], row.salt)

    def _attend(self, row: FakeRow, computed: int, count: int) -> None:
        for group, (table, window) in enumerate(zip(row.tables, self.windows, strict=True)):
            first = 0 if window is None else max(0, computed - window + 1)
            for position in range(first, computed + count):
                found = self.cache.get((table[position // self.block_size], position % self.block_size))
                assert found == (group, row.prefixes[position], row.salt), (
                    f"{row.admitted.request_id} group {group} position {position}: attends to {found}"
                )

    def _sample(self, row: int, state: FakeRow, result: StepResult) -> None:
        admitted = state.admitted
        num_output = len(state.tokens) - admitted.num_prompt_tokens
        banned = admitted.stop_token_ids if num_output < admitted.params.min_tokens else ()
        token = next_token(state.prefixes[-1], banned)
        state.append(token)
        result.rows.append(row)
        result.token_ids.append(token)
        result.flags.append(FLAG_NAN if admitted.request_id in self.poisoned else 0)


class Loop:
    """Scheduler and fake worker joined: `depth` plans may be in flight (1 plain, 2 overlapped)."""

    def __init__(
        self,
        config: SchedulerConfig | None = None,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        windows: tuple[int | None, ...] = (8, None),
        max_model_len: int = 64,
        depth: int = 1,
        **limits: Any,
    ) -> None:
        self.config = config or SchedulerConfig(**limits)
        self.max_model_len = max_model_len
        self.depth = depth
        self.scheduler = Scheduler(
            self.config,
            num_blocks=num_blocks,
            block_size=block_size,
            group_windows=windows,
            max_model_len=max_model_len,
            hash_seed=b"test",
        )
        self.worker = FakeWorker(num_blocks, block_size, windows, self.config.max_num_seqs)
        self.num_preemptions = 0
        self.plans: list[ExecutionPlan] = []
        self.in_flight: deque[StepResult] = deque()
        self.requests: dict[str, EngineRequest] = {}
        self.outputs: dict[str, list[RequestOutput]] = {}

    def add(self, request: EngineRequest) -> EngineRequest:
        output = self.scheduler.add(request)
        self.requests[request.request_id] = request
        self.outputs[request.request_id] = [] if output is None else [output]
        self.worker.salts[request.request_id] = request.cache_salt
        return request

    def step(self) -> list[RequestOutput]:
        plan = self.scheduler.plan(0.0)
        if plan is not None:
            self.check_plan(plan)
            self.plans.append(plan)
            self.in_flight.append(self.worker.execute(plan))
        outputs: list[RequestOutput] = []
        if len(self.in_flight) >= self.depth or (plan is None and self.in_flight):
            outputs = self.collect()
        elif plan is None:
            assert not self.scheduler.has_unfinished, "nothing planned, nothing in flight, and requests are left"
        self.scheduler.check_integrity()
        return outputs

    def collect(self) -> list[RequestOutput]:
        outputs = self.scheduler.advance(self.in_flight.popleft())
        for output in outputs:
            self.outputs[output.request_id].append(output)
        assert self.scheduler.num_in_flight == len(self.in_flight)
        return outputs

    def check_plan(self, plan: ExecutionPlan) -> None:
        assert 0 < plan.num_tokens <= self.config.max_num_batched_tokens
        assert len(plan.rows) <= self.config.max_num_seqs
        assert min(plan.num_scheduled) > 0
        num_preemptions = self.scheduler.stats().num_preemptions
        if plan.num_tokens < self.config.max_num_batched_tokens and num_preemptions == self.num_preemptions:
            # Budget is left: nobody who runs was left out or cut short. (A victim may give its budget back too late.)
            assert set(plan.rows) == {request.row for request in self.scheduler._running}
            assert all(plan.samples) or self.config.long_prefill_limit
        self.num_preemptions = num_preemptions

    def run(self, max_steps: int = 2000) -> None:
        """Step until nothing is left."""
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished and not self.in_flight:
                return
            self.step()
        raise AssertionError(f"not done after {max_steps} steps: {self.scheduler.stats()}")

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.new_token_ids]

    def reason(self, request_id: str) -> FinishReason | None:
        outputs = self.outputs[request_id]
        assert all(output.finish_reason is None for output in outputs[:-1]), "outputs after the end"
        return outputs[-1].finish_reason if outputs else None

    def check_outputs(self, unfinished: Sequence[str] = ()) -> None:
        """Hold every request's output against the reference; those in `unfinished` may have ended early."""
        for request_id, request in self.requests.items():
            tokens, reason = expected_output(request, self.max_model_len)
            found = self.tokens(request_id)
            assert all(output.num_cached_tokens is None for output in self.outputs[request_id][1:])
            if request_id in unfinished:
                assert found == tokens[: len(found)], request_id
                assert self.reason(request_id) in (None, FinishReason.ERROR, reason)
            else:
                assert (found, self.reason(request_id)) == (tokens, reason), request_id

    def check_idle(self) -> None:
        """Nothing is held when nothing runs."""
        self.scheduler.check_integrity()
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
        assert self.scheduler.num_in_flight == 0


def make_request(
    request_id: str,
    prompt: Sequence[int],
    max_tokens: int = 4,
    *,
    stop: tuple[int, ...] = (),
    min_tokens: int = 0,
    priority: int = 0,
    arrival: float = 0.0,
    salt: str = "",
) -> EngineRequest:
    """A request in the fewest words."""
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        params=SamplingParams(max_tokens=max(max_tokens, min_tokens), min_tokens=min_tokens),
        max_tokens=max_tokens,
        seed=0,
        stop_token_ids=stop,
        priority=priority,
        arrival_time=arrival,
        cache_salt=salt,
    )


def drawn_request(rng: random.Random, texts: Sequence[Sequence[int]], number: int) -> EngineRequest:
    """Draw a request of a random workload: a beginning of one of `texts`, a few tokens of its own, any options."""
    prompt = [*rng.choice(texts)[: rng.randint(0, 24)], *(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 3)))]
    return make_request(
        f"r{number}",
        prompt,
        rng.randint(6, 24),
        stop=rng.choice([(), (), (1,)]),
        min_tokens=rng.choice([0, 0, 1]),
        priority=rng.randint(0, 2),
        arrival=float(number),
        salt=rng.choice(["", "", "a"]),
    )
