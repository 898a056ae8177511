"""POST /v1/chat/completions, second half: pieces → a stream or a whole answer.

Both answers are made from the same pieces, so one is the concatenation of the other by construction.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from engine.server import info
from engine.server.chat_request import ChatPlan, plan_chat
from engine.server.http import Exchange
from engine.server.reply import Piece, ReplyPlan, replying
from engine.server.stream import EventStream
from engine.text import ContentDelta, ReasoningDelta, ToolArgumentsDelta, ToolCallStart

if TYPE_CHECKING:
    from engine.server.app import App


async def create_chat_completion(app: App, exchange: Exchange) -> None:
    """Answer POST /v1/chat/completions."""
    info.check_accepting(app)
    data = await exchange.read_json(app.config.server.max_body_bytes)
    plan = await app.run_text(exchange.body_bytes, plan_chat, app, exchange, data)
    async with replying(app, exchange, plan.reply) as pieces:
        if plan.reply.is_streaming:
            await _stream(app, exchange, plan, pieces)
        else:
            await _whole(app, exchange, plan.reply, pieces)


class ChunkWriter:
    """Writes pieces as chunks. Text takes the short way: a template around one JSON string."""

    def __init__(self, app: App, plan: ChatPlan) -> None:
        reply, num_choices = plan.reply, plan.reply.params.n
        head = {
            "id": reply.id,
            "object": "chat.completion.chunk",
            "created": reply.created,
            "model": reply.model,
            "system_fingerprint": app.fingerprint,
            "choices": [],
        }
        self._head = b"data: " + orjson.dumps(head)[:-2]
        self._tail = b'],"usage":null}\n\n' if plan.includes_usage else b"]}\n\n"
        self._short_tail = b'},"logprobs":null,"finish_reason":null}' + self._tail
        self._content = [self._start(i) + b'"content":' for i in range(num_choices)]
        self._reasoning = [self._start(i) + b'"reasoning":' for i in range(num_choices)]
        self._is_open = [False] * num_choices
        self._pending: list[list[dict[str, Any]]] = [[] for _ in range(num_choices)]
        self._prompt_ids = reply.requests[0].prompt_token_ids if reply.returns_ids else None

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
        await stream.end(writer.usage(plan.reply.usage.to_json()) if plan.includes_usage else b"")


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

    def to_json(self, index: int, plan: ReplyPlan) -> dict[str, Any]:
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


async def _whole(app: App, exchange: Exchange, plan: ReplyPlan, pieces: AsyncIterator[Piece]) -> None:
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
