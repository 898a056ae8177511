"""One HTTP request's sequences in the engine, from submission to the last output or the first reason to stop.

Knows streams, interruption (client left, wall time, drain) and what is measured. Refuses to know text and dialects:
it yields `(index, RequestOutput)` and maps the engine's ends to API errors.

Whatever happens, every sequence that has not finished is aborted when the block is left, which frees its KV blocks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

from engine.async_engine import EngineUnavailable, RequestStream
from engine.core.request import EngineRequest, FinishReason, RequestOutput
from engine.server import errors
from engine.server.errors import ApiError, ClientDisconnected
from engine.server.http import Exchange
from engine.server.metrics import EngineMetrics

if TYPE_CHECKING:
    from engine.server.app import App


class Generation:
    """Runs `requests` for one exchange; an async context manager around the work of one task.

    Interrupting cancels that task and turns the cancellation into the error that explains it.
    """

    def __init__(self, app: App, exchange: Exchange, requests: Sequence[EngineRequest]) -> None:
        self._app = app
        self._exchange = exchange
        # Different keys share no cached blocks: the time to a first token must not tell what another key has asked.
        salt = f"{exchange.tenant}/" if exchange.tenant else ""
        self._requests = [_of_tenant(item, salt) for item in requests] if salt else requests
        self._streams: dict[int, RequestStream] = {}
        self._metrics: dict[int, EngineMetrics] = {}
        self._task: asyncio.Task[object] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._pumps: list[asyncio.Task[None]] = []
        self._deadline: asyncio.TimerHandle | None = None
        self._is_interrupted = False
        self._is_closed = False
        self._error: ApiError | None = None
        self._first_at: list[float] = [0.0] * len(requests)
        self._last_at: list[float] = [0.0] * len(requests)
        self._num_tokens: list[int] = [0] * len(requests)

    async def __aenter__(self) -> Generation:
        """Submit every sequence and begin to watch the client and the clock.

        Raises: ApiError 503/500 when the engine takes no request.
        """
        seconds = self._app.config.server.request_timeout_seconds
        self._task = asyncio.current_task()
        metrics = self._app.metrics
        if self._app.lifecycle.is_draining:
            # The drain began while the body was read or tokenized.
            raise errors.draining()
        try:
            for index, request in enumerate(self._requests):
                self._streams[index] = stream = self._app.engine.submit(request)
                self._metrics[index] = of_engine = metrics.of_engine(stream.engine)
                of_engine.num_prompt_tokens += len(request.prompt_token_ids)
                of_engine.prompt_tokens.observe(len(request.prompt_token_ids))
        except EngineUnavailable as error:
            self._abort_all()
            metrics.count_refusal(error.code)
            raise errors.unavailable(error.code) from None
        except BaseException:
            self._abort_all()
            raise
        # Options of the whole request, whose sequences may be several engines': the first one's.
        first = self._requests[0]
        self._metrics[0].params_n.observe(first.params.n)
        self._metrics[0].params_max_tokens.observe(first.max_tokens)
        metrics.prepare_seconds.observe(time.monotonic() - self._exchange.started_at)
        self._app.lifecycle.enter(self)
        self._watcher = asyncio.create_task(self._watch_client())
        self._deadline = asyncio.get_running_loop().call_later(
            seconds, self.interrupt, errors.generation_timeout(seconds)
        )
        return self

    async def __aexit__(
        self, type_: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_closed = True
        self._abort_all()
        for task in (self._watcher, *self._pumps):
            if task is not None:
                task.cancel()
        if self._deadline is not None:
            self._deadline.cancel()
        self._app.lifecycle.leave(self)
        if not self._is_interrupted or self._task is None:
            return
        if not isinstance(error, asyncio.CancelledError):
            # The cancellation is still on its way; it must not hit whoever awaits next.
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                self._task.uncancel()
            return
        self._task.uncancel()
        if self._error is None:
            self._app.metrics.num_disconnects += 1
            raise ClientDisconnected from None
        raise self._error from None

    def interrupt(self, error: ApiError | None) -> None:
        """End the work now: with `error` for the client, or None when the client has left. Idempotent."""
        if self._is_closed or self._is_interrupted or self._task is None:
            return
        self._is_interrupted = True
        self._error = error
        self._abort_all()
        self._task.cancel()

    def stop(self, index: int) -> None:
        """Abort one sequence that is complete for the client (a stop string) but not for the engine."""
        stream = self._streams.pop(index, None)
        if stream is not None:
            stream.abort()
            self._finish(index, "stop")

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Yield outputs of all sequences as they come, each sequence in its own order.

        With a `stream_interval` of N, the first token comes at once and then at least N at a time.
        Raises: ApiError when the engine ends a sequence with an error.
        """
        interval = self._app.config.server.stream_interval
        if interval <= 1:
            async for item in self._raw_outputs():
                yield item
            return
        held: dict[int, RequestOutput] = {}
        seen: set[int] = set()
        async for index, output in self._raw_outputs():
            if index in held:
                output = _joined(held.pop(index), output)
            is_due = output.finish_reason is not None or len(output.new_token_ids) >= interval
            if is_due or (index not in seen and output.new_token_ids):
                seen.add(index)
                yield index, output
            else:
                held[index] = output

    async def _raw_outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        if len(self._requests) == 1:
            stream = self._streams[0]
            async for output in stream:
                self._observe(0, output)
                yield 0, output
                if 0 not in self._streams:
                    return
            if 0 in self._streams:
                raise errors.internal_error()
            return
        queue: asyncio.Queue[tuple[int, RequestOutput | None]] = asyncio.Queue()
        self._pumps = [asyncio.create_task(_pump(i, stream, queue)) for i, stream in self._streams.items()]
        while self._streams:
            index, next_output = await queue.get()
            if index not in self._streams:
                continue
            if next_output is None:
                raise errors.internal_error()
            self._observe(index, next_output)
            yield index, next_output

    def _observe(self, index: int, output: RequestOutput) -> None:
        """Count an output; take a finished sequence off the list.

        Raises: ApiError for a sequence that ended in an error.
        """
        metrics = self._metrics[index]
        now = time.monotonic()
        num_new = len(output.new_token_ids)
        if num_new:
            metrics.num_generation_tokens += num_new
            if self._num_tokens[index]:
                metrics.inter_token_latency.observe((now - self._last_at[index]) / num_new, num_new)
            else:
                self._first_at[index] = now
                metrics.time_to_first_token.observe(now - self._exchange.started_at)
            self._num_tokens[index] += num_new
            self._last_at[index] = now
        if output.num_cached_tokens:
            metrics.num_cached_tokens += output.num_cached_tokens
        reason = output.finish_reason
        if reason is None:
            return
        self._streams.pop(index, None)
        self._finish(index, reason.value)
        if reason is FinishReason.ERROR:
            raise _engine_error(output.error or "", self._app, metrics)
        if reason is FinishReason.ABORT:
            raise errors.internal_error()

    def _finish(self, index: int, reason: str) -> None:
        metrics = self._metrics[index]
        now = time.monotonic()
        metrics.finished[reason] = metrics.finished.get(reason, 0) + 1
        metrics.generation_tokens.observe(self._num_tokens[index])
        metrics.e2e_latency.observe(now - self._exchange.started_at)
        if self._num_tokens[index] > 1:
            spent = self._last_at[index] - self._first_at[index]
            metrics.time_per_output_token.observe(spent / (self._num_tokens[index] - 1))

    def _abort_all(self) -> None:
        streams, self._streams = self._streams, {}
        for index, stream in streams.items():
            stream.abort()
            self._finish(index, "abort")

    async def _watch_client(self) -> None:
        await self._exchange.wait_disconnect()
        self.interrupt(None)


