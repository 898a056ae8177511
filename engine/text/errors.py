"""The exceptions of `engine.text`.

    TextError
    ├── TokenizerError     a tokenizer file, a token id or a text that cannot be encoded
    ├── PromptTooLong      a prompt of more tokens than its reader takes, known before all of it is encoded
    └── ChatRequestError   a conversation that cannot be rendered; carries the path of the offending field

Messages are one line and safe to show to the client that sent the request.
"""

from __future__ import annotations


class TextError(ValueError):
    """Anything that `engine.text` refuses."""


class TokenizerError(TextError):
    """A tokenizer file is unusable, an id lies outside the vocabulary, or a text cannot be encoded."""


class PromptTooLong(TextError):
    """A prompt has more than `max_tokens` tokens; how many more is not known."""

    def __init__(self, max_tokens: int) -> None:
        super().__init__(f"the prompt has more than {max_tokens} tokens")
        self.max_tokens = max_tokens


class ChatRequestError(TextError):
    """A conversation or a tool definition cannot be rendered.

    `param` is the path of the offending field as the API names it, for example `messages[2].tool_call_id`.
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


def quoted(value: object) -> str:
    """Quote a client's value in a message, cut to a length that is safe to log and to send back."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
