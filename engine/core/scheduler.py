"""Who computes how many tokens in the next step, and what the step's results mean.

There is no prefill phase and no decode phase: each request has computed tokens and tokens, and every step spends one
budget so that the first catch up with the second. Chunked prefill, prefix hits, decode, recompute after preemption
all follow from that.

Plans may run ahead of results: a row that samples gets a placeholder, counted in `num_tokens` although its id is
unknown, and the next plan is made at once. Ranks run plans in order, so blocks freed by one plan may be reused by it.

Knows: token ids, rows, block ids, counts. Refuses to know: text, devices, clocks (`now` is an argument), transport.
Errors: `RequestRejected` from `add`; `SchedulerError` when a result does not belong to the oldest plan in flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from engine.config import ConfigError, SchedulerConfig
from engine.core.batch import Batch, StepInFlight, admitted_row
from engine.core.integrity import IntegrityError, check_pool, check_requests, check_tables
from engine.core.kv_cache import KVCache
from engine.core.plan import FLAG_NAN, ExecutionPlan, StepResult
from engine.core.request import (
    EngineRequest,
    FinishReason,
    Request,
    RequestOutput,
    RequestRejected,
    RequestStatus,
    SchedulerStats,
    TokenLogprobs,
)
from engine.core.rows import RowTable
from engine.core.waiting import WaitingQueue, order_of

__all__ = ["RequestRejected", "Scheduler", "SchedulerError"]

MAX_TOKEN_ID = 2**31 - 1
NAN_MESSAGE = "the model produced logits that are not finite"

_FINISHED = {
    FinishReason.STOP: RequestStatus.FINISHED_STOP,
    FinishReason.LENGTH: RequestStatus.FINISHED_LENGTH,
    FinishReason.ABORT: RequestStatus.FINISHED_ABORT,
    FinishReason.ERROR: RequestStatus.FINISHED_ERROR,
}


class SchedulerError(Exception):
    """The caller broke the order of plans and results."""


class Scheduler:
    """One token budget per step, running requests first, preemption by recompute.

    `num_blocks` counts the null block. `group_windows[g]` is the window of KV group g in tokens, None for full
    attention. `hash_seed` is secret and keys the prefix cache. With several pipeline stages as many plans are in
    flight, and a row samples in one of them at a time: the first stage learns of its token with a later plan.

    Raises: ConfigError when no request could ever be scheduled under these limits.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        num_blocks: int,
        block_size: int,
        group_windows: tuple[int | None, ...],
        max_model_len: int,
        hash_seed: bytes,
        num_stages: int = 1,
    ) -> None:
        if not config.enable_chunked_prefill and config.max_num_batched_tokens < max_model_len:
            raise ConfigError(
                "scheduler.max_num_batched_tokens",
                f"{config.max_num_batched_tokens} is below max_model_len {max_model_len}, and prefill is not chunked",
                "raise max-num-batched-tokens, lower max-model-len, or enable chunked prefill",
            )
        self._config = config
        self._num_stages = num_stages
        self._max_model_len = max_model_len
        self._kv = KVCache(
            num_blocks=num_blocks,
            block_size=block_size,
            windows=group_windows,
            prefix_seed=hash_seed if config.enable_prefix_caching else None,
        )
        self._watermark = num_blocks // 100
        num_full_groups = group_windows.count(None) or len(group_windows)
        kv_tokens = max(max_model_len, (num_blocks - 1) * block_size // num_full_groups)
        self._requests: dict[str, Request] = {}
        self._waiting = WaitingQueue(config, kv_tokens)
        # In admission order. Under fcfs that is also `order`, since the head of the queue is always admitted first.
        self._running: list[Request] = []
        # Rows whose last token is in flight: nothing is left to plan for them.
        self._ending: list[Request] = []
        self._in_flight: deque[StepInFlight] = deque()
        self._rows = RowTable(config.max_num_seqs)
        # The head of the queue and the free blocks when admission last failed for want of blocks.
        self._misfit: tuple[Request, int] | None = None
        self._next_step_id = 0
        self._stats = SchedulerStats(num_blocks=num_blocks)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    @property
    def num_in_flight(self) -> int:
        """Plans made whose results have not arrived."""
        return len(self._in_flight)

    def stats(self) -> SchedulerStats:
        """Copy the gauges and counters."""
        stats = self._stats
        pool = self._kv.pool
        return SchedulerStats(
            num_running=len(self._requests) - len(self._waiting.requests),
            num_waiting=len(self._waiting.requests),
            num_blocks=stats.num_blocks,
            num_used_blocks=pool.num_used,
            num_cached_blocks=pool.num_cached,
            num_preemptions=stats.num_preemptions,
            prefix_queries_tokens=stats.prefix_queries_tokens,
            prefix_hits_tokens=stats.prefix_hits_tokens,
            prompt_tokens=stats.prompt_tokens,
            generation_tokens=stats.generation_tokens,
            num_steps=self._next_step_id,
        )

    def can_queue(self, num_prompt_tokens: int) -> bool:
        """Whether a prompt of that many tokens would be queued now. An idle queue takes any prompt."""
        return self._waiting.can_take(num_prompt_tokens)

    def add(self, request: EngineRequest) -> RequestOutput | None:
        """Queue a request. Returns its only output when it ends at once (`max_tokens` 0), else None.

        Raises: RequestRejected, naming the reason; nothing of the request is kept then.
        """
        prompt = request.prompt_token_ids
        max_tokens = max(0, request.max_tokens)
        if request.request_id in self._requests:
            raise RequestRejected("duplicate_id", f"request id {request.request_id!r} is already in use")
        if not prompt:
            raise RequestRejected("empty_prompt", "the prompt has no tokens")
        if min(prompt) < 0 or max(prompt) > MAX_TOKEN_ID:
            raise RequestRejected("bad_token", f"token ids must be between 0 and {MAX_TOKEN_ID}")
        if len(prompt) + min(1, max_tokens) > self._max_model_len:
            raise RequestRejected(
                "too_long", f"a prompt of {len(prompt)} tokens leaves no room in a context of {self._max_model_len}"
            )
        if not max_tokens:
            return RequestOutput(request.request_id, [], FinishReason.LENGTH, num_cached_tokens=0)
        end = min(len(prompt) + max_tokens, self._max_model_len)
        # The last sampled token is never computed.
        needed = sum(self._kv.peak_blocks(end - 1, min(end - 1, self._config.max_num_batched_tokens)))
        if needed > self._kv.pool.num_blocks - 1:
            raise RequestRejected(
                "never_fits",
                f"{end} tokens need {needed} KV blocks, the pool has {self._kv.pool.num_blocks - 1}",
            )
        waiting = self._waiting
        if not waiting.can_take(len(prompt)):
            raise RequestRejected(
                "queue_full", f"{len(waiting.requests)} requests of {waiting.num_tokens} tokens are waiting already"
            )
        self._requests[request.request_id] = record = Request(request, end, waiting.next_order(request))
        waiting.push(record)
        return None

    def abort(self, request_id: str) -> bool:
        """End a request in any state and free what it holds; False when there is no such request.

        Tokens of it that are in flight are dropped when they arrive. Yields no output.
        """
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._finish(request, FinishReason.ABORT)
        return True

    def fail(self, request_ids: Iterable[str], message: str) -> list[RequestOutput]:
        """End requests by a fault that is not theirs to hear about in detail: `message` is a fixed sentence.

        Nothing that they computed stays findable. Unknown ids are passed over.
        """
        outputs = []
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                self._finish(request, FinishReason.ERROR)
                self._kv.forget(request)
                outputs.append(RequestOutput(request_id, [], FinishReason.ERROR, error=message))
        return outputs

    def reset_prefix_cache(self) -> None:
        """Forget all prefixes, those in use included: nothing computed before is found again."""
        self._kv.reset_prefix_cache(list(self._requests.values()))

    def check_integrity(self) -> None:
        """Check every invariant of requests, rows, tables and blocks; at idle, that nothing is held.

        Raises: IntegrityError, naming what disagrees.
        """
        requests = list(self._requests.values())
        check_requests(requests, self._running, self._waiting.requests)
        check_tables(self._kv, requests)
        check_pool(self._kv.pool)
        rows = self._rows.idle_rows() + [request.row for request in self._running]
        if sorted(rows) != list(range(self._config.max_num_seqs)):
            raise IntegrityError(f"rows are lost or doubled: {sorted(rows)}")
        if self._waiting.num_tokens != sum(request.num_prompt_tokens for request in self._waiting.requests):
            raise IntegrityError(f"{self._waiting.num_tokens} queued tokens are not those of the queue")
        if not requests and self._kv.pool.num_used:
            raise IntegrityError(f"{self._kv.pool.num_used} blocks are used by nobody")

    def plan(self, now: float) -> ExecutionPlan | None:
        """Decide the next step; None when there is nothing to run or all rows wait for results in flight.

        Blocks never. `now` is a monotonic second of the caller; no rule depends on it yet.
        """
        for request in self._ending:
            if request.status == RequestStatus.RUNNING and request.row >= 0:
                self._release(request)
        self._ending.clear()
        batch = Batch()
        budget, outstanding = self._plan_running(batch)
        if outstanding >= 0 and budget and self._waiting.requests:
            self._plan_waiting(batch, budget, outstanding)
        return self._commit(batch) if batch.requests else None

    def advance(self, result: StepResult) -> list[RequestOutput]:
        """Take the result of the oldest plan in flight: append tokens, end requests. Outputs are in batch order.

        Raises: SchedulerError when the result belongs to another plan.
        """
        step = self._in_flight[0] if self._in_flight else None
        if step is None or step.step_id != result.step_id or step.sampling_rows != result.rows:
            expected = "none" if step is None else f"step {step.step_id} rows {step.sampling_rows}"
            raise SchedulerError(f"result of step {result.step_id} rows {result.rows}, expected {expected}")
        self._in_flight.popleft()
        self._rows.arrived(step.step_id)
        outputs: list[RequestOutput] = []
        if result.logprobs is not None or any(result.flags):
            logprobs = result.logprobs or [None] * len(result.rows)
            for request, token, flags, logprob in zip(
                step.sampling, result.token_ids, result.flags, logprobs, strict=True
            ):
                self._append(request, token, flags, logprob, outputs)
        else:
            num_slow = 0
            add_output = outputs.append
            for request, token in zip(step.sampling, result.token_ids, strict=True):
                token_ids = request.token_ids
                if len(token_ids) >= request.slow_append_from or token in request.stop_token_ids:
                    num_slow += 1
                    self._append(request, token, 0, None, outputs)
                else:
                    token_ids.append(token)
                    add_output(RequestOutput(request.request_id, [token]))
            self._stats.generation_tokens += len(step.sampling) - num_slow
        return outputs

    def _plan_running(self, batch: Batch) -> tuple[int, int]:
        """Schedule running rows in admission order.

        Returns the budget left, and the blocks that unfinished prefills still lack, or -1 when a row was preempted.
        """
        config = self._config
        budget = config.max_num_batched_tokens
        limit = self._prefill_limit()
        outstanding = 0
        has_preempted = False
        add_request = batch.requests.append
        add_num_scheduled = batch.num_scheduled.append
        add_samples = batch.samples.append
        # With stages, the rows are dealt out evenly over the plans in flight.
        num_stages = self._num_stages
        share = -(-len(self._running) // num_stages)
        # A copy, because preemption takes rows out.
        for request in self._running.copy():
            if not budget:
                break
            computed = request.num_computed
            if num_stages > 1:
                if len(batch.requests) >= share:
                    break
                if request.num_tokens != len(request.token_ids):
                    continue  # its last token is in flight
            if computed < request.steady_until:
                request.num_computed = computed + 1
                request.num_tokens = computed + 2
                budget -= 1
                add_request(request)
                add_num_scheduled(1)
                add_samples(True)
                continue
            if request.row < 0:
                continue
            count = min(request.num_tokens - computed, budget, limit)
            blocks = self._kv.extend(request, computed + count)
            while blocks is None:
                has_preempted = True
                victim = self._running[-1] if config.policy == "fcfs" else max(self._running, key=order_of)
                budget += self._preempt(victim, batch)
                if victim is request:
                    break
                blocks = self._kv.extend(request, computed + count)
            if blocks is None:
                continue
            for group, ids in enumerate(blocks):
                batch.new_blocks.append((request.row, group, ids))
            budget -= count
            if self._schedule(request, count, batch):
                continue
            outstanding += self._kv.outstanding_blocks(request, self._chunk(request))
        return budget, -1 if has_preempted else outstanding

    def _plan_waiting(self, batch: Batch, budget: int, outstanding: int) -> None:
        """Admit from the head of the queue while rows, budget and blocks last. The first misfit ends admission."""
        kv = self._kv
        limit = self._prefill_limit()
        while self._waiting.requests and budget and self._rows.has_free:
            request = self._waiting.requests[0]
            if request.num_tokens != len(request.token_ids):
                return  # preempted with a step in flight: its last token is not known yet
            if self._misfit is not None and self._misfit[0] is request and kv.pool.num_free <= self._misfit[1]:
                return
            num_prefix_blocks, prefix = kv.find_prefix(request)
            num_prefix_tokens = num_prefix_blocks * kv.block_size
            count = min(request.num_tokens - num_prefix_tokens, budget, limit)
            if not self._config.enable_chunked_prefill and num_prefix_tokens + count < request.num_tokens:
                return
            chunk = min(request.num_tokens - num_prefix_tokens, self._config.max_num_batched_tokens)
            needed = kv.blocks_to_admit(request, prefix, chunk)
            # Alone it always fits (`add` saw to that); beside others it leaves them room for their next tokens.
            reserve = outstanding + max(self._watermark, len(self._running)) if self._running else 0
            if needed + reserve > kv.pool.num_free:
                self._misfit = (request, kv.pool.num_free)
                return
            self._waiting.remove(request)
            kv.admit(request, prefix, num_prefix_blocks)
            if kv.extend(request, num_prefix_tokens + count) is None:
                raise SchedulerError(f"request {request.request_id!r} passed the gate but its first chunk does not fit")
            self._enter(request, num_prefix_tokens)
            batch.admits.append(admitted_row(request))
            budget -= count
            if not self._schedule(request, count, batch):
                outstanding += kv.outstanding_blocks(request, self._chunk(request))

    def _enter(self, request: Request, num_prefix_tokens: int) -> None:
        """Give a request its row; its first time also settles what its client is told of the cache."""
        request.row, request.generation = self._rows.take()
        if request.status == RequestStatus.WAITING:
            request.num_cached_tokens = num_prefix_tokens
            self._stats.prompt_tokens += request.num_prompt_tokens
            if self._config.enable_prefix_caching:
                self._stats.prefix_queries_tokens += request.num_prompt_tokens
                self._stats.prefix_hits_tokens += num_prefix_tokens
        request.status = RequestStatus.RUNNING
        self._running.append(request)

    def _schedule(self, request: Request, count: int, batch: Batch) -> bool:
        """Enter a row whose blocks are there; True when it samples, that is when it catches up with its tokens."""
        computed = request.num_computed + count
        request.num_computed = computed
        samples = computed == request.num_tokens
        batch.requests.append(request)
        batch.num_scheduled.append(count)
        batch.samples.append(samples)
        if count > 1:
            batch.chunks.append(request)
        if samples:
            request.num_tokens = computed + 1
            if computed + 1 >= request.end:
                request.steady_until = -1
                self._ending.append(request)
            elif count > 1:
                request.steady_until = -1  # look once more: the window may have passed most of the chunk
            else:
                request.steady_until = min(request.capacity, request.end - 2)
        return samples

    def _preempt(self, victim: Request, batch: Batch) -> int:
        """Take a running row's blocks back and queue it again; returns the budget it gives back."""
        # Under priority the victim may have been scheduled earlier in this very plan.
        budget = batch.undo(victim)
        self._release(victim)
        victim.status = RequestStatus.PREEMPTED
        self._stats.num_preemptions += 1
        self._waiting.push(victim)
        return budget

    def _commit(self, batch: Batch) -> ExecutionPlan:
        """Send the batch off."""
        plan, step = batch.close(self._next_step_id, self._rows.announce())
        self._next_step_id += 1
        self._in_flight.append(step)
        # Chunks become findable by the next plan, not by rows of this one, which would read while they are written.
        for request in batch.chunks:
            self._kv.register(request)
            self._misfit = None  # the head of the queue may share what was just computed
        return plan

    def _append(
        self,
        request: Request,
        token: int,
        flags: int,
        logprob: TokenLogprobs | None,
        outputs: list[RequestOutput],
    ) -> None:
        """Append one sampled token with all that may follow from it. Tokens of finished requests are dropped."""
        if request.status >= RequestStatus.FINISHED_STOP:
            return
        if flags & FLAG_NAN:
            outputs += self.fail((request.request_id,), NAN_MESSAGE)
            return
        self._stats.generation_tokens += 1
        request.token_ids.append(token)
        request.slow_append_from = request.end - 1
        output = RequestOutput(request.request_id, [token], num_cached_tokens=request.num_cached_tokens)
        request.num_cached_tokens = None
        if logprob is not None:
            output.new_logprobs = [logprob]
        outputs.append(output)
        length = len(request.token_ids)
        if token in request.stop_token_ids and length >= request.min_end:
            output.finish_reason = FinishReason.STOP
            output.stop_token_id = token
        elif length >= request.end:
            output.finish_reason = FinishReason.LENGTH
        if output.finish_reason is not None:
            self._finish(request, output.finish_reason)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.status != RequestStatus.RUNNING:
            self._waiting.remove(request)
        elif request.row >= 0:
            self._release(request)
        request.status = _FINISHED[reason]
        # Tokens still in flight must find out that it ended.
        request.slow_append_from = 0
        del self._requests[request.request_id]

    def _release(self, request: Request) -> None:
        """Take row and blocks from a running request. The row is reused once no step in flight has it."""
        self._running.remove(request)
        self._kv.release(request)
        last_step = None
        for step in self._in_flight:
            if request.row in step.rows:
                last_step = step.step_id
        self._rows.release(request.row, last_step)
        request.row = -1
        request.steady_until = -1

    def _prefill_limit(self) -> int:
        """Most tokens one row may take in a step; unbounded when it is alone, and when prefill is not chunked."""
        config = self._config
        if config.long_prefill_limit and config.enable_chunked_prefill and len(self._requests) > 1:
            return config.long_prefill_limit
        return config.max_num_batched_tokens

    def _chunk(self, request: Request) -> int:
        return min(request.num_tokens - request.num_computed, self._config.max_num_batched_tokens)
