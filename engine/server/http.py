"""Small tools over raw ASGI: one exchange, its headers, its body, its answer.

Knows: how to read a bounded JSON body, answer with bytes, open an event stream. Refuses to know: routes and dialects.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson

from engine.server import errors
from engine.server.errors import ApiError, ClientDisconnected

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]

JSON_TYPE: Header = (b"content-type", b"application/json")
_WELL_FORMED_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}\Z")


class Exchange:
    """One HTTP request and its answer.

    `path` is `scope["path"]`, the only path that anything is decided on. `request_id` is the client's when well formed.
    `tenant` is the digest of the key that let the request in, empty where no key is asked for. `is_anthropic` says in
    whose shape errors are answered. `on_failure` writes the event that ends an open stream, where a dialect needs that.
    """

    __slots__ = (
        "_receive",
        "_send",
        "body_bytes",
        "headers",
        "is_anthropic",
        "method",
        "on_failure",
        "path",
        "query",
        "request_id",
        "started",
        "started_at",
        "status",
        "tenant",
        "warnings",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope.get("query_string", b"")
        self.headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            # The first wins: a header smuggled behind the real one changes nothing.
            self.headers.setdefault(name, value)
        offered = self.headers.get(b"x-request-id", b"")
        if _WELL_FORMED_ID.match(offered):
            self.request_id = offered.decode("ascii")
        else:
            self.request_id = "req_" + secrets.token_hex(12)
        is_messages = self.path == "/v1/messages" or self.path.startswith("/v1/messages/")
        self.is_anthropic = is_messages or b"anthropic-version" in self.headers
        self.on_failure: Callable[[ApiError], bytes] | None = None
        self.started_at = time.monotonic()
        self.started = False
        self.status = 0
        self.tenant = ""
        self.body_bytes = 0
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        """Add a line to the `x-hlaunch-warning` header of the answer."""
        if len(self.warnings) < 8:
            self.warnings.append(text)

    async def read_body(self, limit: int) -> bytes:
        """Read the whole body, at most `limit` bytes.

        Raises: ApiError 413 when it is larger, ClientDisconnected when the client leaves before its end.
        """
        declared = self.headers.get(b"content-length", b"")
        if declared.isdigit() and (len(declared) > 18 or int(declared) > limit):
            raise errors.request_too_large(limit)
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnected
            part: bytes = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise errors.request_too_large(limit)
            parts.append(part)
            if not message.get("more_body", False):
                self.body_bytes = size
                return parts[0] if len(parts) == 1 else b"".join(parts)

    async def read_json(self, limit: int) -> dict[str, Any]:
        """Read the body as one JSON object.

        Raises: ApiError 413, 415, or 400 `invalid_json`. Duplicate keys: the last one wins.
        """
        media_type = self.headers.get(b"content-type", b"").split(b";", 1)[0].strip().lower()
        if media_type != b"application/json" and not (
            media_type.startswith(b"application/") and media_type.endswith(b"+json")
        ):
            raise errors.unsupported_media_type()
        if self.headers.get(b"content-encoding", b"identity").strip().lower() not in (b"identity", b""):
            raise errors.unsupported_media_type()
        body = await self.read_body(limit)
        try:
            data = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            # Line and column only: the parser's text could quote the body.
            raise errors.invalid_json(
                f"The body is not valid JSON (line {error.lineno}, column {error.colno})."
            ) from None
        if not isinstance(data, dict):
            raise errors.invalid_json("The body must be a JSON object.")
        return data

    async def wait_disconnect(self) -> None:
        """Return when the client has left (or when the answer is complete)."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _start(self, status: int, headers: list[Header]) -> None:
        elapsed_ms = int((time.monotonic() - self.started_at) * 1000)
        headers.append((b"x-request-id", self.request_id.encode("ascii")))
        headers.append((b"openai-processing-ms", str(elapsed_ms).encode()))
        if self.is_anthropic:
            headers.append((b"request-id", self.request_id.encode("ascii")))
        if self.warnings:
            text = "; ".join(self.warnings).encode("ascii", "replace")
            headers.append((b"x-hlaunch-warning", re.sub(rb"[^\x20-\x7e]", b"?", text)[:1024]))
        self.started = True
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def answer(
        self, status: int, body: bytes, headers: list[Header] | None = None, content_type: Header = JSON_TYPE
    ) -> None:
        """Send a complete answer."""
        fields = [content_type, (b"content-length", str(len(body)).encode())]
        if headers:
            fields.extend(headers)
        await self._start(status, fields)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def answer_json(self, status: int, value: object, headers: list[Header] | None = None) -> None:
        await self.answer(status, orjson.dumps(value), headers)

    async def answer_error(self, error: ApiError, *, close: bool = False) -> None:
        """Send an error; `close` ends the connection, for bodies that nobody will read."""
        headers = error.headers()
        if close:
            headers.append((b"connection", b"close"))
        if self.is_anthropic:
            await self.answer(error.anthropic_status, error.anthropic_body(self.request_id), headers)
        else:
            await self.answer(error.status, error.body(), headers)

    async def fail(self, error: ApiError) -> None:
        """Answer with an error, or end the open stream with it."""
        if not self.started:
            await self.answer_error(error)
        elif self.on_failure is not None:
            await self.end_stream(self.on_failure(error))
        elif self.is_anthropic:
            await self.end_stream(error.anthropic_event(self.request_id))
        else:
            await self.end_stream(error.sse_event())

    async def open_stream(self) -> None:
        """Start an answer of server-sent events."""
        await self._start(
            200,
            [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ],
        )

    async def send_chunk(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_stream(self, data: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": False})
