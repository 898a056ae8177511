"""The application: one ASGI callable that guards, routes and funnels every error.

    guard (Host, Origin, key) -> router on scope["path"] -> handler -> answer, or ApiError -> answer

Knows: which handler serves which path and method. Refuses to know dialects: `chat`, `completions`, `tokens`, `info`.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from engine.async_engine import EngineClient
from engine.config import EngineConfig
from engine.server import errors
from engine.server.errors import ApiError, ClientDisconnected
from engine.server.guard import Guard
from engine.server.http import Exchange, Receive, Scope, Send
from engine.server.lifecycle import Lifecycle
from engine.server.metrics import Metrics
from engine.text import ChatFormat, Tokenizer

P = ParamSpec("P")
R = TypeVar("R")
Handler = Callable[["App", Exchange], Awaitable[None]]

logger = logging.getLogger("hlaunch.server")

# The status nginx logs for a client that left; it exists in metrics only.
STATUS_CLIENT_LEFT = 499
# Text work on more than this many bytes of body leaves the event loop: about 5 ms of tokenizing.
INLINE_TEXT_BYTES = 8 * 1024
TEXT_THREADS = 2
COUNTED_CONTEXTS = 4
"""Routes that only count take prompts of so many contexts, so that a client learns by how much it is over."""


class App:
    """Everything a handler may use. Made by `create_app`; used by `serve`.

    `begin_drain()` refuses new generations; `lifecycle` holds the running ones. The first name in `model_names` is
    what answers carry.
    """

    def __init__(
        self,
        config: EngineConfig,
        engine: EngineClient,
        tokenizer: Tokenizer,
        chat_format: ChatFormat | None,
        generation_defaults: Mapping[str, float],
        version: str,
    ) -> None:
        # The routes import the dialects, which know this module.
        from engine.server.routes import MODEL_ROUTE, ROUTES

        self.config = config
        self.engine = engine
        self.tokenizer = tokenizer
        self.chat_format = chat_format
        self.generation_defaults = dict(generation_defaults)
        self.version = version
        self.model_names = config.server.served_model_names or (Path(config.model).name,)
        self.created = int(time.time())
        self.guard = Guard(config.server)
        self.lifecycle = Lifecycle()
        self.metrics = Metrics(self.model_names[0])
        self._routes = ROUTES
        self._model_route = MODEL_ROUTE
        self._text_threads = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
        self._seed_base = config.seed if config.seed is not None else secrets.randbits(62)
        self._seed_numbers = itertools.count()
        shape = f"{version}/{config.model}/{config.dtype}/{config.device}"
        self.fingerprint = "fp_" + hashlib.sha256(shape.encode()).hexdigest()[:12]

    @property
    def max_counted_tokens(self) -> int:
        """Where tokenizing ends for routes that only count."""
        return COUNTED_CONTEXTS * self.engine.max_model_len

    def begin_drain(self) -> None:
        """Answer 503 on `/ready` and to new generations; running ones go on. Idempotent."""
        self.lifecycle.begin_drain()

    def next_seed(self) -> int:
        """Draw the seed of a request that brought none; a configured seed makes the sequence repeatable."""
        text = f"{self._seed_base}/{next(self._seed_numbers)}".encode("ascii")
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1

    async def run_text(self, num_bytes: int, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run text work: in place when the body is small, else on a thread, so that streams go on meanwhile."""
        if num_bytes <= INLINE_TEXT_BYTES:
            return work(*args, **kwargs)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._text_threads, lambda: work(*args, **kwargs))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send)
        route = "unknown"
        try:
            self.guard.check(exchange)
            route, handler = self._find(exchange)
            await handler(self, exchange)
        except ClientDisconnected:
            exchange.status = STATUS_CLIENT_LEFT
        except ApiError as error:
            await exchange.fail(error)
        except Exception:  # noqa: BLE001 -- the request handler is a named boundary: one request, not the server
            logger.exception("request %s failed", exchange.request_id)
            await exchange.fail(errors.internal_error())
        finally:
            self.metrics.count_response(route, exchange.status)
            if exchange.method == "POST":
                # Ids, sizes and times only; what people wrote is never logged.
                milliseconds = (time.monotonic() - exchange.started_at) * 1000
                logger.info(
                    "%s %s %d, %d bytes, %.1f ms",
                    exchange.request_id,
                    route,
                    exchange.status,
                    exchange.body_bytes,
                    milliseconds,
                )

    def _find(self, exchange: Exchange) -> tuple[str, Handler]:
        path = exchange.path
        methods = self._routes.get(path)
        name = path
        if methods is None and path.startswith("/v1/models/"):
            methods, name = self._model_route, "/v1/models/{id}"
        if methods is None:
            raise errors.unknown_route()
        handler = methods.get(exchange.method)
        if handler is None:
            raise errors.method_not_allowed(tuple(methods))
        return name, handler


def create_app(
    config: EngineConfig,
    engine: EngineClient,
    tokenizer: Tokenizer,
    chat_format: ChatFormat | None = None,
    *,
    generation_defaults: Mapping[str, float] | None = None,
    version: str = "0.1.0",
) -> App:
    """Make the ASGI application.

    `chat_format` None answers chat requests with 400. `generation_defaults` are the model's own `temperature`,
    `top_p` and `top_k` (from `generation_config.json`), used where a request says nothing.
    """
    return App(config, engine, tokenizer, chat_format, generation_defaults or {}, version)
