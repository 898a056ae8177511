"""Runs the real HTTP server on a real socket, its event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import uvloop
from fake_engine import MODEL_FOLDER, Brain, FakeEngine, Writer

from engine.config import EngineConfig, ServerConfig
from engine.server import App, create_app, serve
from engine.text import ChatFormat, HarmonyChat, Tokenizer

R = TypeVar("R")
TOKENIZER = Tokenizer.from_folder(MODEL_FOLDER)
CHAT = HarmonyChat(TOKENIZER)
SERVER = ServerConfig(port=0, drain_timeout_seconds=5.0)


@dataclass
class RunningServer:
    """A server under test; `call` runs a function on its event loop."""

    url: str
    app: App
    engine: FakeEngine
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    result: list[bool]

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 0

    def call(self, function: Callable[..., R], *args: Any) -> R:
        async def run() -> R:
            return function(*args)

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def connect(self, timeout: float = 10.0, receive_buffer: int | None = None) -> socket.socket:
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(timeout)
        try:
            sock.connect(self.address)
        except OSError:
            sock.close()
            raise
        return sock

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=10, trust_env=False, **options)

    def stop(self) -> bool:
        """Drain and return whether it was clean."""
        self.loop.call_soon_threadsafe(self.app.begin_drain)
        self.thread.join(15)
        assert not self.thread.is_alive()
        return self.result[0]


@contextlib.contextmanager
def running(
    write: Writer | None = None,
    *,
    server: ServerConfig = SERVER,
    config: EngineConfig | None = None,
    chat_format: ChatFormat | None = CHAT,
    stall_seconds: float = 30.0,
    defaults: dict[str, float] | None = None,
) -> Iterator[RunningServer]:
    """Serve a fake engine until the block is left."""
    base = config or EngineConfig(model="tiny-oss")
    engine = FakeEngine(write or Brain(TOKENIZER))
    app = create_app(replace(base, server=server), engine, TOKENIZER, chat_format, generation_defaults=defaults)
    listening = threading.Event()
    urls: list[str] = []
    result: list[bool] = []
    loop = uvloop.new_event_loop()

    def on_listening(url: str) -> None:
        urls.append(url)
        listening.set()

    def work() -> None:
        asyncio.set_event_loop(loop)
        try:
            result.append(
                loop.run_until_complete(
                    serve(app, server, on_listening, handle_signals=False, stall_seconds=stall_seconds)
                )
            )
        finally:
            loop.close()
            listening.set()

    thread = threading.Thread(target=work, name="server")
    thread.start()
    assert listening.wait(10)
    assert urls, "the server did not start"
    running_server = RunningServer(urls[0], app, engine, loop, thread, result)
    try:
        yield running_server
    finally:
        if thread.is_alive():
            running_server.stop()


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Poll until the condition holds."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if condition():
            return True
        pause.wait(0.01)
    return condition()
