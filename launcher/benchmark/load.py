"""Put a fixed load on a server and time every token.

Closed loop: `concurrency` clients, each with one request in flight, until `num_requests` are done. Prompts are random
token ids, so no two share a prefix; `ignore_eos` makes every answer `output_tokens` long.

TTFT: request sent to first event with a choice. ITL: time between two such events of a stream, times the events per
token of that answer where that is below one: a server may put several tokens into one event, and none says how many, so
the mean is right and the percentiles are of events. Throughput: output tokens of all requests over the wall time of the
whole level.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from launcher.client import Client
from launcher.errors import HlaunchError


@dataclass(frozen=True, slots=True)
class Workload:
    """What each request asks for. Lengths count tokens; `vocab_size` bounds the random prompt ids."""

    model: str
    input_tokens: int
    output_tokens: int
    vocab_size: int
    seed: int = 0


@dataclass(slots=True)
class RequestTimes:
    """Times of one request, in seconds since it was sent."""

    ttft: float = 0.0
    total: float = 0.0
    gaps: list[float] = field(default_factory=list)
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LevelResult:
    """All requests of one concurrency. `wall_seconds` runs from the first request to the last answer."""

    concurrency: int
    wall_seconds: float
    requests: list[RequestTimes]
    errors: list[str]

    @property
    def output_tokens(self) -> int:
        return sum(request.output_tokens for request in self.requests)


def run_level(
    base_url: str,
    api_key: str | None,
    workload: Workload,
    concurrency: int,
    num_requests: int,
    on_done: Callable[[int], None] = lambda _: None,
    *,
    phase: str = "",
) -> LevelResult:
    """Run `num_requests` requests with `concurrency` of them in flight; each `phase` draws prompts of its own."""
    results: list[RequestTimes] = []
    errors: list[str] = []
    lock = threading.Lock()
    remaining = iter(range(num_requests))

    def client_loop() -> None:
        client = Client(base_url, api_key)
        while True:
            with lock:
                index = next(remaining, None)
            if index is None:
                client.close()
                return
            try:
                times = _run_request(client, workload, random.Random(f"{workload.seed}/{phase}/{concurrency}/{index}"))
            except (HlaunchError, ValueError) as error:
                # ValueError: an answer that is no JSON, from whatever listens there.
                with lock:
                    errors.append(str(error))
                continue
            with lock:
                results.append(times)
                on_done(len(results))

    begin = time.perf_counter()
    threads = [threading.Thread(target=client_loop, daemon=True) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return LevelResult(concurrency, time.perf_counter() - begin, results, errors)


def _run_request(client: Client, workload: Workload, source: random.Random) -> RequestTimes:
    prompt = [source.randrange(workload.vocab_size) for _ in range(workload.input_tokens)]
    body = {
        "model": workload.model,
        "prompt": prompt,
        "max_tokens": workload.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    times = RequestTimes()
    sent = time.perf_counter()
    arrivals: list[float] = []
    for event in client.stream("/v1/completions", body):
        if event.data.get("choices"):
            arrivals.append(event.at)
        elif event.data.get("usage"):
            times.output_tokens = int(event.data["usage"]["completion_tokens"])
    if not arrivals:
        raise HlaunchError("an answer without a single token event")
    times.ttft = arrivals[0] - sent
    times.total = time.perf_counter() - sent
    times.output_tokens = times.output_tokens or len(arrivals)
    # The first event's tokens end no gap, so an answer that came as one event has none.
    share = len(arrivals) / max(1, times.output_tokens)
    times.gaps = [(later - earlier) * min(1.0, share) for earlier, later in zip(arrivals, arrivals[1:], strict=False)]
    return times
