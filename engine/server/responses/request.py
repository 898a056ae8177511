"""POST /v1/responses, first half: the body → a conversation and a plan of its reply.

Knows the rules of the body and what a server without a store cannot do. Refuses to know answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from engine.core.sampling_params import MAX_LOGPROBS
from engine.server import errors, info
from engine.server.choices import check_sharing, resolve_max_tokens
from engine.server.conversation import Conversation, plan_reply, render, render_to_count
from engine.server.http import Exchange
from engine.server.parsing import check_fields, convert, sampling_params
from engine.server.reply import ReplyPlan
from engine.server.responses.items import read_input
from engine.server.schemas import InputTokensBody, ResponsesBody
from engine.server.tools import choose_openai, read_functions
from engine.text import PromptTooLong, ToolDefinition

if TYPE_CHECKING:
    from engine.server.app import App

LOGPROBS = "message.output_text.logprobs"


@dataclass(frozen=True, slots=True)
class ResponsesPlan:
    """A request, understood. `echo` are the fields of the response that repeat the request."""

    reply: ReplyPlan
    echo: dict[str, Any]


def plan_response(app: App, exchange: Exchange, data: dict[str, Any]) -> ResponsesPlan:
    """Check a body, render and tokenize its prompt, and make the engine request.

    Raises: ApiError 400 naming the field, 404 for another model.
    """
    check_fields(data, ResponsesBody)
    body = convert(data, ResponsesBody)
    info.check_model(app, body.model)
    check_sharing(body)
    if body.background:
        raise errors.unsupported_parameter("background", "Responses are not stored, so none can run in the background.")
    if body.max_output_tokens is not None and body.max_output_tokens < 1:
        raise errors.invalid_value("max_output_tokens", "max_output_tokens: must be at least 1.")
    num_top = _num_top_logprobs(body)
    conversation = _read(body, exchange)
    params = sampling_params(
        body,
        defaults=app.generation_defaults,
        max_tokens=body.max_output_tokens,
        logprobs=num_top,
        vocab_size=app.engine.model.vocab_size,
        stop=body.stop,
        names={"max_tokens": "max_output_tokens"},
    )
    try:
        prompt = render(app, exchange, conversation, app.engine.max_model_len)
    except PromptTooLong as error:
        raise errors.context_length_exceeded(error.max_tokens, None, body.max_output_tokens or 1, "input") from None
    reply = plan_reply(
        app,
        conversation,
        prompt,
        body,
        params,
        id_prefix="resp_",
        model=body.model,
        max_tokens=resolve_max_tokens(app, len(prompt.ids), body.max_output_tokens, None, "input"),
        num_top_logprobs=num_top,
        parallel_tool_calls=body.parallel_tool_calls is not False,
    )
    return ResponsesPlan(reply, _echo(body, reply, conversation))


def _echo(body: ResponsesBody, reply: ReplyPlan, conversation: Conversation) -> dict[str, Any]:
    """Lay out the fields of a response that repeat the request, as far as it took effect."""
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": reply.parallel_tool_calls,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": conversation.effort, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": reply.params.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": _echoed_choice(body, conversation),
        # Those that the model was shown, written once for all events; the warning header names what was skipped.
        "tools": orjson.Fragment(orjson.dumps([_echoed_tool(tool) for tool in conversation.tools.definitions])),
        "top_logprobs": body.top_logprobs or 0,
        "top_p": reply.params.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _echoed_choice(body: ResponsesBody, conversation: Conversation) -> str | dict[str, Any]:
    choice, tools = body.tool_choice, conversation.tools
    if not isinstance(choice, dict):
        return choice or "auto"
    if choice.get("type") != "allowed_tools":
        return {"type": "function", "name": tools.forced}
    allowed = [{"type": "function", "name": tool.name} for tool in tools.definitions]
    return {"type": "allowed_tools", "mode": "required" if tools.forced is not None else "auto", "tools": allowed}


def _echoed_tool(tool: ToolDefinition) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": False,
    }


def count_input_tokens(app: App, exchange: Exchange, data: dict[str, Any]) -> int:
    """Return the number of tokens that a request's prompt has; `model` may be left out.

    Raises: as `plan_response`, but that the prompt may be longer than the context.
    """
    if data.get("model") is None:
        data = data | {"model": app.model_names[0]}
    check_fields(data, InputTokensBody)
    body = convert(data, InputTokensBody)
    info.check_model(app, body.model)
    return len(render_to_count(app, exchange, _read(body, exchange)))


def _read(body: InputTokensBody, exchange: Exchange) -> Conversation:
    if body.text is not None and body.text.format is not None:
        _check_format(body.text.format)
    if body.truncation == "auto":
        exchange.warn("truncation auto is served as disabled")
    elif body.truncation not in (None, "disabled"):
        raise errors.invalid_value("truncation", "truncation: must be 'auto' or 'disabled'.")
    return Conversation(
        read_input(body),
        choose_openai(read_functions(body.tools or [], exchange), body.tool_choice),
        effort=body.reasoning.effort if body.reasoning is not None else None,
        param="input",
        effort_param="reasoning.effort",
    )


def _check_format(raw: dict[str, Any]) -> None:
    kind = raw.get("type")
    if kind in ("json_object", "json_schema"):
        raise errors.unsupported_parameter(
            "text.format", f"text.format of type '{kind}' is not supported yet; use 'text'."
        )
    if kind != "text":
        raise errors.invalid_value("text.format.type", "text.format.type: must be 'text'.")


def _num_top_logprobs(body: ResponsesBody) -> int | None:
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        raise errors.invalid_value("top_logprobs", f"top_logprobs: must be between 0 and {MAX_LOGPROBS}.")
    return (body.top_logprobs or 0) if LOGPROBS in (body.include or ()) else None
