"""uvicorn's httptools protocol with the limits that it lacks: header size, read timers, connections, slow readers.

Knows one connection: how many header bytes it may send, how long it may take, how slowly it may read. Refuses to know
routes. Whatever it refuses is answered in the API's error shape and the connection ends.

    connection made ──header timer──► headers complete ──body timer──► message complete ──(answer)──► keep-alive timer
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from engine.config import ServerConfig
from engine.server import errors
from engine.server.errors import ApiError

WRITE_BUFFER_BYTES = 64 * 1024
# A paused reader must take at least this much per stall period, or it is gone.
MIN_PROGRESS_BYTES = 4 * 1024
MAX_PIPELINED = 16
LINGER_SECONDS = 1.0

logger = logging.getLogger("hlaunch.server")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may take. Sizes in bytes, times in seconds."""

    max_header_bytes: int = 64 << 10
    max_headers: int = 100
    header_timeout_seconds: float = 10.0
    body_timeout_seconds: float = 30.0
    max_connections: int = 1024
    stall_seconds: float = 30.0

    @classmethod
    def from_config(cls, config: ServerConfig, stall_seconds: float) -> Limits:
        return cls(
            max_header_bytes=config.max_header_bytes,
            max_headers=config.max_headers,
            header_timeout_seconds=config.header_timeout_seconds,
            body_timeout_seconds=config.body_timeout_seconds,
            max_connections=config.max_connections,
            stall_seconds=stall_seconds,
        )


class GuardedProtocol(HttpToolsProtocol):
    """One connection under `Limits`."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: Limits,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._read_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._stalled_bytes = 0
        self._is_in_head = True
        self._is_refused = False
        self._is_upgrading = False
        self._head_bytes = 0
        self._unparsed_bytes = 0
        self._num_headers = 0
        self._refusal: ApiError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(errors.overloaded("The server holds as many connections as it may."))
        else:
            self._arm_read_timer(self._limits.header_timeout_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_read_timer()
        self._cancel_stall_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._unset_keepalive_if_required()
        if self._is_in_head and self._read_timer is None:
            self._arm_read_timer(self._limits.header_timeout_seconds)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError:
            malformed = ApiError(400, "invalid_request_error", "invalid_http", "This is not a valid HTTP request.")
            self._refuse(self._refusal or malformed)
            return
        if self._is_in_head:
            # httptools keeps a half header to itself, so its bytes are counted here.
            self._unparsed_bytes += len(data)
            if self._unparsed_bytes > self._limits.max_header_bytes:
                self._refuse(self._too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._num_headers = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._num_headers += 1
        self._count_head(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        if self.parser.should_upgrade():
            self._is_upgrading = True
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            self._fail_parse(errors.rate_limited("Too many pipelined requests on one connection."))
        super().on_headers_complete()
        self._arm_read_timer(self._limits.body_timeout_seconds)

    def on_body(self, body: bytes) -> None:
        if not self._is_upgrading:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._cancel_read_timer()
        self._unparsed_bytes = 0
        if not self._is_upgrading:
            self._is_in_head = True
            super().on_message_complete()
            if self.cycle.response_complete:
                # Answered before its body was read (401, 413): the keep-alive timer has been disarmed by that body.
                self._arm_read_timer(self.timeout_keep_alive)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled_bytes = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(self._limits.stall_seconds, self._on_stall)

    def resume_writing(self) -> None:
        self._cancel_stall_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "invalid_request_error", "invalid_http", "This is not a valid HTTP request."))

    def _count_head(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > self._limits.max_header_bytes or self._num_headers > self._limits.max_headers:
            self._fail_parse(self._too_large())

    def _fail_parse(self, refusal: ApiError) -> None:
        """Leave the parser from inside a callback; `data_received` answers."""
        self._refusal = refusal
        raise ValueError(refusal.code)

    def _too_large(self) -> ApiError:
        limits = self._limits
        return errors.headers_too_large(
            f"The request line and headers may have {limits.max_header_bytes} bytes and {limits.max_headers} fields."
        )

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Serve an `Upgrade` request as if it had not asked (RFC 9110 §7.8): clients offer h2c on plain POSTs.

        The parser stops after the headers of an upgrade, so a fresh one reads the message again without the offer.
        """
        self._is_upgrading = False
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(errors.method_not_allowed(("GET", "HEAD", "POST")))
            return
        head = [method, b" ", self.url, b" HTTP/", self.parser.get_http_version().encode("ascii"), b"\r\n"]
        for name, value in self.headers:
            if name not in (b"upgrade", b"connection", b"http2-settings"):
                head += [name, b": ", value, b"\r\n"]
        head.append(b"\r\n")
        self._is_in_head = True
        self._unparsed_bytes = 0
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"".join(head))
        if rest and not self._is_refused:
            self.data_received(rest)

    def _arm_read_timer(self, seconds: float) -> None:
        self._cancel_read_timer()
        self._read_timer = self.loop.call_later(seconds, self._on_read_timeout)

    def _cancel_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _cancel_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _on_read_timeout(self) -> None:
        self._read_timer = None
        if not self._is_in_head and self.flow.read_paused:
            # We are not reading at the moment, so the client is not the slow one.
            self._arm_read_timer(self._limits.body_timeout_seconds)
            return
        part = "headers" if self._is_in_head else "body"
        self._refuse(errors.request_timeout(f"The {part} of the request did not arrive in time."))

    def _on_stall(self) -> None:
        left = self.transport.get_write_buffer_size()
        if left > self._stalled_bytes - MIN_PROGRESS_BYTES:
            logger.warning("client reads too slowly, connection aborted with %d bytes unsent", left)
            self.transport.abort()
            return
        self._stalled_bytes = left
        self._stall_timer = self.loop.call_later(self._limits.stall_seconds, self._on_stall)

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error if no other answer is under way, and end the connection."""
        self._is_refused = True
        self._cancel_read_timer()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if self._is_in_head or cycle.response_started or self.pipeline:
                # An earlier request is still being answered: let it finish, then close.
                self.pipeline.clear()
                cycle.keep_alive = False
                return
            cycle.disconnected = True
            cycle.message_event.set()
        elif cycle is not None and not self._is_in_head:
            # Already answered, only the rest of its body is missing.
            self.transport.close()
            return
        self._write_refusal(error)

    def _write_refusal(self, error: ApiError) -> None:
        if self.transport.is_closing():
            return
        body = error.body()
        status = HTTPStatus(error.status)
        head = [f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode("ascii")]
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode("ascii")),
            (b"x-request-id", b"req_" + secrets.token_hex(12).encode("ascii")),
            (b"openai-processing-ms", b"0"),
            (b"connection", b"close"),
            *error.headers(),
        ]
        head += [name + b": " + value + b"\r\n" for name, value in headers]
        self.transport.write(b"".join(head) + b"\r\n" + body)
        # Closing with unread input would reset the connection and take the answer away from the client.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)
