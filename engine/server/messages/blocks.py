"""Anthropic's JSON → a conversation: system, content blocks, tools and their choice.

Knows which blocks a text model can read and refuses the others by their path. Refuses to know sampling and answers.

- Blocks of the user are paragraphs; blocks of the assistant are joined as it wrote them.
- `cache_control` anywhere is ignored: whole prefixes are cached anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.server import errors
from engine.server.http import Exchange
from engine.server.schemas import CountTokensBody
from engine.server.tools import Tools, check_size, choose, warn_skipped, warn_strict
from engine.server.turns import Turns
from engine.text import ChatMessage, ChatRequestError, ToolDefinition, tools_from_openai
from engine.text.errors import quoted
from engine.text.messages import compact_json

# Claude Code begins its instructions with a line that changes with every request, which would defeat the prefix cache.
BILLING_PREFIX = "x-anthropic-billing-header"
PARAGRAPH = "\n\n"
_CHOICES = {"auto": "auto", "any": "required", "none": "none", "tool": "named"}
_DROPPED = ("redacted_thinking",)


def read_messages(body: CountTokensBody) -> tuple[list[ChatMessage], bool]:
    """Read `system` and `messages`; the second value says that the last message is the assistant's, to be continued.

    Raises: ApiError 400 with the path of the offending block.
    """
    if not body.messages:
        raise errors.invalid_value("messages", "messages: at least one message is needed.")
    turns = Turns()
    for text in _system_texts(body.system):
        turns.say("system", text)
    for index, message in enumerate(body.messages):
        _read_message(message, f"messages[{index}]", turns)
    messages = turns.finish()
    is_continuation = body.messages[-1].get("role") == "assistant"
    if is_continuation:
        last = messages[-1] if messages else None
        if last is None or last.role != "assistant" or last.tool_calls or not last.content:
            path = f"messages[{len(body.messages) - 1}].content"
            raise errors.invalid_value(
                path, f"{path}: a final assistant message needs text, which the reply continues."
            )
    return messages, is_continuation


def _system_texts(raw: str | list[dict[str, Any]] | None) -> list[str]:
    if raw is None or isinstance(raw, str):
        return [raw] if raw else []
    texts = [_text(block, f"system[{index}]") for index, block in enumerate(raw)]
    if texts and texts[0].startswith(BILLING_PREFIX):
        del texts[0]
    return [text for text in texts if text]


def _read_message(message: Mapping[str, Any], path: str, turns: Turns) -> None:
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise errors.invalid_value(f"{path}.role", f"{path}.role: must be 'user', 'assistant' or 'system'.")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise errors.invalid_value(f"{path}.content", f"{path}.content: expected a string or a list of blocks.")
    blocks = [(_object(block, f"{path}.content[{i}]"), f"{path}.content[{i}]") for i, block in enumerate(content)]
    if role == "assistant":
        for block, at in blocks:
            _read_assistant(block, at, turns)
    elif role == "system":
        turns.say("system", PARAGRAPH.join([_text(block, at) for block, at in blocks]))
    else:
        _read_user(blocks, turns)


def _read_assistant(block: Mapping[str, Any], path: str, turns: Turns) -> None:
    kind = block.get("type")
    if kind == "text":
        turns.answer(_text(block, path))
    elif kind == "thinking":
        turns.reason(_string(block, "thinking", path))
    elif kind == "tool_use":
        arguments = block.get("input")
        if not isinstance(arguments, dict):
            raise errors.invalid_value(f"{path}.input", f"{path}.input: expected an object.")
        turns.call(block.get("id"), block.get("name"), _json(arguments, f"{path}.input"), path, "id")
    elif kind not in _DROPPED:
        raise _unsupported(kind, path)


def _read_user(blocks: Sequence[tuple[Mapping[str, Any], str]], turns: Turns) -> None:
    texts: list[str] = []
    for block, path in blocks:
        kind = block.get("type")
        if kind == "text":
            texts.append(_text(block, path))
        elif kind == "tool_result":
            if texts:
                turns.say("user", PARAGRAPH.join(texts))
                texts = []
            turns.result(block.get("tool_use_id"), _result_text(block, path), path, "tool_use_id")
        else:
            raise _unsupported(kind, path)
    if texts or not blocks:
        turns.say("user", PARAGRAPH.join(texts))


def _result_text(block: Mapping[str, Any], path: str) -> str:
    content = block.get("content")
    if isinstance(content, list):
        parts = [(_object(part, f"{path}.content[{i}]"), f"{path}.content[{i}]") for i, part in enumerate(content)]
        content = PARAGRAPH.join([_text(part, at) for part, at in parts])
    if content is not None and not isinstance(content, str):
        raise errors.invalid_value(f"{path}.content", f"{path}.content: expected a string or a list of blocks.")
    # The format of a tool's message has no field for a failure.
    return f"Error: {content or ''}" if block.get("is_error") is True else content or ""


def read_tools(body: CountTokensBody, exchange: Exchange) -> tuple[Tools, bool]:
    """Read `tools` and `tool_choice`; the second value says whether the reply may hold several calls.

    Typed tools of Anthropic's (`bash_…`, `web_search_…`) are skipped with a warning.
    Raises: ApiError 400 naming the field.
    """
    raw = body.tools or []
    check_size(raw)
    warn_skipped((tool.get("type") or "custom" for tool in raw), ("custom",), exchange)
    warn_strict((tool for tool in raw if (tool.get("type") or "custom") == "custom"), exchange)
    # What is skipped keeps its place, so that paths count as the client does.
    functions = [_function(tool, f"tools[{index}]") for index, tool in enumerate(raw)]
    try:
        definitions = tuple(tools_from_openai(functions))
    except ChatRequestError as error:
        param = error.param.replace(".parameters", ".input_schema")
        raise errors.invalid_value(param, f"{param}: {error}.") from None
    choice = body.tool_choice or {"type": "auto"}
    disables_parallel = choice.get("disable_parallel_tool_use")
    if disables_parallel is not None and not isinstance(disables_parallel, bool):
        path = "tool_choice.disable_parallel_tool_use"
        raise errors.invalid_value(path, f"{path}: expected boolean.")
    return _choose(definitions, choice), not disables_parallel


def _function(tool: dict[str, Any], path: str) -> dict[str, Any]:
    """Write a tool in OpenAI's flat shape, which has a reader already."""
    if (tool.get("type") or "custom") != "custom":
        return {"type": "skipped"}
    if tool.get("input_schema") is None:
        raise errors.invalid_value(f"{path}.input_schema", f"{path}.input_schema: this field is required.")
    return {"name": tool.get("name"), "description": tool.get("description"), "parameters": tool["input_schema"]}


