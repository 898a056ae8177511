"""What a chat parser says about a reply, piece by piece, and the whole reply those pieces make.

A dialect writes events into its stream, or collects them into a `ChatReply`: the answer of a stream and the answer
without one are the same by construction. `message` numbers the model's own messages within the reply, from 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from engine.text.messages import ToolCall

ChatFinishReason: TypeAlias = Literal["stop", "length", "tool_calls"]
ContentChannel: TypeAlias = Literal["final", "commentary"]


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """A piece of the chain of thought."""

    text: str
    message: int


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """A piece of text for the user; `commentary` is a preamble, said before calls."""

    text: str
    message: int
    channel: ContentChannel = "final"


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins. Id and name are said once; `index` counts the calls of the reply from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolArgumentsDelta:
    """A piece of a call's arguments; the pieces of one call concatenate to JSON text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """The last event of a reply. `reasoning_tokens` counts the tokens of the chain of thought, control tokens not."""

    finish_reason: ChatFinishReason
    reasoning_tokens: int


ChatEvent: TypeAlias = ReasoningDelta | ContentDelta | ToolCallStart | ToolArgumentsDelta | StreamEnd


@dataclass(frozen=True, slots=True)
class ChatReply:
    """A whole reply. Empty text is the empty string; a dialect decides where that becomes null."""

    content: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: ChatFinishReason | None
    reasoning_tokens: int


def collect_reply(events: Iterable[ChatEvent]) -> ChatReply:
    """Concatenate events into the reply; `finish_reason` is None when the events hold no `StreamEnd`."""
    content: list[str] = []
    reasoning: list[str] = []
    starts: list[ToolCallStart] = []
    arguments: dict[int, list[str]] = {}
    end: StreamEnd | None = None
    for event in events:
        match event:
            case ContentDelta():
                content.append(event.text)
            case ReasoningDelta():
                reasoning.append(event.text)
            case ToolCallStart():
                starts.append(event)
            case ToolArgumentsDelta():
                arguments.setdefault(event.index, []).append(event.text)
            case StreamEnd():
                end = event
    return ChatReply(
        content="".join(content),
        reasoning="".join(reasoning),
        tool_calls=tuple(ToolCall(s.id, s.name, "".join(arguments.get(s.index, ()))) for s in starts),
        finish_reason=end.finish_reason if end else None,
        reasoning_tokens=end.reasoning_tokens if end else 0,
    )
