"""POST /v1/chat/completions, first half: the body → a conversation and a plan of its reply.

Knows the rules of OpenAI's chat body. Refuses to know how answers are laid out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.core.sampling_params import MAX_LOGPROBS
from engine.server import errors, info
from engine.server.choices import check_common, resolve_max_tokens
from engine.server.conversation import Conversation, plan_reply, render
from engine.server.http import Exchange
from engine.server.parsing import check_fields, convert, sampling_params
from engine.server.reply import ReplyPlan
from engine.server.schemas import ChatBody
from engine.server.tools import choose_openai, read_functions
from engine.text import ChatRequestError, PromptTooLong, messages_from_openai

if TYPE_CHECKING:
    from engine.server.app import App


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """A chat request, understood: what to run and how to lay the answer out."""

    reply: ReplyPlan
    includes_usage: bool


def plan_chat(app: App, exchange: Exchange, data: dict[str, Any]) -> ChatPlan:
    """Check a body, render and tokenize its prompt, and make the engine requests.

    Raises: ApiError 400 naming the field, 404 for another model.
    """
    check_fields(data, ChatBody)
    body = convert(data, ChatBody)
    info.check_model(app, body.model)
    check_common(body)
    _check_formats(body)
    num_top = _num_top_logprobs(body)
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    param = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    if asked is not None and asked < 1:
        raise errors.invalid_value(param, f"{param}: must be at least 1.")
    conversation = read_conversation(body, exchange)
    params = sampling_params(
        body,
        defaults=app.generation_defaults,
        max_tokens=asked,
        logprobs=num_top,
        vocab_size=app.engine.model.vocab_size,
        n=body.n,
        stop=body.stop,
    )
    try:
        prompt = render(app, exchange, conversation, app.engine.max_model_len)
    except PromptTooLong as error:
        raise errors.context_length_exceeded(error.max_tokens, None, asked or 1, "messages") from None
    reply = plan_reply(
        app,
        conversation,
        prompt,
        body,
        params,
        id_prefix="chatcmpl-",
        model=body.model,
        max_tokens=resolve_max_tokens(app, len(prompt.ids), asked, None, "messages"),
        num_top_logprobs=num_top,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        includes_reasoning=body.include_reasoning is not False,
        returns_ids=bool(body.return_token_ids),
    )
    return ChatPlan(reply, includes_usage=bool(body.stream_options and body.stream_options.include_usage))


def read_conversation(body: ChatBody, exchange: Exchange) -> Conversation:
    """Read messages, tools and effort.

    Raises: ApiError 400 with the path of what cannot be read.
    """
    if body.continue_final_message and body.add_generation_prompt:
        raise errors.invalid_value(
            "continue_final_message", "continue_final_message and add_generation_prompt exclude each other."
        )
    raw = body.tools
    if raw is None and body.functions is not None:
        raw = [{"type": "function", "function": function} for function in body.functions]
    choice = body.tool_choice
    if choice is None and body.function_call is not None:
        old = body.function_call
        choice = {"type": "function", "function": old} if isinstance(old, dict) else old
    try:
        messages = messages_from_openai(body.messages)
    except ChatRequestError as error:
        raise errors.invalid_value(error.param, f"{error.param}: {error}.") from None
    return Conversation(
        messages,
        choose_openai(read_functions(raw or [], exchange), choice),
        effort=_reasoning_effort(body),
        add_generation_prompt=body.add_generation_prompt is not False,
        is_continuation=bool(body.continue_final_message),
    )


def _reasoning_effort(body: ChatBody) -> str | None:
    kwargs = body.chat_template_kwargs or {}
    for key in kwargs:
        if key != "reasoning_effort":
            path = f"chat_template_kwargs.{key[:64]}"
            raise errors.unsupported_parameter(path, f"{path} is not known to this model's chat format.")
    effort = body.reasoning_effort if body.reasoning_effort is not None else kwargs.get("reasoning_effort")
    if effort is not None and not isinstance(effort, str):
        path = "chat_template_kwargs.reasoning_effort"
        raise errors.invalid_value(path, f"{path}: expected string.")
    return effort


def _check_formats(body: ChatBody) -> None:
    if body.modalities is not None and body.modalities != ["text"]:
        raise errors.unsupported_parameter("modalities", "Only the modality 'text' is supported.")
    if body.response_format is None:
        return
    kind = body.response_format.get("type")
    if kind in ("json_object", "json_schema"):
        raise errors.unsupported_parameter(
            "response_format", f"response_format of type '{kind}' is not supported yet; use 'text'."
        )
    if kind != "text":
        raise errors.invalid_value(
            "response_format.type", "response_format.type: must be 'text', 'json_object' or 'json_schema'."
        )


def _num_top_logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs is not None:
        if not body.logprobs:
            raise errors.invalid_value("top_logprobs", "top_logprobs is only allowed when logprobs is true.")
        if not 0 <= body.top_logprobs <= MAX_LOGPROBS:
            raise errors.invalid_value("top_logprobs", f"top_logprobs: must be between 0 and {MAX_LOGPROBS}.")
    return (body.top_logprobs or 0) if body.logprobs else None
