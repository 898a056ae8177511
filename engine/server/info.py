"""The routes that say what the server is and how it feels: models, health, version, metrics.

Knows states and the model card. Nothing here waits for the engine.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from engine.async_engine import EngineState
from engine.server import errors
from engine.server.http import Exchange

if TYPE_CHECKING:
    from engine.server.app import App

_METRICS_TYPE = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")


async def root(app: App, exchange: Exchange) -> None:
    await exchange.answer_json(200, {"name": "hlaunch", "version": app.version, "model": app.model_names[0]})


async def live(app: App, exchange: Exchange) -> None:
    """200 while the event loop turns, also while draining."""
    await exchange.answer_json(200, {"status": "live"})


async def ready(app: App, exchange: Exchange) -> None:
    """200 when requests are taken; else 503 with the state, which is the engine's and not the web server's."""
    state = state_of(app)
    body: dict[str, Any] = {"status": state, "model": app.model_names[0]}
    if state == "degraded":
        # People look here first when a replica is gone.
        body["engines"] = app.engine.states_by_engine()
    if state in ("ready", "degraded"):
        await exchange.answer_json(200, body)
        return
    if state == "starting":
        body["progress_percent"] = int(app.engine.load_fraction * 100)
    await exchange.answer_json(503, body, [(b"retry-after", b"2")])


async def version(app: App, exchange: Exchange) -> None:
    await exchange.answer_json(200, {"version": app.version})


async def metrics(app: App, exchange: Exchange) -> None:
    engine = app.engine
    text = app.metrics.render(
        engine.stats_by_engine(), engine.usage_by_engine(), app.lifecycle.num_running, state_of(app)
    )
    await exchange.answer(200, text, content_type=_METRICS_TYPE)


async def list_models(app: App, exchange: Exchange) -> None:
    cards = [model_card(app, name, exchange) for name in app.model_names]
    body: dict[str, Any] = {"object": "list", "data": cards}
    if b"anthropic-version" in exchange.headers:
        body |= {"has_more": False, "first_id": cards[0]["id"], "last_id": cards[-1]["id"]}
    await exchange.answer_json(200, body)


async def get_model(app: App, exchange: Exchange) -> None:
    """Answer one model; ids may hold slashes."""
    name = exchange.path.removeprefix("/v1/models/")
    check_model(app, name)
    await exchange.answer_json(200, model_card(app, name, exchange))


def check_model(app: App, name: str) -> None:
    """Raise 404 `model_not_found` unless this server serves the model under that name."""
    if name not in app.model_names:
        raise errors.model_not_found(name)


def model_card(app: App, name: str, exchange: Exchange) -> dict[str, Any]:
    limit = app.engine.max_model_len
    card: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": app.created,
        "owned_by": "hlaunch",
        "root": app.model_names[0],
        "max_model_len": limit,
        "context_length": limit,
        "max_output_tokens": limit,
        "vocab_size": app.engine.model.vocab_size,
        "capabilities": {
            "tools": app.chat_format is not None,
            "reasoning": app.chat_format is not None,
            "vision": False,
            "embeddings": False,
        },
    }
    if b"anthropic-version" in exchange.headers:
        created_at = datetime.fromtimestamp(app.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        card |= {
            "type": "model",
            "display_name": name,
            "created_at": created_at,
            "lifecycle": "active",
            "max_input_tokens": limit,
            "max_tokens": limit,
        }
        card["capabilities"] |= _anthropic_capabilities(has_chat=app.chat_format is not None)
    return card


def _anthropic_capabilities(*, has_chat: bool) -> dict[str, Any]:
    """Say in Anthropic's form what the messages route does; every field there is an object."""

    def says(is_supported: bool, **parts: Any) -> dict[str, Any]:
        return {"supported": is_supported, **parts}

    no, chat = says(False), says(has_chat)
    kinds = dict.fromkeys(("adaptive", "between_tools", "disabled", "enabled"), chat)
    efforts = dict.fromkeys(("low", "medium", "high", "xhigh", "max"), chat)
    return {
        "batch": no,
        "citations": no,
        "code_execution": no,
        "context_management": no,
        "effort": says(has_chat, **efforts),
        "image_input": no,
        "pdf_input": no,
        "server_tools": says(False, code_execution=no, web_search=no),
        "structured_outputs": no,
        "thinking": says(has_chat, types=kinds),
    }


def state_of(app: App) -> str:
    """Return the state of the service: the drain of this process first, then the engine's."""
    state = app.engine.state
    if app.lifecycle.is_draining and state in (
        EngineState.READY,
        EngineState.DEGRADED,
        EngineState.STARTING,
    ):
        return "draining"
    return state.value


def check_accepting(app: App) -> None:
    """Raise 503 (or 500 for a dead engine) unless new generations are taken."""
    state = app.engine.state
    if state is EngineState.FAILED:
        raise errors.engine_dead()
    if app.lifecycle.is_draining or state in (EngineState.DRAINING, EngineState.STOPPED):
        raise errors.draining()
    if state is EngineState.STARTING:
        raise errors.loading(app.engine.load_fraction)
