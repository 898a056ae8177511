"""Which generations run, and how the server stops taking new ones.

Knows: the set of running generations and the order of a shutdown (drain, then interrupt). Refuses to know sockets and
signals (`listen`) and what a generation is made of.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from engine.server.errors import ApiError


class Interruptible(Protocol):
    """Something that runs and can be ended with an error."""

    def interrupt(self, error: ApiError | None) -> None: ...


class Lifecycle:
    """Generations under way, in order of arrival, and the drain."""

    def __init__(self) -> None:
        self._running: dict[Interruptible, None] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._drain = asyncio.Event()

    @property
    def is_draining(self) -> bool:
        return self._drain.is_set()

    @property
    def num_running(self) -> int:
        return len(self._running)

    def enter(self, work: Interruptible) -> None:
        self._running[work] = None
        self._idle.clear()

    def leave(self, work: Interruptible) -> None:
        self._running.pop(work, None)
        if not self._running:
            self._idle.set()

    def begin_drain(self) -> None:
        """Refuse new generations from now on; running ones go on. Idempotent."""
        self._drain.set()

    async def wait_drain(self) -> None:
        await self._drain.wait()

    async def wait_idle(self, timeout_seconds: float) -> bool:
        """Wait until nothing runs; False when the time is over first."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_seconds)
        except TimeoutError:
            return False
        return True

    def interrupt_all(self, error: ApiError) -> None:
        """End every running generation with `error`."""
        for work in list(self._running):
            work.interrupt(error)
