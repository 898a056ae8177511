"""POST /v1/chat/completions, second half: engine outputs → pieces → a stream or a whole answer.

Both answers are made from the same pieces, so one is the concatenation of the other by construction.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from engine.core.request import FinishReason, RequestOutput, TokenLogprobs
from engine.server import info
from engine.server.chat_request import ChatPlan, plan_chat
from engine.server.choices import TokenNames
from engine.server.generation import Generation
from engine.server.http import Exchange
from engine.server.stream import EventStream
from engine.text import (
    ChatEvent,
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


@dataclass(slots=True)
class Piece:
    """What one engine output adds to one choice; most pieces hold one event. `logprobs` are of content tokens."""

    index: int
    events: list[ChatEvent]
    logprobs: list[dict[str, Any]] | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class Choice:
    """One sequence of the answer: engine outputs in, pieces out."""

    def __init__(self, app: App, plan: ChatPlan, index: int) -> None:
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


async def create_chat_completion(app: App, exchange: Exchange) -> None:
    """Answer POST /v1/chat/completions."""
    info.check_accepting(app)
    data = await exchange.read_json(app.config.server.max_body_bytes)
    plan = await app.run_text(exchange.body_bytes, plan_chat, app, exchange, data)
    app.metrics.params_n.observe(plan.params.n)
    app.metrics.params_max_tokens.observe(plan.requests[0].max_tokens)
    choices = [Choice(app, plan, index) for index in range(plan.params.n)]
    async with Generation(app, exchange, plan.requests) as generation:
        pieces = _pieces(plan, choices, generation)
        if plan.is_streaming:
            await _stream(app, exchange, plan, pieces)
        else:
            await _whole(app, exchange, plan, pieces)


async def _pieces(plan: ChatPlan, choices: list[Choice], generation: Generation) -> AsyncIterator[Piece]:
    async for index, output in generation.outputs():
        piece, num_used, must_abort = choices[index].feed(output)
        plan.usage.add(0, output, num_used)
        if must_abort:
            generation.stop(index)
        yield piece


class ChunkWriter:
    """Writes pieces as chunks. Text takes the short way: a template around one JSON string."""

    def __init__(self, app: App, plan: ChatPlan) -> None:
        head = {
            "id": plan.id,
            "object": "chat.completion.chunk",
            "created": plan.created,
            "model": plan.model,
            "system_fingerprint": app.fingerprint,
            "choices": [],
        }
        self._head = b"data: " + orjson.dumps(head)[:-2]
        self._tail = b'],"usage":null}\n\n' if plan.includes_usage else b"]}\n\n"
        self._short_tail = b'},"logprobs":null,"finish_reason":null}' + self._tail
        self._content = [self._start(i) + b'"content":' for i in range(plan.params.n)]
        self._reasoning = [self._start(i) + b'"reasoning":' for i in range(plan.params.n)]
        self._is_open = [False] * plan.params.n
        self._pending: list[list[dict[str, Any]]] = [[] for _ in range(plan.params.n)]
        self._prompt_ids = plan.requests[0].prompt_token_ids if plan.returns_ids else None

    def write(self, piece: Piece) -> bytes:
        """Return the chunks of a piece, which may be none."""
        index = piece.index
        parts: list[bytes] = []
        if not self._is_open[index]:
            self._is_open[index] = True
            parts.append(self._chunk(index, {"role": "assistant", "content": ""}, prompt_ids=self._prompt_ids))
        if piece.logprobs:
            self._pending[index] += piece.logprobs
        token_ids = piece.token_ids
        for event in piece.events:
            if isinstance(event, ContentDelta):
                if self._pending[index] or token_ids is not None:
                    logprobs, self._pending[index] = self._pending[index], []
                    parts.append(self._chunk(index, {"content": event.text}, logprobs, token_ids))
                    token_ids = None
                else:
                    parts += (self._content[index], orjson.dumps(event.text), self._short_tail)
            elif isinstance(event, ReasoningDelta):
                text = orjson.dumps(event.text)
                parts += (self._reasoning[index], text, b',"reasoning_content":', text, self._short_tail)
            elif isinstance(event, ToolCallStart):
                function = {"name": event.name, "arguments": ""}
                call = {"index": event.index, "id": event.id, "type": "function", "function": function}
                parts.append(self._chunk(index, {"tool_calls": [call]}))
            elif isinstance(event, ToolArgumentsDelta):
                arguments = {"index": event.index, "function": {"arguments": event.text}}
                parts.append(self._chunk(index, {"tool_calls": [arguments]}))
        if piece.finish_reason is not None:
            logprobs, self._pending[index] = self._pending[index], []
            parts.append(self._chunk(index, {}, logprobs, token_ids, finish_reason=piece.finish_reason))
        elif token_ids:
            parts.append(self._chunk(index, {}, None, token_ids))
        return b"".join(parts)

    def usage(self, usage: dict[str, Any]) -> bytes:
        """Return the one chunk that has no choices."""
        return self._head + b'],"usage":' + orjson.dumps(usage) + b"}\n\n"

    def _start(self, index: int) -> bytes:
        return self._head + b'{"index":' + str(index).encode("ascii") + b',"delta":{'

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: list[dict[str, Any]] | None = None,
        token_ids: list[int] | None = None,
        *,
        finish_reason: str | None = None,
        prompt_ids: list[int] | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {
            "index": index,
            "delta": delta,
            "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
            "finish_reason": finish_reason,
        }
        if token_ids is not None:
            choice["token_ids"] = token_ids
        if prompt_ids is not None:
            choice["prompt_token_ids"] = prompt_ids
        return self._head + orjson.dumps(choice) + self._tail


async def _stream(app: App, exchange: Exchange, plan: ChatPlan, pieces: AsyncIterator[Piece]) -> None:
    writer = ChunkWriter(app, plan)
    async with EventStream(exchange) as stream:
        async for piece in pieces:
            if data := writer.write(piece):
                await stream.send(data)
        await stream.end(writer.usage(plan.usage.to_json()) if plan.includes_usage else b"")


@dataclass(slots=True)
class Message:
    """One choice of a whole answer, collected from its pieces."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        for event in piece.events:
            if isinstance(event, ContentDelta):
                self.content.append(event.text)
            elif isinstance(event, ReasoningDelta):
                self.reasoning.append(event.text)
            elif isinstance(event, ToolCallStart):
                function = {"name": event.name, "arguments": ""}
                self.calls.append({"id": event.id, "type": "function", "function": function})
            elif isinstance(event, ToolArgumentsDelta):
                self.calls[event.index]["function"]["arguments"] += event.text
        self.logprobs += piece.logprobs or ()
        self.token_ids += piece.token_ids or ()
        self.finish_reason = piece.finish_reason or self.finish_reason

    def to_json(self, index: int, plan: ChatPlan) -> dict[str, Any]:
        content = "".join(self.content)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not self.calls else None,
            "refusal": None,
            "annotations": [],
        }
        if self.calls:
            message["tool_calls"] = self.calls
        if self.reasoning:
            # Clients read one name or the other.
            message["reasoning"] = message["reasoning_content"] = "".join(self.reasoning)
        has_logprobs = plan.num_top_logprobs is not None
        choice: dict[str, Any] = {
            "index": index,
            "message": message,
            "logprobs": {"content": self.logprobs, "refusal": None} if has_logprobs else None,
            "finish_reason": self.finish_reason,
        }
        if plan.returns_ids:
            choice["token_ids"] = self.token_ids
        return choice


async def _whole(app: App, exchange: Exchange, plan: ChatPlan, pieces: AsyncIterator[Piece]) -> None:
    messages = [Message() for _ in range(plan.params.n)]
    async for piece in pieces:
        messages[piece.index].add(piece)
    answer: dict[str, Any] = {
        "id": plan.id,
        "object": "chat.completion",
        "created": plan.created,
        "model": plan.model,
        "choices": [message.to_json(index, plan) for index, message in enumerate(messages)],
        "usage": plan.usage.to_json(),
        "system_fingerprint": app.fingerprint,
        "service_tier": "default",
    }
    if plan.returns_ids:
        answer["prompt_token_ids"] = plan.requests[0].prompt_token_ids
    await exchange.answer_json(200, answer)
