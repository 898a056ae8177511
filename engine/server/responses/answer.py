"""POST /v1/responses, second half: the response object, as a numbered stream of events or whole.

    created  in_progress  (events of items)…  completed | incomplete | failed

Every event carries the number that follows the last one's. The whole answer is the response of the last event.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import orjson

from engine.server import info
from engine.server.errors import ApiError
from engine.server.http import Exchange
from engine.server.reply import Piece, replying
from engine.server.responses.output import Event, Items
from engine.server.responses.request import ResponsesPlan, count_input_tokens, plan_response
from engine.server.stream import EventStream

if TYPE_CHECKING:
    from engine.server.app import App


async def create_response(app: App, exchange: Exchange) -> None:
    """Answer POST /v1/responses."""
    info.check_accepting(app)
    data = await exchange.read_json(app.config.server.max_body_bytes)
    plan = await app.run_text(exchange.body_bytes, plan_response, app, exchange, data)
    async with replying(app, exchange, plan.reply) as pieces:
        if plan.reply.is_streaming:
            await _stream(exchange, plan, pieces)
        else:
            await _whole(exchange, plan, pieces)


async def count_response_tokens(app: App, exchange: Exchange) -> None:
    """Answer POST /v1/responses/input_tokens."""
    data = await exchange.read_json(app.config.server.max_body_bytes)
    num_tokens = await app.run_text(exchange.body_bytes, count_input_tokens, app, exchange, data)
    await exchange.answer_json(200, {"object": "response.input_tokens", "input_tokens": num_tokens})


class ResponseWriter:
    """Pieces in, numbered events out; `response` is the object as it stands."""

    def __init__(self, plan: ResponsesPlan) -> None:
        self._plan = plan
        self._items = Items()
        self._num_events = 0
        self._finish_reason: str | None = None

    def _head(self) -> bytes:
        """Return the events that open the stream, once."""
        if self._num_events:
            return b""
        events = (self._about("response.created", "in_progress"), self._about("response.in_progress", "in_progress"))
        return b"".join([self._encode(event) for event in events])

    def take(self, piece: Piece) -> list[Event]:
        """Add a piece to the response; return its events, which may be none and have no numbers yet."""
        self._finish_reason = piece.finish_reason or self._finish_reason
        return self._items.feed(piece)

    def write(self, piece: Piece) -> bytes:
        """Add a piece to the response; return its events for the stream, which the first piece opens."""
        return self._head() + b"".join([self._encode(event) for event in self.take(piece)])

    def end(self) -> bytes:
        """Return the event that holds the whole response."""
        response = self.response()
        return self._encode({"type": f"response.{response['status']}", "response": response})

    def fail(self, error: ApiError) -> bytes:
        """Return the event that ends a stream which cannot end well, also one that has only been kept alive so far.

        The code is the SDK's only one that fits.
        """
        head = self._head()
        event = self._about("response.failed", "failed")
        event["response"]["error"] = {"code": "server_error", "message": error.message}
        return head + self._encode(event)

    def response(self) -> dict[str, Any]:
        """Return the finished response."""
        is_cut = self._finish_reason == "length"
        response = self._object("incomplete" if is_cut else "completed")
        response["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
        response["completed_at"] = None if is_cut else int(time.time())
        response["usage"] = self._usage()
        return response

    def _about(self, kind: str, status: str) -> Event:
        return {"type": kind, "response": self._object(status)}

    def _encode(self, event: Event) -> bytes:
        event["sequence_number"] = self._num_events
        self._num_events += 1
        name: str = event["type"]
        return b"event: " + name.encode("ascii") + b"\ndata: " + orjson.dumps(event) + b"\n\n"

    def _object(self, status: str) -> dict[str, Any]:
        reply = self._plan.reply
        return {
            "id": reply.id,
            "object": "response",
            "created_at": reply.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": reply.model,
            "output": self._items.output,
            "usage": None,
            **self._plan.echo,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._plan.reply.usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.num_cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }


async def _stream(exchange: Exchange, plan: ResponsesPlan, pieces: AsyncIterator[Piece]) -> None:
    writer = ResponseWriter(plan)
    exchange.on_failure = writer.fail
    async with EventStream(exchange, done=b"") as stream:
        async for piece in pieces:
            if data := writer.write(piece):
                await stream.send(data)
        await stream.end(writer.end())


async def _whole(exchange: Exchange, plan: ResponsesPlan, pieces: AsyncIterator[Piece]) -> None:
    writer = ResponseWriter(plan)
    async for piece in pieces:
        writer.take(piece)
    await exchange.answer_json(200, writer.response())
