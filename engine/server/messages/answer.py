"""POST /v1/messages, second half: pieces of the reply → content blocks → named events, or one message.

    message_start  ping  (content_block_start  content_block_delta…  content_block_stop)…  message_delta  message_stop

One block is open at a time. The whole answer holds the blocks that the stream would have built.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import orjson

from engine.server import info
from engine.server.http import Exchange
from engine.server.messages.request import MessagesPlan, count_tokens, plan_messages
from engine.server.reply import Piece, replying
from engine.server.stream import EventStream
from engine.text import ContentDelta, ReasoningDelta, ToolArgumentsDelta, ToolCallStart

if TYPE_CHECKING:
    from engine.server.app import App

Event = tuple[str, dict[str, Any]]

PING = b'event: ping\ndata: {"type":"ping"}\n\n'
_STOP_REASONS = {"tool_calls": "tool_use", "length": "max_tokens", "stop": "end_turn"}


async def create_message(app: App, exchange: Exchange) -> None:
    """Answer POST /v1/messages."""
    info.check_accepting(app)
    data = await exchange.read_json(app.config.server.max_body_bytes)
    plan = await app.run_text(exchange.body_bytes, plan_messages, app, exchange, data)
    async with replying(app, exchange, plan.reply) as pieces:
        if plan.reply.is_streaming:
            await _stream(exchange, plan, pieces)
        else:
            await _whole(exchange, plan, pieces)


async def count_message_tokens(app: App, exchange: Exchange) -> None:
    """Answer POST /v1/messages/count_tokens."""
    data = await exchange.read_json(app.config.server.max_body_bytes)
    num_tokens = await app.run_text(exchange.body_bytes, count_tokens, app, exchange, data)
    await exchange.answer_json(200, {"input_tokens": num_tokens})


class Blocks:
    """Pieces in, events out. `content` holds the closed blocks, as a whole answer shows them."""

    def __init__(self, plan: MessagesPlan) -> None:
        self.content: list[dict[str, Any]] = []
        self.stop_reason: str | None = None
        self.stop_sequence: str | None = None
        self._plan = plan
        # Nobody checks it, but clients refuse a thinking block without one.
        self._signature = plan.reply.id.removeprefix("msg_")
        self._open: tuple[str, int] | None = None
        self._block: dict[str, Any] = {}
        self._texts: list[str] = []

    def feed(self, piece: Piece) -> list[Event]:
        """Return the events of a piece, which may be none."""
        events: list[Event] = []
        for event in piece.events:
            if isinstance(event, ContentDelta):
                self._turn_to(("text", event.message), {"type": "text", "text": ""}, events)
                self._add(event.text, "text", events)
            elif isinstance(event, ReasoningDelta):
                block: dict[str, Any] = {"type": "thinking", "thinking": "", "signature": ""}
                self._turn_to(("thinking", event.message), block, events)
                if self._plan.thinking == "shown":
                    self._add(event.text, "thinking", events)
            elif isinstance(event, ToolCallStart):
                call_id = "toolu_" + event.id.removeprefix("call_")
                block = {"type": "tool_use", "id": call_id, "name": event.name, "input": {}}
                self._turn_to(("tool_use", event.index), block, events)
            elif isinstance(event, ToolArgumentsDelta):
                # The arguments become an object when they are whole, and a block of the API holds nothing else.
                self._texts.append(event.text)
        if piece.finish_reason is not None:
            self._close(events)
            self.stop_reason = self._reason(piece)
        return events

    def _turn_to(self, key: tuple[str, int], block: dict[str, Any], events: list[Event]) -> None:
        if key == self._open:
            return
        self._close(events)
        self._open, self._block = key, block
        start = {"type": "content_block_start", "index": len(self.content), "content_block": dict(block)}
        events.append(("content_block_start", start))

    def _add(self, text: str, kind: str, events: list[Event]) -> None:
        self._texts.append(text)
        events.append(self._delta({"type": f"{kind}_delta", kind: text}))

    def _close(self, events: list[Event]) -> None:
        if self._open is None:
            return
        kind, text = self._open[0], "".join(self._texts)
        if kind == "tool_use":
            # The parser lets only JSON through. Its text is passed on: to parse it could change numbers.
            text = text if text.lstrip().startswith("{") else f'{{"value":{text or "null"}}}'
            events.append(self._delta({"type": "input_json_delta", "partial_json": text}))
            self._block["input"] = orjson.Fragment(text)
        elif kind == "thinking":
            events.append(self._delta({"type": "signature_delta", "signature": self._signature}))
            self._block |= {"thinking": text, "signature": self._signature}
        else:
            self._block["text"] = text
        events.append(("content_block_stop", {"type": "content_block_stop", "index": len(self.content)}))
        self.content.append(self._block)
        self._open, self._texts = None, []

    def _delta(self, delta: dict[str, Any]) -> Event:
        return "content_block_delta", {"type": "content_block_delta", "index": len(self.content), "delta": delta}

    def _reason(self, piece: Piece) -> str:
        if piece.stop_string is not None and piece.finish_reason == "stop":
            self.stop_sequence = piece.stop_string
            return "stop_sequence"
        if piece.finish_reason == "length" and self._plan.is_context_limited:
            return "model_context_window_exceeded"
        return _STOP_REASONS[piece.finish_reason or "stop"]


async def _stream(exchange: Exchange, plan: MessagesPlan, pieces: AsyncIterator[Piece]) -> None:
    blocks = Blocks(plan)
    is_first = True
    async with EventStream(exchange, ping=PING, done=b"") as stream:
        async for piece in pieces:
            parts: list[bytes] = []
            if is_first:
                is_first = False
                parts = [_encode(("message_start", {"type": "message_start", "message": _message(plan, None)})), PING]
            parts += [_encode(event) for event in blocks.feed(piece)]
            if parts:
                await stream.send(b"".join(parts))
        delta = {"stop_reason": blocks.stop_reason, "stop_sequence": blocks.stop_sequence}
        end: Event = ("message_delta", {"type": "message_delta", "delta": delta, "usage": _usage(plan)})
        await stream.end(_encode(end) + _encode(("message_stop", {"type": "message_stop"})))


async def _whole(exchange: Exchange, plan: MessagesPlan, pieces: AsyncIterator[Piece]) -> None:
    blocks = Blocks(plan)
    async for piece in pieces:
        blocks.feed(piece)
    await exchange.answer_json(200, _message(plan, blocks))


def _encode(event: Event) -> bytes:
    name, data = event
    return b"event: " + name.encode("ascii") + b"\ndata: " + orjson.dumps(data) + b"\n\n"


def _message(plan: MessagesPlan, blocks: Blocks | None) -> dict[str, Any]:
    """Lay out a message: with what it says, or as it begins."""
    return {
        "id": plan.reply.id,
        "type": "message",
        "role": "assistant",
        "model": plan.reply.model,
        "content": blocks.content if blocks else [],
        "stop_reason": blocks.stop_reason if blocks else None,
        "stop_sequence": blocks.stop_sequence if blocks else None,
        "usage": _usage(plan),
    }


def _usage(plan: MessagesPlan) -> dict[str, Any]:
    """Lay out the counts as they are now; the cached part of the prompt is not among the `input_tokens`."""
    usage = plan.reply.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }
