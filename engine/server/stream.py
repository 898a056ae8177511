"""An answer as server-sent events: opened with the first token, kept alive while the model is silent.

Knows the order of an answer on the wire. Refuses to know what the chunks say.
"""

from __future__ import annotations

import asyncio
import time
from types import TracebackType

from engine.server.http import Exchange

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
PING_SECONDS = 15.0


class EventStream:
    """Sends chunks; a `ping` goes out after `PING_SECONDS` of silence, and `done` comes last.

    The answer is opened by the first chunk and not earlier, so that until then a failure is still an HTTP status.
    """

    def __init__(
        self, exchange: Exchange, ping_seconds: float = PING_SECONDS, *, ping: bytes = PING, done: bytes = DONE
    ) -> None:
        self._exchange = exchange
        self._ping_data = ping
        self._done_data = done
        self._ping_seconds = ping_seconds
        self._sent_at = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._ping: asyncio.Task[None] | None = None

    async def __aenter__(self) -> EventStream:
        self._arm()
        return self

    async def __aexit__(
        self, type_: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._ping is not None:
            self._ping.cancel()

    async def send(self, data: bytes) -> None:
        self._sent_at = time.monotonic()
        if not self._exchange.started:
            await self._exchange.open_stream()
        await self._exchange.send_chunk(data)

    async def end(self, data: bytes = b"") -> None:
        """Send the last chunks and what says that they are."""
        await self.__aexit__(None, None, None)
        if not self._exchange.started:
            await self._exchange.open_stream()
        await self._exchange.end_stream(data + self._done_data)

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._ping_seconds / 2, self._tick)

    def _tick(self) -> None:
        is_silent = time.monotonic() - self._sent_at >= self._ping_seconds
        if is_silent and (self._ping is None or self._ping.done()):
            self._ping = asyncio.create_task(self.send(self._ping_data))
        self._arm()
