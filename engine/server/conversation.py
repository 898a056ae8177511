"""A conversation, understood: what every chat dialect reads its body into, and the way from there to the engine.

Knows rendering, forced calls and the making of engine requests. Refuses to know bodies and answers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from engine.core.sampling_params import SamplingParams
from engine.server import errors
from engine.server.choices import Usage, engine_requests, new_id
from engine.server.http import Exchange
from engine.server.reply import ReplyPlan
from engine.server.schemas import SamplingBody
from engine.server.tools import Tools, forced_prefix
from engine.text import ChatFormat, ChatMessage, ChatRequestError, PromptTooLong, RenderOptions, TokenizerError

if TYPE_CHECKING:
    from engine.server.app import App


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is rendered. `param` is the body's field that holds the messages, `effort_param` that of the effort."""

    messages: Sequence[ChatMessage]
    tools: Tools
    effort: str | None = None
    add_generation_prompt: bool = True
    is_continuation: bool = False
    param: str = "messages"
    effort_param: str = "reasoning_effort"


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids. The last `prefix_ids` of them belong to the reply already: the header of a forced call."""

    ids: list[int]
    prefix_ids: list[int]


def chat_format_of(app: App, param: str) -> ChatFormat:
    """Return the model's chat format. Raises: ApiError 400 for a model without one."""
    if app.chat_format is None:
        raise errors.unsupported_parameter(param, "This model has no chat format; use /v1/completions.")
    return app.chat_format


def render(app: App, exchange: Exchange, conversation: Conversation, max_tokens: int) -> Prompt:
    """Render a conversation and the header of a forced call.

    Raises: ApiError 400 with the path of what cannot be rendered; PromptTooLong for one that has more than `max_tokens`
    for sure. One that has somewhat more may be rendered, for an error that says how many.
    """
    chat_format = chat_format_of(app, conversation.param)
    _check_effort(chat_format, exchange, conversation)
    try:
        ids = chat_format.render(
            conversation.messages,
            conversation.tools.definitions,
            RenderOptions(
                current_date=datetime.now(UTC).date().isoformat(),
                reasoning_effort=conversation.effort,
                add_generation_prompt=conversation.add_generation_prompt,
                continue_final_message=conversation.is_continuation,
                max_prompt_tokens=max_tokens,
            ),
        )
    except ChatRequestError as error:
        # The text package words these for clients, with paths in the shape of chat completions.
        param = error.param if conversation.param == "messages" else conversation.param
        raise errors.invalid_value(param, f"{param}: {error}.") from None
    except TokenizerError:
        param = conversation.param
        raise errors.invalid_value(param, f"{param}: this text cannot be encoded.") from None
    forced = conversation.tools.forced
    prefix_ids = forced_prefix(app, forced) if forced is not None else []
    return Prompt(ids + prefix_ids, prefix_ids)


def render_to_count(app: App, exchange: Exchange, conversation: Conversation) -> list[int]:
    """Render a conversation that is only to be counted or shown, so that it may be longer than the context.

    Raises: ApiError 400 as `render`, and for one that is longer by far.
    """
    limit = app.max_counted_tokens
    try:
        return render(app, exchange, conversation, limit).ids
    except PromptTooLong:
        raise errors.too_long_to_count(limit, conversation.param) from None


def _check_effort(chat_format: ChatFormat, exchange: Exchange, conversation: Conversation) -> None:
    effort, param = conversation.effort, conversation.effort_param
    if effort is None:
        return
    try:
        mapped = chat_format.map_reasoning_effort(effort)
    except ChatRequestError as error:
        raise errors.invalid_value(param, f"{param}: {error}.") from None
    if mapped != effort:
        exchange.warn(f"{param} {effort} is served as {mapped}")


def plan_reply(
    app: App,
    conversation: Conversation,
    prompt: Prompt,
    body: SamplingBody,
    params: SamplingParams,
    *,
    id_prefix: str,
    model: str,
    max_tokens: int,
    num_top_logprobs: int | None = None,
    parallel_tool_calls: bool = True,
    includes_reasoning: bool = True,
    returns_ids: bool = False,
) -> ReplyPlan:
    """Make the engine requests of a rendered conversation. `max_tokens` is what each sequence may say at most."""
    chat_format = chat_format_of(app, conversation.param)
    stops = (*chat_format.stop_token_ids, *app.engine.model.eos_token_ids)
    answer_id = new_id(id_prefix)
    return ReplyPlan(
        id=answer_id,
        created=int(time.time()),
        model=model,
        chat_format=chat_format,
        params=params,
        requests=engine_requests(app, answer_id, [prompt.ids], params, [max_tokens], stops, body),
        usage=Usage(len(prompt.ids)),
        tools=conversation.tools,
        prefix_ids=prompt.prefix_ids,
        num_top_logprobs=num_top_logprobs,
        is_continuation=conversation.is_continuation,
        parallel_tool_calls=parallel_tool_calls,
        includes_reasoning=includes_reasoning,
        returns_ids=returns_ids,
        is_streaming=bool(body.stream),
    )
