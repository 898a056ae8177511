"""One reply of a chat model, whatever dialect asked for it: engine outputs → pieces.

Knows parsing, usage, logprobs, calls that nobody offered and replies that end before the engine does. Refuses to know
how an answer is laid out. Streamed and whole answers of a dialect are made from the same pieces.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.core.request import EngineRequest, FinishReason, RequestOutput, TokenLogprobs
from engine.core.sampling_params import SamplingParams
from engine.server.choices import TokenNames, Usage
from engine.server.generation import Generation
from engine.server.http import Exchange
from engine.server.tools import Tools
from engine.text import (
    ChatEvent,
    ChatFormat,
    ChatOutputProcessor,
    ChatUpdate,
    ContentDelta,
    ReasoningDelta,
    StreamEnd,
    ToolArgumentsDelta,
    ToolCallStart,
)
from engine.text.events import ChatFinishReason

if TYPE_CHECKING:
    from engine.server.app import App


@dataclass(frozen=True, slots=True)
class ReplyPlan:
    """What to run, and what of it the answer shows."""

    id: str
    created: int
    model: str
    chat_format: ChatFormat
    params: SamplingParams
    requests: list[EngineRequest]
    usage: Usage
    tools: Tools
    # Tokens of the reply that the prompt already holds: the header of a forced call.
    prefix_ids: list[int]
    num_top_logprobs: int | None
    is_continuation: bool
    parallel_tool_calls: bool
    includes_reasoning: bool
    returns_ids: bool
    is_streaming: bool


@dataclass(slots=True)
class Piece:
    """What one engine output adds to one choice; most pieces hold one event. `logprobs` are of content tokens."""

    index: int
    events: list[ChatEvent]
    logprobs: list[dict[str, Any]] | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    # The client's stop string that ended the reply, beside `finish_reason`.
    stop_string: str | None = None


class Choice:
    """One sequence of the answer: engine outputs in, pieces out."""

    def __init__(self, app: App, plan: ReplyPlan, index: int) -> None:
        self.index = index
        self._plan = plan
        self._ends_after_call = not plan.parallel_tool_calls or plan.tools.forced is not None
        self._processor = ChatOutputProcessor(
            plan.chat_format,
            plan.tools.definitions,
            stop=plan.params.stop,
            include_stop=plan.params.include_stop_str_in_output,
            is_continuation=plan.is_continuation,
            parallel_tool_calls=not self._ends_after_call,
        )
        self._reply_reason: ChatFinishReason = "stop"
        self._drops_calls = not plan.tools.may_call
        self._names = TokenNames(app.tokenizer, skip_special_tokens=plan.params.skip_special_tokens)
        # By position since the start of the reply, prefix included; kept only when logprobs are wanted.
        self._history: list[tuple[int, TokenLogprobs] | None] = []
        if plan.prefix_ids:
            self._processor.push(plan.prefix_ids)
            self._history.extend(None for _ in plan.prefix_ids)

    def feed(self, output: RequestOutput) -> tuple[Piece, int, bool]:
        """Return the piece, the number of tokens used, and whether the engine must be told to stop."""
        plan = self._plan
        update = self._push(output)
        num_used, must_abort, finish_reason = update.num_tokens, update.must_abort, update.finish_reason
        if plan.params.ignore_eos and update.stop_string is None:
            # The reply is over for the client but not the measurement: the engine goes on to its limit.
            num_used, must_abort = len(output.new_token_ids), False
            self._reply_reason = update.finish_reason or self._reply_reason
            finish_reason = None
            if output.finish_reason is not None:
                is_cut = output.finish_reason is FinishReason.LENGTH and self._reply_reason != "tool_calls"
                finish_reason = "length" if is_cut else self._reply_reason
        piece = Piece(self.index, update.events)
        if plan.num_top_logprobs is not None:
            piece.logprobs = self._logprobs(output, update.content_positions, plan.num_top_logprobs)
        if plan.returns_ids:
            piece.token_ids = output.new_token_ids[:num_used]
        piece.finish_reason = finish_reason
        piece.stop_string = update.stop_string
        if update.finish_reason is not None:
            for event in update.events:
                if isinstance(event, StreamEnd):
                    plan.usage.reasoning_tokens += event.reasoning_tokens
        if self._drops_calls:
            self._drop_calls(piece, output.finish_reason)
        if not plan.includes_reasoning:
            piece.events = [event for event in piece.events if not isinstance(event, ReasoningDelta)]
        return piece, num_used, must_abort

    def _push(self, output: RequestOutput) -> ChatUpdate:
        ids = output.new_token_ids
        if not self._ends_after_call or len(ids) < 2:
            return self._processor.push(ids, output.finish_reason, output.stop_token_id)
        # One by one, so that what follows the call is not counted, however the engine cuts its outputs.
        events: list[ChatEvent] = []
        positions: list[int] = []
        for at, token_id in enumerate(ids):
            is_last = at == len(ids) - 1
            update = self._processor.push(
                (token_id,), output.finish_reason if is_last else None, output.stop_token_id if is_last else None
            )
            events += update.events
            positions += [at + position for position in update.content_positions]
            if update.finish_reason is not None:
                break
        must_abort = update.finish_reason is not None and output.finish_reason is None
        return ChatUpdate(events, at + 1, positions, update.finish_reason, update.stop_string, must_abort)

    def _logprobs(self, output: RequestOutput, positions: list[int], num_top: int) -> list[dict[str, Any]]:
        base = len(self._history)
        self._history.extend(zip(output.new_token_ids, output.new_logprobs or (), strict=False))
        entries = []
        for position in positions:
            # A negative position is a token of an earlier output, whose text was first taken for a header.
            at = base + position
            known = self._history[at] if 0 <= at < len(self._history) else None
            if known is not None:
                entries.append(self._names.chat_entry(*known, num_top))
        return entries

    def _drop_calls(self, piece: Piece, reason: FinishReason | None) -> None:
        """A call that nobody offered is text, and ends as text does."""
        events: list[ChatEvent] = []
        for event in piece.events:
            if isinstance(event, ToolArgumentsDelta):
                events.append(ContentDelta(event.text, 0))
            elif not isinstance(event, ToolCallStart):
                events.append(event)
        piece.events = events
        if piece.finish_reason == "tool_calls":
            piece.finish_reason = "length" if reason is FinishReason.LENGTH else "stop"


@asynccontextmanager
async def replying(app: App, exchange: Exchange, plan: ReplyPlan) -> AsyncIterator[AsyncIterator[Piece]]:
    """Run a plan: the pieces of all its choices as they come. Leaving the block frees what still runs.

    Raises: ApiError when the engine takes no request or fails; ClientDisconnected.
    """
    choices = [Choice(app, plan, index) for index in range(plan.params.n)]
    async with Generation(app, exchange, plan.requests) as generation:
        yield _pieces(plan, choices, generation)


async def _pieces(plan: ReplyPlan, choices: list[Choice], generation: Generation) -> AsyncIterator[Piece]:
    # One token a piece, so that the entries of a token stand beside its own text, however the engine cuts its outputs.
    must_split = plan.num_top_logprobs is not None
    async for index, output in generation.outputs():
        for part in _single_tokens(output) if must_split else (output,):
            piece, num_used, must_abort = choices[index].feed(part)
            plan.usage.add(0, part, num_used)
            if must_abort:
                generation.stop(index)
            yield piece
            if piece.finish_reason is not None:
                break


def _single_tokens(output: RequestOutput) -> Iterator[RequestOutput]:
    ids, logprobs = output.new_token_ids, output.new_logprobs
    for at in range(len(ids) - 1):
        entries = logprobs[at : at + 1] if logprobs is not None else None
        cached = output.num_cached_tokens if at == 0 else None
        yield RequestOutput(output.request_id, ids[at : at + 1], new_logprobs=entries, num_cached_tokens=cached)
    if len(ids) < 2:
        yield output
    else:
        yield replace(
            output,
            new_token_ids=ids[-1:],
            new_logprobs=logprobs[-1:] if logprobs is not None else None,
            num_cached_tokens=None,
        )