async def _pump(index: int, stream: RequestStream, queue: asyncio.Queue[tuple[int, RequestOutput | None]]) -> None:
    async for output in stream:
        queue.put_nowait((index, output))
    queue.put_nowait((index, None))


def _joined(first: RequestOutput, second: RequestOutput) -> RequestOutput:
    """Return one output that says what both say."""
    logprobs = None
    if first.new_logprobs is not None or second.new_logprobs is not None:
        logprobs = [*(first.new_logprobs or ()), *(second.new_logprobs or ())]
    cached = first.num_cached_tokens if first.num_cached_tokens is not None else second.num_cached_tokens
    return RequestOutput(
        second.request_id,
        first.new_token_ids + second.new_token_ids,
        finish_reason=second.finish_reason,
        new_logprobs=logprobs,
        num_cached_tokens=cached,
        error=second.error,
        stop_token_id=second.stop_token_id,
    )


def _engine_error(text: str, app: App, metrics: EngineMetrics) -> ApiError:
    """Map the engine's `code: message` to an answer; its message stays in the log."""
    code = text.partition(":")[0]
    if code in ("too_long", "never_fits", "empty_prompt", "bad_token"):
        app.metrics.count_refusal(code)
        sentences = {
            "too_long": "The request is longer than this model's context.",
            "never_fits": "The request needs more KV cache than this server has.",
            "empty_prompt": "The prompt is empty.",
            "bad_token": "The prompt holds a token id that the model does not know.",
        }
        return errors.invalid_value("prompt", sentences[code])
    if code in ("queue_full", "overloaded"):
        app.metrics.count_refusal(code)
        return errors.overloaded()
    if code == "numerical_error" or "not finite" in text:
        metrics.num_nan += 1
        return errors.numerical_error()
    if code in ("engine_dead", "draining"):
        return errors.unavailable(code)
    return errors.internal_error()


def _of_tenant(request: EngineRequest, salt: str) -> EngineRequest:
    """Keep a tenant's cached blocks, and the names of its conversations, apart from those of others."""
    conversation = salt + request.conversation if request.conversation else ""
    return replace(request, cache_salt=salt + request.cache_salt, conversation=conversation)
