"""Measure what a streamed token costs the API process.

    PYTHONPATH=. python tests/server/measure_stream.py [STREAMS] [TOKENS]

The scripted engine emits as fast as the loop turns; its own cost is measured alone and taken off. Clients run in a
second process, so that only the server's thread is timed.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import replace

from fake_engine import FakeEngine, Script
from server_support import CHAT, SERVER, TOKENIZER, RunningServer, running

from engine.core.request import EngineRequest
from engine.core.sampling_params import SamplingParams
from engine.text import AssistantReply

CLIENT = """
import asyncio, sys
async def one(host, port, body):
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST {sys.argv[3]} HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Type: application/json\\r\\n"
    writer.write(f"{head}Connection: close\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n".encode() + body)
    size = 0
    while part := await reader.read(1 << 18):
        size += len(part)
    writer.close()
    return size
async def main():
    body = sys.argv[4].encode()
    print(sum(await asyncio.gather(*(one(sys.argv[1], int(sys.argv[2]), body) for _ in range(int(sys.argv[5]))))))
asyncio.run(main())
"""


def script(request: EngineRequest, num_tokens: int) -> Script:
    text = "the king and the sea, " * (num_tokens // 4)
    is_plain = request.request_id.startswith("cmpl-")
    ids = TOKENIZER.encode(text) if is_plain else CHAT.render_completion(AssistantReply(final=text))
    return Script([[i] for i in ids[: num_tokens - 1]] + [[CHAT.ids.return_]])


def engine_alone(num_streams: int, num_tokens: int) -> float:
    """CPU seconds of the scripted engine and its streams, without a server."""

    async def work() -> float:
        engine = FakeEngine(lambda request: script(request, num_tokens))
        requests = [
            EngineRequest(f"chatcmpl-{i}", [1], SamplingParams(), 10**6, 0, (CHAT.ids.return_,))
            for i in range(num_streams)
        ]
        started = time.thread_time()

        async def read(request: EngineRequest) -> None:
            async for _ in engine.submit(request):
                pass

        await asyncio.gather(*(read(request) for request in requests))
        return time.thread_time() - started

    import uvloop

    return uvloop.run(work())


def measure(server: RunningServer, path: str, num_streams: int, body: dict[str, object]) -> tuple[float, float, int]:
    host, port = server.address
    before, tokens = server.call(time.thread_time), server.engine.num_tokens
    started = time.monotonic()
    arguments = [host, str(port), path, json.dumps(body), str(num_streams)]
    subprocess.run([sys.executable, "-c", CLIENT, *arguments], check=True, stdout=subprocess.DEVNULL)
    wall = time.monotonic() - started
    return server.call(time.thread_time) - before, wall, server.engine.num_tokens - tokens


def main() -> None:
    num_streams, num_tokens = (int(text) for text in (*sys.argv[1:3], "64", "400")[:2])
    alone = engine_alone(num_streams, num_tokens) / (num_streams * num_tokens) * 1e6
    print(f"scripted engine alone: {alone:.1f} us per token")
    config = replace(SERVER, max_connections=4096)
    with running(lambda request: script(request, num_tokens), server=config) as server:
        server.engine.max_model_len = 10**6
        for path, prompt in (
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
            ("/v1/messages", {"messages": [{"role": "user", "content": "x"}]}),
            ("/v1/responses", {"input": "x", "max_output_tokens": num_tokens}),
        ):
            for is_streaming in (True, False):
                body = {"model": "tiny-oss", "max_tokens": num_tokens, "stream": is_streaming} | prompt
                cpu, wall, tokens = measure(server, path, num_streams, body)
                kind = "stream" if is_streaming else "whole"
                cost = cpu / tokens * 1e6
                print(
                    f"{path:22} {kind:6} {num_streams} x {num_tokens}: {cost:5.1f} us CPU per token, "
                    f"{cost - alone:5.1f} us without the engine; {tokens / wall:8.0f} tokens/s"
                )


if __name__ == "__main__":
    main()
