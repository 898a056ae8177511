"""When an engine that died is started again. Pure: times come in, seconds go out.

Knows: what was tried in the last ten minutes, and whether it was of use. Refuses to know: processes, clocks.
"""

from __future__ import annotations

from collections import deque

WINDOW_SECONDS = 600.0
FIRST_BACKOFF_SECONDS = 1.0
LAST_BACKOFF_SECONDS = 60.0
_LAST_DOUBLING = 6


class Restarts:
    """One engine's starts after its first: after 1, 2, 4 … 60 s, at most `limit` of them in ten minutes.

    The wait doubles while starts come to nothing. An engine that has answered a request before it died is in no such
    loop, and is back after the first wait; the limit counts it all the same. One that has used its starts up is given
    up: it waits until the first of them is ten minutes old, while others serve.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._starts: deque[float] = deque()
        self._num_futile = 0
        self.is_given_up = False

    def next_wait(self, now: float, *, has_served: bool) -> float | None:
        """Take in that the engine failed at `now`; seconds until it is to be started, or None when it never is."""
        while self._starts and now - self._starts[0] >= WINDOW_SECONDS:
            self._starts.popleft()
        self.is_given_up = len(self._starts) >= self._limit
        if not self._limit:
            return None
        if has_served:
            self._num_futile = 0
        wait = min(LAST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * (1 << min(self._num_futile, _LAST_DOUBLING)))
        self._num_futile += 1
        if self.is_given_up:
            wait = max(wait, self._starts[0] + WINDOW_SECONDS - now)
        self._starts.append(now + wait)
        return wait

    def begin(self) -> None:
        """Take in that the engine is being started: it may serve again."""
        self.is_given_up = False
