"""Conversations as values: what every chat format renders and what every dialect is translated into.

Knows the shape of a conversation and of OpenAI's JSON for it. Refuses to know tokens, templates and HTTP.
All values are frozen; a field that the API left out is None or empty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from engine.text.errors import ChatRequestError, quoted

Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool"]
JsonObject: TypeAlias = Mapping[str, Any]

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",  # the role of tool results before 2024
}
# A name becomes part of a message header, so nothing that could end the recipient may be in it.
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}\Z")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that the assistant made; `arguments` is JSON text, passed on as it is."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation.

    `reasoning` and `tool_calls` belong to the assistant, `tool_call_id` to a tool result, which may instead
    carry the tool's `name` (the older API).
    """

    role: Role
    content: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ToolDefinition:
    """A function the model may call; `parameters` is its JSON Schema, None when it takes no arguments."""

    name: str
    description: str = ""
    parameters: JsonObject | None = None


@dataclass(frozen=True, slots=True)
class ResponseSchema:
    """The JSON Schema that the answer shall follow, as `response_format` names it."""

    name: str
    schema: JsonObject = field(default_factory=dict)
    description: str = ""


@dataclass(frozen=True, slots=True)
class RenderOptions:
    """What rendering needs beside the messages.

    `current_date` is `YYYY-MM-DD`, from the request's arrival: renderers read no clock, so that a prompt is
    reproducible. `reasoning_effort` takes any of the API's words; a format rounds it to what its model knows.
    `continue_final_message` leaves the last assistant message open, so that the model goes on writing it.
    `max_prompt_tokens` is where rendering may stop: see `BoundedCodec`.
    """

    current_date: str
    reasoning_effort: str | None = None
    response_schema: ResponseSchema | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    max_prompt_tokens: int | None = None


def messages_from_openai(messages: Sequence[JsonObject]) -> list[ChatMessage]:
    """Read the `messages` array of the chat completions API, already parsed from JSON.

    Unknown fields are ignored. Content parts of type text are joined; any other part is refused by name.
    Raises: ChatRequestError with the path of the offending field.
    """
    if not messages:
        raise ChatRequestError("messages must not be empty", "messages")
    return [_message(raw, f"messages[{index}]") for index, raw in enumerate(messages)]


def tools_from_openai(tools: Sequence[JsonObject] | None) -> list[ToolDefinition]:
    """Read the `tools` array: function tools in the chat or the responses shape; other types are skipped.

    Raises: ChatRequestError with the path of the offending field.
    """
    definitions = []
    for index, raw in enumerate(tools or ()):
        path = f"tools[{index}]"
        if not isinstance(raw, Mapping):
            raise ChatRequestError("a tool must be an object", path)
        if raw.get("type", "function") != "function":
            continue
        nested = "function" in raw
        definitions.append(_tool(raw["function"] if nested else raw, f"{path}.function" if nested else path))
    return definitions


def _message(raw: JsonObject, path: str) -> ChatMessage:
    if not isinstance(raw, Mapping):
        raise ChatRequestError("a message must be an object", path)
    role = _ROLES.get(str(raw.get("role")))
    if role is None:
        raise ChatRequestError(f"unknown role {quoted(raw.get('role'))}", f"{path}.role")
    content = _content(raw.get("content"), f"{path}.content")
    calls: tuple[ToolCall, ...] = ()
    reasoning = None
    if role == "assistant":
        calls = _tool_calls(raw, path)
        reasoning = _optional_str(raw, "reasoning_content", path) or _optional_str(raw, "reasoning", path)
        if content is None and not calls and reasoning is None:
            raise ChatRequestError("an assistant message needs content or tool_calls", f"{path}.content")
    elif content is None:
        raise ChatRequestError(f"a {role} message needs content", f"{path}.content")
    return ChatMessage(
        role=role,
        content=content,
        reasoning=reasoning,
        tool_calls=calls,
        tool_call_id=_optional_str(raw, "tool_call_id", path) if role == "tool" else None,
        name=_optional_str(raw, "name", path),
    )


def _content(raw: object, path: str) -> str | None:
    """Return the text of a content field: a string, null, or a list of text parts."""
    if raw is None or isinstance(raw, str):
        return raw
    if not isinstance(raw, Sequence):
        raise ChatRequestError("content must be a string or a list of parts", path)
    texts = []
    for index, part in enumerate(raw):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise ChatRequestError(f"content parts of type {quoted(kind)} are not supported", f"{path}[{index}].type")
        key = "refusal" if kind == "refusal" else "text"
        text = part.get(key)
        if not isinstance(text, str):
            raise ChatRequestError(f"a {kind} part needs a string", f"{path}[{index}].{key}")
        texts.append(text)
    return "".join(texts)


def _tool_calls(raw: JsonObject, path: str) -> tuple[ToolCall, ...]:
    """Return the calls of an assistant message, in the present or the older (`function_call`) shape."""
    listed = raw.get("tool_calls")
    if listed is None:
        old = raw.get("function_call")
        return (_tool_call({"function": old}, f"{path}.function_call", is_old=True),) if old is not None else ()
    if isinstance(listed, str) or not isinstance(listed, Sequence):
        raise ChatRequestError("tool_calls must be a list", f"{path}.tool_calls")
    return tuple(_tool_call(call, f"{path}.tool_calls[{index}]") for index, call in enumerate(listed))


def _tool_call(raw: object, path: str, *, is_old: bool = False) -> ToolCall:
    function = raw.get("function") if isinstance(raw, Mapping) else None
    at = path if is_old else f"{path}.function"
    if not isinstance(raw, Mapping) or not isinstance(function, Mapping):
        raise ChatRequestError("a tool call needs a function object", at)
    call_id = raw.get("id", "")
    if not isinstance(call_id, str):
        raise ChatRequestError("the id of a tool call must be a string", f"{path}.id")
    arguments = function.get("arguments")
    if arguments is None:
        arguments = "{}"
    elif not isinstance(arguments, str):  # clients that replay a parsed call send the object
        arguments = compact_json(arguments, f"{at}.arguments")
    return ToolCall(id=call_id, name=function_name(function.get("name"), f"{at}.name"), arguments=arguments)


def _tool(raw: object, path: str) -> ToolDefinition:
    if not isinstance(raw, Mapping):
        raise ChatRequestError("a function tool needs a function object", path)
    description = raw.get("description")
    if description is not None and not isinstance(description, str):
        raise ChatRequestError("the description of a tool must be a string", f"{path}.description")
    parameters = raw.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ChatRequestError("the parameters of a tool must be a JSON Schema object", f"{path}.parameters")
    return ToolDefinition(function_name(raw.get("name"), f"{path}.name"), description or "", parameters)


def function_name(raw: object, path: str) -> str:
    """Return a function's name. Raises: ChatRequestError for what cannot stand in a message header."""
    if not isinstance(raw, str) or not _NAME.match(raw):
        raise ChatRequestError("a function name is 1 to 128 of the characters a-z A-Z 0-9 _ - .", path)
    return raw


def _optional_str(raw: JsonObject, key: str, path: str) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise ChatRequestError(f"{key} must be a string", f"{path}.{key}")
    return value


def compact_json(value: object, param: str) -> str:
    """Write JSON in one line without spaces and without escaping what UTF-8 can carry.

    Raises: ChatRequestError at `param` for what is no JSON: NaN, other types, nesting past the interpreter's limit.
    """
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ChatRequestError(f"not representable as JSON: {reason}", param) from None
