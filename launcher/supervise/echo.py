"""Lines to a terminal that may be stopped (Ctrl-S, a stalled pipe) without ever stopping the supervisor.

Knows: a bounded queue and one writing thread; what does not fit is counted and dropped, the log has it. Refuses to
know: what a line says and how it is printed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

_MAX_WAITING_LINES = 2000


class Echo:
    """Hands lines to `write` on its own thread. `say` never blocks."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._lines: queue.Queue[str | None] = queue.Queue(_MAX_WAITING_LINES)
        self._num_dropped = 0
        self._thread = threading.Thread(target=self._run, name="echo", daemon=True)
        self._thread.start()

    def say(self, line: str) -> None:
        """Queue a line, or count it as dropped."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._num_dropped += 1

    def close(self, timeout_seconds: float = 1.0) -> bool:
        """Write what waits, within the timeout. Returns whether the reader kept up."""
        try:
            self._lines.put(None, timeout=timeout_seconds)
        except queue.Full:
            return False
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._write(line)
                dropped, self._num_dropped = self._num_dropped, 0
                if dropped:
                    self._write(f"({dropped} lines not shown here; hlaunch logs has them)")
            except (OSError, ValueError):
                # The terminal is gone; the log goes on.
                continue
