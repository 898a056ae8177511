"""The table of routes: path → method → handler. A route that is not here does not exist."""

from __future__ import annotations

from engine.server import chat, completions, info, tokens
from engine.server.app import Handler
from engine.server.messages import answer as messages
from engine.server.responses import answer as responses


def _read(handler: Handler) -> dict[str, Handler]:
    return {"GET": handler, "HEAD": handler}


ROUTES: dict[str, dict[str, Handler]] = {
    "/": _read(info.root),
    "/live": _read(info.live),
    "/ready": _read(info.ready),
    "/health": _read(info.ready),
    "/version": _read(info.version),
    "/metrics": _read(info.metrics),
    "/v1/models": _read(info.list_models),
    "/v1/completions": {"POST": completions.create_completion},
    "/v1/chat/completions": {"POST": chat.create_chat_completion},
    "/v1/messages": {"POST": messages.create_message},
    "/v1/messages/count_tokens": {"POST": messages.count_message_tokens},
    "/v1/responses": {"POST": responses.create_response},
    "/v1/responses/input_tokens": {"POST": responses.count_response_tokens},
    "/tokenize": {"POST": tokens.tokenize},
    "/detokenize": {"POST": tokens.detokenize},
}

# For `/v1/models/{id}`, whose id may hold slashes.
MODEL_ROUTE: dict[str, Handler] = _read(info.get_model)
