"""POST /v1/messages, first half: the body → a conversation and a plan of its reply.

Knows which fields Anthropic's clients send and what they mean for a model of another house. Refuses to know answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from engine.server import errors, info
from engine.server.choices import check_sharing
from engine.server.conversation import Conversation, plan_reply, render, render_to_count
from engine.server.errors import ApiError
from engine.server.http import Exchange
from engine.server.messages.blocks import read_messages, read_tools
from engine.server.parsing import check_fields, convert, sampling_params
from engine.server.reply import ReplyPlan
from engine.server.schemas import CountTokensBody, MessagesBody
from engine.text import PromptTooLong

if TYPE_CHECKING:
    from engine.server.app import App

# Names of models that Anthropic's clients ask for by themselves, for titles and for small work.
ALIAS_PREFIX = "claude-"
MIN_BUDGET_TOKENS = 1024
# A budget is no limit that the model knows: it chooses among the efforts that it does know.
LOW_BUDGET_TOKENS, MEDIUM_BUDGET_TOKENS = 2 * 1024, 8 * 1024
SESSION_HEADER = b"x-claude-code-session-id"

Thinking = Literal["hidden", "shown", "omitted"]


@dataclass(frozen=True, slots=True)
class MessagesPlan:
    """A request, understood. `is_context_limited` says that the context ends before `max_tokens` does."""

    reply: ReplyPlan
    thinking: Thinking
    is_context_limited: bool


def plan_messages(app: App, exchange: Exchange, data: dict[str, Any]) -> MessagesPlan:
    """Check a body, render and tokenize its prompt, and make the engine request.

    Raises: ApiError 400 naming the field, 404 for another model.
    """
    check_fields(data, MessagesBody)
    body = convert(data, MessagesBody)
    model = _served_model(app, exchange, body.model)
    check_sharing(body)
    if body.max_tokens < 1:
        raise errors.invalid_value("max_tokens", "max_tokens: must be at least 1.")
    if body.temperature is not None and not 0 <= body.temperature <= 1:
        raise errors.invalid_value("temperature", "temperature: must be between 0 and 1.")
    if body.prompt_cache_key is None and SESSION_HEADER in exchange.headers:
        # The requests of one session go to the engine that holds its prefix.
        body.prompt_cache_key = exchange.headers[SESSION_HEADER].decode("latin-1")
    conversation, thinking, parallel_tool_calls = _read(body, exchange)
    params = sampling_params(
        body,
        defaults=app.generation_defaults,
        max_tokens=body.max_tokens,
        logprobs=None,
        vocab_size=app.engine.model.vocab_size,
        stop=body.stop_sequences,
        names={"stop": "stop_sequences"},
    )
    limit = app.engine.max_model_len
    try:
        prompt = render(app, exchange, conversation, limit)
    except PromptTooLong:
        raise _prompt_too_long(f"more than {limit}", limit) from None
    room = limit - len(prompt.ids)
    if room < 1:
        raise _prompt_too_long(str(len(prompt.ids)), limit)
    reply = plan_reply(
        app,
        conversation,
        prompt,
        body,
        params,
        id_prefix="msg_",
        model=model,
        max_tokens=min(body.max_tokens, room),
        parallel_tool_calls=parallel_tool_calls,
        includes_reasoning=thinking != "hidden",
    )
    return MessagesPlan(reply, thinking, is_context_limited=body.max_tokens > room)


def count_tokens(app: App, exchange: Exchange, data: dict[str, Any]) -> int:
    """Return the number of tokens that a request's prompt has.

    Raises: as `plan_messages`, but that the prompt may be longer than the context.
    """
    check_fields(data, CountTokensBody)
    body = convert(data, CountTokensBody)
    _served_model(app, exchange, body.model)
    conversation, _, _ = _read(body, exchange)
    return len(render_to_count(app, exchange, conversation))


def _read(body: CountTokensBody, exchange: Exchange) -> tuple[Conversation, Thinking, bool]:
    messages, is_continuation = read_messages(body)
    tools, parallel_tool_calls = read_tools(body, exchange)
    effort = _effort(body)
    thinking, thinking_effort = _thinking(body, exchange)
    conversation = Conversation(
        messages,
        tools,
        effort=effort or thinking_effort,
        is_continuation=is_continuation,
        effort_param="output_config.effort",
    )
    if is_continuation and tools.forced is not None:
        raise errors.invalid_value("tool_choice", "tool_choice: a call cannot continue a final assistant message.")
    return conversation, thinking, parallel_tool_calls


def _served_model(app: App, exchange: Exchange, name: str) -> str:
    """Return the model that serves a name; Anthropic's own names stand for the first model."""
    if name not in app.model_names and name.startswith(ALIAS_PREFIX):
        exchange.warn(f"model {name[:64]} is served as {app.model_names[0]}")
        return app.model_names[0]
    info.check_model(app, name)
    return name


def _effort(body: CountTokensBody) -> str | None:
    config = body.output_config or {}
    if config.get("format") is not None:
        raise errors.unsupported_parameter(
            "output_config.format", "output_config.format: structured output is not supported yet."
        )
    effort = config.get("effort")
    if effort is not None and not isinstance(effort, str):
        raise errors.invalid_value("output_config.effort", "output_config.effort: expected string.")
    return effort


def _thinking(body: CountTokensBody, exchange: Exchange) -> tuple[Thinking, str | None]:
    """Read `thinking`: whether the reply shows it, and the effort that it asks for.

    Who does not ask for thinking blocks gets none: their first block is text, and programs rely on it.
    """
    raw = body.thinking
    if raw is None:
        return "hidden", None
    kind, display = raw.get("type"), raw.get("display")
    if kind == "disabled":
        return "hidden", "low"
    if kind not in ("enabled", "adaptive", "between_tools"):
        raise errors.invalid_value(
            "thinking.type", "thinking.type: must be 'enabled', 'adaptive', 'between_tools' or 'disabled'."
        )
    if display not in (None, "summarized", "omitted"):
        raise errors.invalid_value("thinking.display", "thinking.display: must be 'summarized' or 'omitted'.")
    return "omitted" if display == "omitted" else "shown", _budget_effort(raw, exchange) if kind == "enabled" else None


def _budget_effort(raw: dict[str, Any], exchange: Exchange) -> str:
    budget = raw.get("budget_tokens")
    if type(budget) is not int or budget < MIN_BUDGET_TOKENS:
        raise errors.invalid_value(
            "thinking.budget_tokens", f"thinking.budget_tokens: expected an integer of at least {MIN_BUDGET_TOKENS}."
        )
    effort = "low" if budget <= LOW_BUDGET_TOKENS else "medium" if budget <= MEDIUM_BUDGET_TOKENS else "high"
    exchange.warn(f"thinking.budget_tokens is served as effort {effort}")
    return effort


def _prompt_too_long(num_tokens: str, limit: int) -> ApiError:
    """The sentence by which Claude Code knows that it must compact the conversation; keep every word."""
    return ApiError(
        400,
        "invalid_request_error",
        "context_length_exceeded",
        f"prompt is too long: {num_tokens} tokens > {limit} maximum",
    )
