"""The HTTP server: OpenAI's and Anthropic's APIs over an engine. It never imports torch.

| module | holds |
|---|---|
| `app` | `create_app` → `App`, the ASGI callable: guard, router, error funnel |
| `listen` | `bind`, `serve`: the socket, uvicorn, signals, drain |
| `protocol` | one connection's limits: header size, read timers, slow readers |
| `guard`, `errors`, `http`, `lifecycle`, `metrics` | keys and hosts; the error shape; raw ASGI tools; drain; counters |
| `schemas`, `parsing` | the bodies as structs; JSON → struct with errors that name the path |
| `generation` | one HTTP request's sequences in the engine, as one stream of events |
| `conversation`, `tools`, `reply` | what the chat dialects share: body → prompt and plan, tools, outputs → pieces |
| `turns` | history in blocks or items → messages, for the two dialects that cut it so |
| `chat`, `completions`, `messages`, `responses` | the dialects |
| `tokens`, `info`, `routes` | the small routes; the table of all |

Names are loaded when first used, so that the process entry stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.server.app import App, create_app
    from engine.server.listen import bind, serve, url_of

__all__ = ["App", "bind", "create_app", "serve", "url_of"]

_HOMES = {
    "App": "engine.server.app",
    "create_app": "engine.server.app",
    "bind": "engine.server.listen",
    "serve": "engine.server.listen",
    "url_of": "engine.server.listen",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine.server' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
