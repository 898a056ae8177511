"""The listening socket and the life of the HTTP server: bind, serve, drain, stop.

Knows: uvicorn and signals. Refuses to know routes, engines and what a request is.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import uvicorn

from engine.config import ServerConfig
from engine.server import errors
from engine.server.protocol import GuardedProtocol, Limits

if TYPE_CHECKING:
    from engine.server.app import App

BACKLOG = 1024
# The kernel doubles it. Small, so that a reader that stopped is noticed after about 200 KiB.
SEND_BUFFER_BYTES = 64 * 1024
STALL_SECONDS = 30.0
CLOSE_SECONDS = 3.0


def bind(config: ServerConfig) -> socket.socket:
    """Open the listening socket, so that a port in use is known before anything heavy starts.

    Raises: OSError (EADDRINUSE, EACCES, an unknown host).
    """
    info = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = info[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def url_of(sock: socket.socket) -> str:
    """Return the address of a bound socket as a client would write it."""
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handling: a drain here keeps answering `/ready` while it lasts."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    app: App,
    config: ServerConfig,
    on_listening: Callable[[str], None] | None = None,
    *,
    sock: socket.socket | None = None,
    handle_signals: bool = True,
    stall_seconds: float = STALL_SECONDS,
) -> bool:
    """Serve until `app.begin_drain()` or SIGTERM/SIGINT, drain, and return whether every request finished by itself.

    `on_listening(url)` is called once connections are accepted. While draining the listener stays open, so that
    `/ready` and new requests get their 503; after `drain_timeout_seconds`, or on a second signal, running requests end
    with an error event. Returns at most about 5 s after the drain's end.
    Raises: OSError when `sock` is None and the address cannot be bound.
    """
    listener = sock if sock is not None else bind(config)
    limits = Limits.from_config(config, stall_seconds)
    server = _Server(
        uvicorn.Config(
            cast(Any, app),
            http=cast(Any, functools.partial(GuardedProtocol, limits=limits)),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=cast(int, config.keep_alive_seconds),
            timeout_graceful_shutdown=cast(int, CLOSE_SECONDS),
        )
    )
    hurry = asyncio.Event()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    with _signals(app, hurry) if handle_signals else contextlib.nullcontext():
        while not server.started and not serving.done():
            await asyncio.sleep(0.001)
        if on_listening is not None and not serving.done():
            on_listening(url_of(listener))
        draining = asyncio.create_task(app.lifecycle.wait_drain())
        await asyncio.wait((serving, draining), return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
        is_clean = await _drain(app, config.drain_timeout_seconds, hurry)
        server.should_exit = True
        await serving
    return is_clean


async def _drain(app: App, timeout_seconds: float, hurry: asyncio.Event) -> bool:
    """Let running requests finish; interrupt what is left after the time or a second signal."""
    idle = asyncio.create_task(app.lifecycle.wait_idle(timeout_seconds))
    hurried = asyncio.create_task(hurry.wait())
    await asyncio.wait((idle, hurried), return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    if idle.done() and idle.result():
        return True
    idle.cancel()
    app.lifecycle.interrupt_all(errors.draining())
    await app.lifecycle.wait_idle(CLOSE_SECONDS)
    return False


@contextlib.contextmanager
def _signals(app: App, hurry: asyncio.Event) -> Iterator[None]:
    """First SIGTERM or SIGINT drains, the second one interrupts."""
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if app.lifecycle.is_draining:
            hurry.set()
        app.begin_drain()

    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