def _choose(definitions: tuple[ToolDefinition, ...], choice: dict[str, Any]) -> Tools:
    kind, name = choice.get("type"), choice.get("name")
    if not isinstance(kind, str) or kind not in _CHOICES:
        raise errors.invalid_value("tool_choice.type", "tool_choice.type: must be 'auto', 'any', 'tool' or 'none'.")
    if kind == "tool" and not isinstance(name, str):
        raise errors.invalid_value("tool_choice.name", "tool_choice.name: this field is required.")
    return choose(definitions, _CHOICES[kind], name, mode_name="any", name_param="tool_choice.name")


def _object(raw: object, path: str) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        raise errors.invalid_value(path, f"{path}: expected an object.")
    return raw


def _text(block: Mapping[str, Any], path: str) -> str:
    if block.get("type") != "text":
        raise _unsupported(block.get("type"), path)
    return _string(block, "text", path)


def _string(block: Mapping[str, Any], key: str, path: str) -> str:
    value = block.get(key)
    if not isinstance(value, str):
        raise errors.invalid_value(f"{path}.{key}", f"{path}.{key}: expected a string.")
    return value


def _json(value: object, path: str) -> str:
    try:
        return compact_json(value, path)
    except ChatRequestError as error:
        raise errors.invalid_value(path, f"{path}: {error}.") from None


def _unsupported(kind: object, path: str) -> errors.ApiError:
    return errors.unsupported_parameter(
        f"{path}.type", f"{path}.type: blocks of type {quoted(kind)} are not supported here."
    )
