"""The input of a response, a string or items, → messages.

Knows which items and content parts a text model can read and refuses the others by their path. Refuses to know tools,
sampling and answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.server import errors
from engine.server.schemas import InputTokensBody
from engine.server.turns import Turns
from engine.text import ChatMessage, ChatRequestError
from engine.text.errors import quoted
from engine.text.messages import Role, compact_json

_ROLES: dict[str, Role] = {"user": "user", "system": "system", "developer": "developer"}
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}


def read_input(body: InputTokensBody) -> list[ChatMessage]:
    """Read `instructions` and `input`.

    Raises: ApiError 400 with the path of the offending item or part.
    """
    turns = Turns()
    if body.instructions:
        turns.say("system", body.instructions)
    if isinstance(body.input, str):
        turns.say("user", body.input)
        return turns.finish()
    if not body.input:
        raise errors.invalid_value("input", "input: at least one item is needed.")
    for index, item in enumerate(body.input):
        _read_item(item, f"input[{index}]", turns)
    return turns.finish()


def _read_item(item: Mapping[str, Any], path: str, turns: Turns) -> None:
    kind = item.get("type")
    if kind is None and "role" in item:
        kind = "message"
    if kind == "message":
        _read_message(item, path, turns)
    elif kind == "reasoning":
        turns.reason(_reasoning(item, path))
    elif kind == "function_call":
        turns.call(item.get("call_id"), item.get("name"), _arguments(item, path), path, "call_id")
    elif kind == "function_call_output":
        turns.result(item.get("call_id"), _content(item.get("output"), f"{path}.output"), path, "call_id")
    elif kind == "item_reference":
        raise errors.unsupported_parameter(
            f"{path}.type", f"{path}.type: items are not stored, so none can be referred to; send the item itself."
        )
    else:
        raise errors.unsupported_parameter(
            f"{path}.type", f"{path}.type: items of type {quoted(kind)} are not supported here."
        )


def _read_message(item: Mapping[str, Any], path: str, turns: Turns) -> None:
    role = item.get("role")
    text = _content(item.get("content"), f"{path}.content")
    if role == "assistant":
        turns.answer(text, is_message=True)
    elif isinstance(role, str) and role in _ROLES:
        turns.say(_ROLES[role], text)
    else:
        raise errors.invalid_value(
            f"{path}.role", f"{path}.role: must be 'user', 'assistant', 'system' or 'developer'."
        )


def _content(raw: object, path: str) -> str:
    """Return the text of a string or of a list of text parts."""
    if isinstance(raw, str):
        return raw
    if not isinstance(raw, list):
        raise errors.invalid_value(path, f"{path}: expected a string or a list of parts.")
    return "".join([_part(part, f"{path}[{index}]", _TEXT_PARTS) for index, part in enumerate(raw)])


def _part(raw: object, path: str, kinds: Mapping[str, str]) -> str:
    if not isinstance(raw, dict):
        raise errors.invalid_value(path, f"{path}: expected an object.")
    kind = raw.get("type")
    if not isinstance(kind, str) or kind not in kinds:
        raise errors.unsupported_parameter(
            f"{path}.type", f"{path}.type: parts of type {quoted(kind)} are not supported here."
        )
    key = kinds[kind]
    text = raw.get(key)
    if not isinstance(text, str):
        raise errors.invalid_value(f"{path}.{key}", f"{path}.{key}: expected a string.")
    return text


def _reasoning(item: Mapping[str, Any], path: str) -> str:
    """Return the chain of thought, else its summary. What another server has encrypted cannot be read."""
    for field, kinds in (
        ("content", {"reasoning_text": "text", "text": "text"}),
        ("summary", {"summary_text": "text"}),
    ):
        raw = item.get(field)
        if raw is not None and not isinstance(raw, list):
            raise errors.invalid_value(f"{path}.{field}", f"{path}.{field}: expected a list of parts.")
        if raw:
            return "\n".join([_part(part, f"{path}.{field}[{index}]", kinds) for index, part in enumerate(raw)])
    return ""


def _arguments(item: Mapping[str, Any], path: str) -> str:
    raw = item.get("arguments")
    if isinstance(raw, str):
        return raw
    if not isinstance(raw, dict):
        raise errors.invalid_value(f"{path}.arguments", f"{path}.arguments: expected a string of JSON.")
    try:
        return compact_json(raw, f"{path}.arguments")
    except ChatRequestError as error:
        raise errors.invalid_value(error.param, f"{error.param}: {error}.") from None
