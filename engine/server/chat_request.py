"""POST /v1/chat/completions, first half: the body → a rendered prompt and what the answer must look like.

Knows the rules of tools, tool_choice, response_format and reasoning effort. Refuses to know how answers are laid out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import orjson

from engine.core.request import EngineRequest
from engine.core.sampling_params import MAX_LOGPROBS, SamplingParams
from engine.server import errors, info
from engine.server.choices import Usage, check_common, engine_requests, new_id, resolve_max_tokens
from engine.server.http import Exchange
from engine.server.parsing import check_fields, convert, sampling_params
from engine.server.schemas import ChatBody
from engine.text import (
    ChatFormat,
    ChatRequestError,
    RenderOptions,
    TokenizerError,
    ToolDefinition,
    messages_from_openai,
    tools_from_openai,
)

if TYPE_CHECKING:
    from engine.server.app import App

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 64 * 1024

ToolMode = Literal["none", "auto", "forced"]


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of one request. `forced` names the one that must be called."""

    definitions: tuple[ToolDefinition, ...] = ()
    forced: str | None = None

    @property
    def may_call(self) -> bool:
        return bool(self.definitions)


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """A chat request, understood: what to run and how to lay the answer out."""

    id: str
    created: int
    model: str
    chat_format: ChatFormat
    params: SamplingParams
    requests: list[EngineRequest]
    usage: Usage
    tools: Tools
    # Tokens of the reply that the prompt already holds: the header of a forced call.
    prefix_ids: list[int]
    num_top_logprobs: int | None
    is_continuation: bool
    parallel_tool_calls: bool
    includes_reasoning: bool
    returns_ids: bool
    is_streaming: bool
    includes_usage: bool


def plan_chat(app: App, exchange: Exchange, data: dict[str, Any]) -> ChatPlan:
    """Check a body, render and tokenize its prompt, and make the engine requests.

    Raises: ApiError 400 naming the field, 404 for another model.
    """
    check_fields(data, ChatBody)
    body = convert(data, ChatBody)
    info.check_model(app, body.model)
    chat_format = app.chat_format
    if chat_format is None:
        raise errors.unsupported_parameter("messages", "This model has no chat format; use /v1/completions.")
    check_common(body)
    _check_formats(body)
    num_top = _num_top_logprobs(body)
    tools = read_tools(body, exchange)
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    param = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    if asked is not None and asked < 1:
        raise errors.invalid_value(param, f"{param}: must be at least 1.")
    params = sampling_params(
        body,
        defaults=app.generation_defaults,
        max_tokens=asked,
        logprobs=num_top,
        vocab_size=app.engine.model.vocab_size,
    )
    prompt = render(app, exchange, chat_format, body, tools)
    prefix_ids = _forced_prefix(app, tools.forced) if tools.forced else []
    prompt += prefix_ids
    max_tokens = resolve_max_tokens(app, len(prompt), asked, None, "messages")
    stops = (*chat_format.stop_token_ids, *app.engine.model.eos_token_ids)
    answer_id = new_id("chatcmpl-")
    return ChatPlan(
        id=answer_id,
        created=int(time.time()),
        model=body.model,
        chat_format=chat_format,
        params=params,
        requests=engine_requests(app, answer_id, [prompt], params, [max_tokens], stops, body),
        usage=Usage(len(prompt)),
        tools=tools,
        prefix_ids=prefix_ids,
        num_top_logprobs=num_top,
        is_continuation=bool(body.continue_final_message),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        includes_reasoning=body.include_reasoning is not False,
        returns_ids=bool(body.return_token_ids),
        is_streaming=bool(body.stream),
        includes_usage=bool(body.stream_options and body.stream_options.include_usage),
    )


def render(app: App, exchange: Exchange, chat_format: ChatFormat, body: ChatBody, tools: Tools) -> list[int]:
    """Render the conversation to token ids.

    Raises: ApiError 400 with the path of what cannot be rendered.
    """
    if body.continue_final_message and body.add_generation_prompt:
        raise errors.invalid_value(
            "continue_final_message", "continue_final_message and add_generation_prompt exclude each other."
        )
    effort = _reasoning_effort(body)
    try:
        if effort is not None:
            mapped = chat_format.map_reasoning_effort(effort)
            if mapped != effort:
                exchange.warn(f"reasoning_effort {effort} is served as {mapped}")
        return chat_format.render(
            messages_from_openai(body.messages),
            tools.definitions,
            RenderOptions(
                current_date=datetime.now(UTC).date().isoformat(),
                reasoning_effort=effort,
                add_generation_prompt=body.add_generation_prompt is not False,
                continue_final_message=bool(body.continue_final_message),
            ),
        )
    except ChatRequestError as error:
        # The text package words these for clients.
        raise errors.invalid_value(error.param, f"{error.param}: {error}.") from None
    except TokenizerError:
        raise errors.invalid_value("messages", "messages: this text cannot be encoded.") from None


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


