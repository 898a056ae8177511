"""Clients that leave at random points leave nothing behind."""

from __future__ import annotations

import asyncio
import json
import random
import time
import urllib.request
from urllib.parse import urlsplit

from e2e_support import Running
from prometheus_client.parser import text_string_to_metric_families

NUM_CLIENTS = 2000
NUM_AT_ONCE = 48


def gauges(url: str) -> dict[str, float]:
    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    wanted = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name in wanted
    }


async def one_client(host: str, port: int, source: random.Random) -> None:
    """Send a request (or a part of one), read up to a random point, leave without a word."""
    reader, writer = await asyncio.open_connection(host, port)
    body = json.dumps(
        {
            "model": "tiny-oss",
            "prompt": "".join(source.choice("abcdefgh ,.") for _ in range(source.randrange(1, 400))),
            "max_tokens": source.randrange(1, 200),
            "stream": source.random() < 0.7,
            "n": source.choice((1, 1, 1, 2)),
            "ignore_eos": True,
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    data = head + body
    if source.random() < 0.1:
        data = data[: source.randrange(1, len(data))]
    writer.write(data)
    await writer.drain()
    budget = source.choice((0, 0, 1, 300, 2000, 20000))
    deadline = asyncio.get_running_loop().time() + source.random() * 0.4
    while budget > 0:
        left = deadline - asyncio.get_running_loop().time()
        if left <= 0:
            break
        try:
            chunk = await asyncio.wait_for(reader.read(min(budget, 4096)), left)
        except TimeoutError:
            break
        if not chunk:
            break
        budget -= len(chunk)
    if source.random() < 0.5:
        writer.transport.abort()
    else:
        writer.close()


async def storm(host: str, port: int) -> int:
    source = random.Random(20)
    indices = iter(range(NUM_CLIENTS))
    num_done = 0

    async def client_loop() -> None:
        nonlocal num_done
        for index in indices:
            await one_client(host, port, random.Random(f"{source.random()}/{index}"))
            num_done += 1

    await asyncio.gather(*(client_loop() for _ in range(NUM_AT_ONCE)))
    return num_done


def test_two_thousand_disconnects_leave_no_block_in_use(running: Running) -> None:
    parts = urlsplit(running.url)
    assert parts.hostname is not None
    assert parts.port is not None
    assert asyncio.run(storm(parts.hostname, parts.port)) == NUM_CLIENTS
    deadline = time.monotonic() + 10
    while any(found := gauges(running.url).values()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(gauges(running.url)) == 3
    assert not any(found), gauges(running.url)
    body = json.dumps({"model": "tiny-oss", "prompt": "ROMEO:", "max_tokens": 5}).encode()
    request = urllib.request.Request(f"{running.url}/v1/completions", body, {"Content-Type": "application/json"})
    answer = json.loads(urllib.request.urlopen(request, timeout=30).read())
    assert answer["usage"]["completion_tokens"] == 5
