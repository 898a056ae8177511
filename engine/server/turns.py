"""History written as blocks and items, put together to the messages that a chat format renders.

Anthropic's Messages and OpenAI's Responses cut an assistant's turn into pieces: thinking, text, calls, results. Knows
which pieces make one message and which call a result answers. Refuses to know either dialect's JSON.
"""

from __future__ import annotations

from engine.server import errors
from engine.text import ChatMessage, ChatRequestError, ToolCall
from engine.text.errors import quoted
from engine.text.messages import Role, function_name


class Turns:
    """Collects pieces in their order; `finish` returns the messages. `path` names a piece in errors."""

    def __init__(self) -> None:
        self._messages: list[ChatMessage] = []
        self._call_ids: set[str] = set()
        self._reasoning: list[str] = []
        self._text: list[str] = []
        self._calls: list[ToolCall] = []

    def say(self, role: Role, text: str) -> None:
        """Add a whole message of anybody but the assistant."""
        self._close()
        self._messages.append(ChatMessage(role, text))

    def reason(self, text: str) -> None:
        """Add a piece of the assistant's chain of thought, which opens a new message after text and calls."""
        if self._text or self._calls:
            self._close()
        if text:
            self._reasoning.append(text)

    def answer(self, text: str, *, is_message: bool = False) -> None:
        """Add a piece of the assistant's text; `is_message` says that it does not go on with the text before."""
        if self._calls or (is_message and self._text):
            self._close()
        if text:
            self._text.append(text)

    def call(self, call_id: object, name: object, arguments: str, path: str, id_field: str) -> None:
        """Add a call of the assistant. Raises: ApiError 400 for an id that is no string or a name that is none."""
        if not isinstance(call_id, str) or not call_id:
            raise errors.invalid_value(f"{path}.{id_field}", f"{path}.{id_field}: a call needs an id.")
        try:
            known_name = function_name(name, f"{path}.name")
        except ChatRequestError as error:
            raise errors.invalid_value(error.param, f"{error.param}: {error}.") from None
        self._call_ids.add(call_id)
        self._calls.append(ToolCall(call_id, known_name, arguments))

    def result(self, call_id: object, text: str, path: str, id_field: str) -> None:
        """Add the result of an earlier call. Raises: ApiError 400 for an id that no call has."""
        if not isinstance(call_id, str) or call_id not in self._call_ids:
            at = f"{path}.{id_field}"
            raise errors.invalid_value(at, f"{at}: no earlier call has the id {quoted(call_id)}.")
        self._close()
        self._messages.append(ChatMessage("tool", text, tool_call_id=call_id))

    def finish(self) -> list[ChatMessage]:
        """Return the messages."""
        self._close()
        return self._messages

    def _close(self) -> None:
        if self._reasoning or self._text or self._calls:
            self._messages.append(
                ChatMessage(
                    "assistant",
                    "".join(self._text) or None,
                    reasoning="\n".join(self._reasoning) or None,
                    tool_calls=tuple(self._calls),
                )
            )
        self._reasoning, self._text, self._calls = [], [], []
