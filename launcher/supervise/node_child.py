"""A process below a node's loop: its pipes in the loop's selector, its lines handed on, its end without remains.

Knows: when a pipe is at its end. Refuses to know: what lines mean, when a child is to end.
"""

from __future__ import annotations

import contextlib
import os
import selectors
from collections.abc import Callable, Mapping

from launcher.supervise.engine_process import EngineProcess
from launcher.supervise.status import LineSplitter


class NodeChild:
    """A running process and who hears its pipes: `hears` maps a descriptor to what takes one line of it."""

    def __init__(
        self,
        process: EngineProcess,
        selector: selectors.BaseSelector,
        hears: Mapping[int, Callable[[bytes], None]],
    ) -> None:
        self.process = process
        self._selector = selector
        self._hears = hears
        self._splitters = {fd: LineSplitter() for fd in hears}
        for fd in hears:
            selector.register(fd, selectors.EVENT_READ, self)

    def on_event(self, fd: int) -> None:
        """Take what a pipe holds; one at its end leaves the selector."""
        if not self._read(fd):
            self._selector.unregister(fd)

    def drain(self) -> None:
        """Take the last words of a process that is gone, as far as they are there."""
        for fd in self._hears:
            while _is_readable(fd) and self._read(fd):
                pass

    def end(self) -> None:
        """Hear the rest, kill what is left of it, close its pipes."""
        self.drain()
        self.process.kill_all()
        for fd in self._hears:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(fd)
        self.process.close()

    def _read(self, fd: int) -> bool:
        """Hand on what a pipe holds. Returns False at its end."""
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        for line in self._splitters[fd].feed(data):
            self._hears[fd](line)
        return bool(data)


def _is_readable(fd: int) -> bool:
    with selectors.DefaultSelector() as ready:
        ready.register(fd, selectors.EVENT_READ)
        return bool(ready.select(0))