def read_tools(body: ChatBody, exchange: Exchange) -> Tools:
    """Read `tools` and `tool_choice`, in the present or the older (`functions`, `function_call`) form.

    Raises: ApiError 400 for a choice that names no tool, or that needs a grammar (`required` among several).
    """
    raw = body.tools
    if raw is None and body.functions is not None:
        raw = [{"type": "function", "function": function} for function in body.functions]
    raw = raw or []
    if len(raw) > MAX_TOOLS:
        raise errors.invalid_value("tools", f"tools: at most {MAX_TOOLS}.")
    if raw and len(orjson.dumps(raw)) > MAX_TOOLS_BYTES:
        raise errors.invalid_value("tools", f"tools: at most {MAX_TOOLS_BYTES} bytes of JSON.")
    skipped = sorted({str(tool.get("type"))[:32] for tool in raw} - {"function", "None"})
    if skipped:
        exchange.warn(f"tools of type {', '.join(skipped)} are skipped")
    try:
        definitions = tuple(tools_from_openai(raw))
    except ChatRequestError as error:
        raise errors.invalid_value(error.param, f"{error.param}: {error}.") from None
    choice = body.tool_choice
    if choice is None and body.function_call is not None:
        old = body.function_call
        choice = {"type": "function", "function": old} if isinstance(old, dict) else old
    return _choose(definitions, choice)


def _choose(tools: tuple[ToolDefinition, ...], choice: str | dict[str, Any] | None) -> Tools:
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        tools, choice = _allowed(tools, choice)
    if choice is None or choice == "auto":
        return Tools(tools)
    if choice == "none":
        return Tools()
    names = [tool.name for tool in tools]
    if choice == "required":
        if not tools:
            raise errors.invalid_value("tool_choice", "tool_choice: 'required' needs at least one function tool.")
        if len(tools) > 1:
            raise errors.unsupported_parameter(
                "tool_choice",
                "tool_choice 'required' among several tools is not supported yet; name one, or offer one tool.",
            )
        return Tools(tools, forced=names[0])
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise errors.invalid_value(
            "tool_choice", "tool_choice: expected 'none', 'auto', 'required' or {type: function, function: {name}}."
        )
    if name not in names:
        raise errors.invalid_value("tool_choice.function.name", "tool_choice names a function that is not in tools.")
    return Tools(tools, forced=name)


def _allowed(tools: tuple[ToolDefinition, ...], choice: dict[str, Any]) -> tuple[tuple[ToolDefinition, ...], Any]:
    """Apply `allowed_tools`: keep the tools that it lists, and take its mode as the choice."""
    inner = choice.get("allowed_tools")
    inner = inner if isinstance(inner, dict) else choice
    mode, listed = inner.get("mode"), inner.get("tools")
    if mode not in ("auto", "required") or not isinstance(listed, list):
        raise errors.invalid_value("tool_choice.allowed_tools", "allowed_tools needs a mode and a list of tools.")
    names = set()
    for item in listed:
        function = item.get("function", item) if isinstance(item, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if name not in [tool.name for tool in tools]:
            raise errors.invalid_value("tool_choice.allowed_tools", "allowed_tools names a tool that is not in tools.")
        names.add(name)
    return tuple(tool for tool in tools if tool.name in names), mode


def _forced_prefix(app: App, name: str) -> list[int]:
    """Return the header of a call, which leaves the model nothing but the arguments to write.

    Until grammars constrain the reply this is how a named choice is kept; the model does not reason before it.
    The name passed the tool reader, so it cannot end the header.
    """
    if "<|channel|>" not in app.tokenizer.special_ids:
        raise errors.unsupported_parameter("tool_choice", "This model's chat format cannot force a tool call yet.")
    return app.tokenizer.encode_trusted(f" to=functions.{name}<|channel|>commentary json<|message|>")
