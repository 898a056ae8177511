"""A conversation as an OpenAI client would send it, plus the reply that the model should learn.

Knows: messages, tool schemas, reasoning effort and date; nothing about tokens.
Refuses to know: how Harmony writes them; `render.py` does that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
Effort = Literal["low", "medium", "high"]


@dataclass(frozen=True)
class Call:
    """One tool call; `arguments` is the JSON text exactly as the model writes it."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One message; assistant messages may carry reasoning and a call, tool messages name their function."""

    role: Role
    content: str = ""
    reasoning: str | None = None
    call: Call | None = None
    tool_name: str | None = None


@dataclass(frozen=True)
class Conversation:
    """A whole exchange; the assistant messages after the last user message are what is learnt."""

    messages: tuple[Message, ...]
    date: str
    effort: Effort = "medium"
    tools: tuple[dict[str, Any], ...] = ()
    response_format: dict[str, Any] | None = None
    skill: str = field(default="", compare=False)

    def prompt_length(self) -> int:
        """Return the number of messages up to and including the last user message."""
        return 1 + max(index for index, message in enumerate(self.messages) if message.role == "user")
