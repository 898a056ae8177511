"""Fetch, wait, fetch again: a server's pictures one after the other, and what happens when it does not answer.

Knows: intervals, deadlines, patience. Refuses to know: how a picture is shown. A server that stops answering is waited
for a while, as it may be restarting; one of ours whose launcher is gone will not come back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from launcher.client import ApiError, Client
from launcher.errors import EngineFailed, HlaunchError
from launcher.top.exposition import MAX_TEXT_BYTES, parse
from launcher.top.figures import Figures, Watch
from launcher.top.reading import read

PATIENCE_SECONDS = 10.0
"""How long a server that was seen may stay silent."""
MAX_WAIT_SECONDS = 5.0
"""How long one answer may take: a picture older than that is none."""


@dataclass(frozen=True, slots=True)
class Moment:
    """The latest picture; `trouble` says why it is not from now, and is empty when it is."""

    figures: Figures
    trouble: str = ""


def watch(
    url: str,
    api_key: str | None,
    interval: float,
    *,
    is_alive: Callable[[], bool] = lambda: True,
    patience_seconds: float = PATIENCE_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Moment]:
    """Yield a picture about every `interval` seconds, without end.

    Raises: EngineFailed when the first reading fails or the server stays silent, MetricsInvalid and NotAModelServer
    for a first answer that is no model server's, UsageError for a bad address.
    """
    client = Client(url, api_key, read_timeout_seconds=MAX_WAIT_SECONDS)
    state = Watch()
    figures: Figures | None = None
    answered = clock()
    try:
        while True:
            began = clock()
            trouble = ""
            try:
                text = client.text("/metrics", MAX_TEXT_BYTES)
                # Its moment is when it was asked for: what the answer costs must not look like a slower server.
                figures = state.add(began, read(parse(text)))
                answered = clock()
            except HlaunchError as error:
                if figures is None or (isinstance(error, ApiError) and error.status in (401, 403)):
                    raise _explained(error, url) from error
                if not is_alive():
                    raise EngineFailed(f"{url} is gone: its launcher has ended", hint="see: hlaunch ps") from error
                silent = clock() - answered
                if silent > patience_seconds:
                    raise EngineFailed(
                        f"{url} has not answered for {silent:.0f} s", details=(error.message,)
                    ) from error
                trouble = f"no figures for {silent:.0f} s: {error.message}"
            yield Moment(figures, trouble)
            sleep(max(0.0, interval - (clock() - began)))
    finally:
        client.close()


def _explained(error: HlaunchError, url: str) -> HlaunchError:
    if not isinstance(error, ApiError):
        return error
    hints = {
        401: "it asks for an API key; run: export HLAUNCH_API_KEY=…",
        403: "it refuses this API key",
        404: "it serves no /metrics; SGLang needs --enable-metrics",
    }
    return EngineFailed(f"{url}/metrics: {error.message}", hint=hints.get(error.status, ""))
