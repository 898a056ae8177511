"""Harmony text for training, in pieces that are either a control token or ordinary text.

Knows: the forms of the gpt-oss prompt (system, developer, tools, calls, results) and which pieces are learnt.
Refuses to know: token ids. The product has its own renderer; a test holds the two equal token for token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tools.tiny_oss.conversation import Conversation, Message

START, END, MESSAGE, CHANNEL = "<|start|>", "<|end|>", "<|message|>", "<|channel|>"
CONSTRAIN, RETURN, CALL = "<|constrain|>", "<|return|>", "<|call|>"
START_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"
CONTROL_TOKENS = (START_OF_TEXT, END_OF_TEXT, RETURN, CONSTRAIN, CHANNEL, START, END, MESSAGE, CALL)


@dataclass(frozen=True)
class Piece:
    """A run of text, or one control token; `is_learnt` marks what the model must produce."""

    text: str
    is_control: bool = False
    is_learnt: bool = False


def render(conversation: Conversation) -> list[Piece]:
    """Return the pieces of a conversation up to the end of its last reply."""
    return [*render_prompt(conversation), *_render_reply(conversation)]


def render_prompt(conversation: Conversation) -> list[Piece]:
    """Return the pieces before the reply, ending with the generation prompt `<|start|>assistant`."""
    pieces = list(_message("system", _system_text(conversation)))
    developer = _developer_text(conversation)
    if developer:
        pieces += _message("developer", developer)
    for message in conversation.messages[: conversation.prompt_length()]:
        if message.role == "user":
            pieces += _message("user", message.content)
        elif message.role == "tool":
            pieces += _tool_result(message)
        elif message.role == "assistant":
            pieces += _past_assistant(message)
    return [*pieces, *_generation_prompt()]


def _render_reply(conversation: Conversation) -> Iterator[Piece]:
    replies = conversation.messages[conversation.prompt_length() :]
    is_prompted = True
    for index, message in enumerate(replies):
        if message.role == "tool":
            yield from _tool_result(message)
            yield from _generation_prompt()
            is_prompted = True
            continue
        is_last = index == len(replies) - 1
        # A client that does not send reasoning back makes the later prompt differ from what the model wrote,
        # so the generator sets reasoning to None on such a call, and only the final reply is learnt.
        is_learnt = is_last or message.reasoning is not None or conversation.effort == "low"
        if message.reasoning is not None:
            yield from _written(f"{CHANNEL}analysis{MESSAGE}", is_learnt)
            yield Piece(message.reasoning, is_learnt=is_learnt)
            yield from _written(f"{END}{START}assistant", is_learnt)
        if message.call is not None:
            header = f" to=functions.{message.call.name}"
            yield Piece(header, is_learnt=is_learnt)
            yield from _written(f"{CHANNEL}commentary json{MESSAGE}", is_learnt)
            yield Piece(message.call.arguments, is_learnt=is_learnt)
            yield Piece(CALL, is_control=True, is_learnt=is_learnt)
        else:
            yield from _written(f"{CHANNEL}final{MESSAGE}", is_learnt)
            yield Piece(message.content, is_learnt=is_learnt)
            yield Piece(RETURN, is_control=True, is_learnt=is_learnt)
        is_prompted = False
    if is_prompted:
        raise ValueError("a conversation must end with an assistant message")


def _written(template: str, is_learnt: bool) -> Iterator[Piece]:
    """Split a template of ours at its control tokens."""
    rest = template
    while rest:
        control = next((name for name in CONTROL_TOKENS if rest.startswith(name)), None)
        if control is None:
            cut = rest.find("<|")
            text = rest if cut < 0 else rest[:cut]
            yield Piece(text, is_learnt=is_learnt)
        else:
            text = control
            yield Piece(control, is_control=True, is_learnt=is_learnt)
        rest = rest[len(text) :]


def _generation_prompt() -> list[Piece]:
    return [Piece(START, is_control=True), Piece("assistant")]


def _message(header: str, content: str) -> Iterator[Piece]:
    yield Piece(START, is_control=True)
    yield Piece(header)
    yield Piece(MESSAGE, is_control=True)
    if content:
        yield Piece(content)
    yield Piece(END, is_control=True)


def _past_assistant(message: Message) -> Iterator[Piece]:
    """Write an assistant message of an earlier turn: no reasoning, and a final reply ends like any message."""
    if message.call is None:
        yield from _written(f"{START}assistant{CHANNEL}final{MESSAGE}", is_learnt=False)
        yield Piece(message.content)
        yield Piece(END, is_control=True)
    else:
        yield Piece(START, is_control=True)
        yield Piece(f"assistant to=functions.{message.call.name}")
        yield from _written(f"{CHANNEL}commentary json{MESSAGE}", is_learnt=False)
        yield Piece(message.call.arguments)
        yield Piece(CALL, is_control=True)


def _tool_result(message: Message) -> Iterator[Piece]:
    yield Piece(START, is_control=True)
    yield Piece(f"functions.{message.tool_name} to=assistant")
    yield from _written(f"{CHANNEL}commentary{MESSAGE}", is_learnt=False)
    if message.content:
        yield Piece(message.content)
    yield Piece(END, is_control=True)


def _system_text(conversation: Conversation) -> str:
    lines = [
        "You are ChatGPT, a large language model trained by OpenAI.",
        "Knowledge cutoff: 2024-06",
        f"Current date: {conversation.date}",
        "",
        f"Reasoning: {conversation.effort}",
        "",
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.",
    ]
    if conversation.tools:
        lines.append("Calls to these tools must go to the commentary channel: 'functions'.")
    return "\n".join(lines)


def _developer_text(conversation: Conversation) -> str:
    sections = []
    instructions = "\n\n".join(m.content for m in conversation.messages if m.role == "system" and m.content)
    if instructions:
        sections.append(f"# Instructions\n\n{instructions}")
    if conversation.tools:
        body = "\n\n".join(_tool_type(tool) for tool in conversation.tools)
        sections.append(
            f"# Tools\n\n## functions\n\nnamespace functions {{\n\n{body}\n\n}} // namespace functions"
        )
    if conversation.response_format is not None:
        name = conversation.response_format["name"]
        schema = json.dumps(conversation.response_format["schema"], separators=(",", ":"))
        sections.append(f"# Response Formats\n\n## {name}\n\n{schema}")
    return "\n\n".join(sections)


def _tool_type(tool: dict[str, Any]) -> str:
    """Write a function schema as a TypeScript type."""
    lines = [f"// {line}" for line in tool.get("description", "").splitlines()]
    parameters = tool.get("parameters") or {}
    properties: dict[str, Any] = parameters.get("properties") or {}
    required = parameters.get("required", [])
    if not properties:
        return "\n".join([*lines, f"type {tool['name']} = () => any;"])
    lines.append(f"type {tool['name']} = (_: {{")
    for name, schema in properties.items():
        lines += [f"// {line}" for line in schema.get("description", "").splitlines()]
        mark = "" if name in required else "?"
        default = f" // default: {_default(schema['default'])}" if "default" in schema else ""
        lines.append(f"{name}{mark}: {_type_name(schema)},{default}")
    return "\n".join([*lines, "}) => any;"])


def _default(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _type_name(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema["enum"])
    kind = schema.get("type")
    if kind == "integer":
        return "number"
    if kind == "array":
        return f"{_type_name(schema.get('items', {}))}[]"
    return kind if isinstance(kind, str) else "any"
