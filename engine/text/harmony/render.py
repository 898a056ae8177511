"""Conversations to Harmony token ids, and assistant replies to the ids a model should emit.

Knows the layout of messages, the system and developer prompts and which part of the history the model may see.
Refuses to know clocks and ids of its own: dates arrive in `RenderOptions`, control tokens in `HarmonyIds`.

Control tokens are placed as ids; every text between them is encoded as ordinary text. So no request can write a
control token, and a prompt is a pure function of its arguments.

    <|start|>{header}<|message|>{content}<|end|>     (a call ends with <|call|>)
    <|start|>assistant                                (the end of a prompt)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.text.errors import ChatRequestError, quoted
from engine.text.harmony.ids import HarmonyIds
from engine.text.harmony.typescript import render_tools
from engine.text.messages import (
    ChatMessage,
    RenderOptions,
    ResponseSchema,
    ToolCall,
    ToolDefinition,
    compact_json,
)
from engine.text.tokenizer import TextCodec

MODEL_IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"
_CHANNELS_LINE = "# Valid channels: analysis, commentary, final. Channel must be included for every message."
_FUNCTIONS_LINE = "Calls to these tools must go to the commentary channel: 'functions'."
_EFFORTS = {
    "none": "low",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}
DEFAULT_EFFORT = "medium"
FUNCTIONS_PREFIX = "functions."


@dataclass(frozen=True, slots=True)
class AssistantReply:
    """One whole turn of the assistant in the order in which it is written.

    Reasoning, then a `preamble` that the user sees, then calls, then the final answer. Empty parts are left out.
    """

    reasoning: str | None = None
    preamble: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    final: str | None = None


def map_reasoning_effort(effort: str | None) -> str:
    """Round an API effort to what gpt-oss knows: low, medium or high; None is medium.

    Raises: ChatRequestError for a word that is none of the API's.
    """
    if effort is None:
        return DEFAULT_EFFORT
    if effort not in _EFFORTS:
        raise ChatRequestError(
            f"reasoning effort {quoted(effort)} is none of {', '.join(_EFFORTS)}", "reasoning_effort"
        )
    return _EFFORTS[effort]


class HarmonyRenderer:
    """Renders conversations with one tokenizer; immutable and thread-safe."""

    def __init__(self, codec: TextCodec, ids: HarmonyIds | None = None) -> None:
        self._codec = codec
        self.ids = ids or HarmonyIds.from_codec(codec)

    def render(
        self, messages: Sequence[ChatMessage], tools: Sequence[ToolDefinition], options: RenderOptions
    ) -> list[int]:
        """Render a prompt: system, developer, history and the opening of the assistant's turn.

        Raises: ChatRequestError for a tool result that belongs to no call, a continuation that ends in
        no assistant text, or an unknown effort.
        """
        tokens = self._message("system", system_text(options, has_functions=bool(tools)))
        num_leading = _num_leading_instructions(messages)
        developer = developer_text(messages[:num_leading], tools, options.response_schema)
        if developer:
            tokens += self._message("developer", developer)
        open_index = _open_index(messages) if options.continue_final_message else None
        last_final = max((i for i, m in enumerate(messages) if _is_final(m) and i != open_index), default=-1)
        names: dict[str, str] = {}  # tool_call_id -> function name, as far as the history has been read
        for index in range(num_leading, len(messages)):
            message = messages[index]
            if message.role == "assistant":
                names.update({call.id: call.name for call in message.tool_calls})
                tokens += self._assistant(message, keeps_analysis=index > last_final, is_open=index == open_index)
            elif message.role == "tool":
                name = _tool_name(message, names, index)
                author = FUNCTIONS_PREFIX + name
                tokens += self._message(author, message.content or "", recipient="assistant", channel="commentary")
            elif message.role == "user":
                tokens += self._message("user", message.content or "")
            else:  # instructions in mid-conversation stay where they were said
                tokens += self._message("developer", developer_text([message], (), None))
        if options.add_generation_prompt and open_index is None:
            tokens += [self.ids.start, *self._codec.encode("assistant")]
        return tokens

    def render_completion(self, reply: AssistantReply) -> list[int]:
        """Render what the model should emit after the prompt of `render`, up to and with its stop token.

        The first header continues the prompt's `<|start|>assistant`. A final answer ends with `<|return|>`, a turn
        of calls with `<|call|>` after the last call.
        Raises: ValueError when the reply holds both calls and a final answer, or neither.
        """
        if bool(reply.tool_calls) == (reply.final is not None):
            raise ValueError("a completion ends either in tool calls or in a final answer")
        tokens: list[int] = []
        if reply.reasoning:
            tokens += self._message("assistant", reply.reasoning, channel="analysis")
        if reply.preamble:
            tokens += self._message("assistant", reply.preamble, channel="commentary")
        for num_left, call in zip(reversed(range(len(reply.tool_calls))), reply.tool_calls, strict=True):
            tokens += self._call(call, self.ids.end if num_left else self.ids.call)
        if reply.final is not None:
            tokens += self._message("assistant", reply.final, channel="final", closer=self.ids.return_)
        return tokens[1 + len(self._codec.encode("assistant")) :]

    def _assistant(self, message: ChatMessage, *, keeps_analysis: bool, is_open: bool) -> list[int]:
        tokens: list[int] = []
        if message.reasoning and keeps_analysis:
            tokens += self._message("assistant", message.reasoning, channel="analysis")
        text = message.content or ""
        if message.tool_calls:
            if text:
                tokens += self._message("assistant", text, channel="commentary")
            for call in message.tool_calls:
                tokens += self._call(call, self.ids.call)
        elif _is_final(message) or not message.reasoning:
            tokens += self._message("assistant", text, channel="final")
            if is_open:
                tokens.pop()
        return tokens

    def _call(self, call: ToolCall, closer: int) -> list[int]:
        recipient = FUNCTIONS_PREFIX + call.name
        arguments = call.arguments or "{}"
        return self._message("assistant", arguments, recipient=recipient, channel="commentary json", closer=closer)

    def _message(
        self,
        author: str,
        content: str,
        *,
        recipient: str | None = None,
        channel: str | None = None,
        closer: int | None = None,
    ) -> list[int]:
        """Write one message. The author is encoded alone, so that the header of a reply continues the prompt."""
        encode, ids = self._codec.encode, self.ids
        tokens = [ids.start, *encode(author)]
        if recipient is not None:
            tokens += encode(f" to={recipient}")
        if channel is not None:
            tokens += [ids.channel, *encode(channel)]
        return [*tokens, ids.message, *encode(content), ids.end if closer is None else closer]


def system_text(options: RenderOptions, *, has_functions: bool) -> str:
    """Write the system message: identity, dates, effort, channels and, with functions, where calls go."""
    lines = [
        MODEL_IDENTITY,
        f"Knowledge cutoff: {KNOWLEDGE_CUTOFF}",
        f"Current date: {options.current_date}",
        "",
        f"Reasoning: {map_reasoning_effort(options.reasoning_effort)}",
        "",
        _CHANNELS_LINE,
    ]
    if has_functions:
        lines.append(_FUNCTIONS_LINE)
    return "\n".join(lines)


def developer_text(
    instructions: Sequence[ChatMessage], tools: Sequence[ToolDefinition], schema: ResponseSchema | None
) -> str:
    """Write the developer message: instructions, tools, response formats; empty when there is nothing to say."""
    sections = []
    texts = [message.content for message in instructions if message.content]
    if texts:
        sections.append("# Instructions\n\n" + "\n\n".join(texts))
    if tools:
        sections.append("# Tools\n\n## functions\n\n" + render_tools(tools))
    if schema is not None:
        comment = "".join(f"// {line}\n" for line in schema.description.splitlines())
        body = compact_json(schema.schema, "response_format.json_schema.schema")
        sections.append(f"# Response Formats\n\n## {schema.name}\n\n{comment}{body}")
    return "\n\n".join(sections)


def _num_leading_instructions(messages: Sequence[ChatMessage]) -> int:
    for index, message in enumerate(messages):
        if message.role not in ("system", "developer"):
            return index
    return len(messages)


def _is_final(message: ChatMessage) -> bool:
    """Whether an assistant message answers the user, which ends the chain of thought before it."""
    return message.role == "assistant" and not message.tool_calls and bool(message.content)


def _open_index(messages: Sequence[ChatMessage]) -> int:
    if not messages or not _is_final(messages[-1]):
        raise ChatRequestError(
            "continue_final_message needs a last message of the assistant with text",
            f"messages[{len(messages) - 1}]",
        )
    return len(messages) - 1


def _tool_name(message: ChatMessage, names: dict[str, str], index: int) -> str:
    """Return the function whose result this is, by the id of its call or by the older `name`."""
    if message.tool_call_id is None:
        if message.name is None:
            raise ChatRequestError("a tool message needs tool_call_id", f"messages[{index}].tool_call_id")
        return message.name
    if message.tool_call_id not in names:
        raise ChatRequestError(
            f"no earlier tool call has the id {quoted(message.tool_call_id)}", f"messages[{index}].tool_call_id"
        )
    return names[message.tool_call_id]
