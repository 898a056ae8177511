"""The seam between conversations and token ids: one `ChatFormat` per model family.

Knows which format a model speaks. Harmony is the first; families that bring a Jinja template get a `ChatFormat` of
their own here (render the template in a sandbox, encode its pieces, parse text), and nothing else changes.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from engine.core.request import FinishReason
from engine.text.bounded import BoundedCodec
from engine.text.errors import TextError
from engine.text.events import ChatEvent
from engine.text.harmony import AssistantReply, HarmonyIds, HarmonyParser, HarmonyRenderer, map_reasoning_effort
from engine.text.messages import ChatMessage, RenderOptions, ToolDefinition
from engine.text.tokenizer import TextCodec

_CALL_ID_ALPHABET = string.ascii_letters + string.digits
_CALL_ID_LEN = 24


class ChatParser(Protocol):
    """Parses one reply, token ids to events; never raises."""

    @property
    def is_ended(self) -> bool: ...

    def push(self, token_ids: Iterable[int]) -> list[ChatEvent]: ...

    def finish(self, reason: FinishReason) -> list[ChatEvent]: ...

    def take_content_positions(self) -> list[int]: ...


class ChatFormat(Protocol):
    """Renders conversations for one model family and parses its replies."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]: ...

    def render(
        self, messages: Sequence[ChatMessage], tools: Sequence[ToolDefinition], options: RenderOptions
    ) -> list[int]: ...

    def parser(
        self,
        tools: Sequence[ToolDefinition] = (),
        *,
        is_continuation: bool = False,
        parallel_tool_calls: bool = True,
        stream_arguments: bool = False,
    ) -> ChatParser: ...

    def map_reasoning_effort(self, effort: str | None) -> str: ...


class HarmonyChat:
    """The format of gpt-oss and tiny-oss. `new_call_id` is the source of tool call ids, replaceable in tests."""

    def __init__(self, codec: TextCodec, new_call_id: Callable[[], str] | None = None) -> None:
        """Raises: TokenizerError when the vocabulary lacks a control token."""
        self._codec = codec
        self._new_call_id = new_call_id or random_call_id
        self.ids = HarmonyIds.from_codec(codec)
        self._renderer = HarmonyRenderer(codec, self.ids)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The ids that end a reply; the engine stops after emitting one."""
        return self.ids.stop_ids

    def render(
        self, messages: Sequence[ChatMessage], tools: Sequence[ToolDefinition], options: RenderOptions
    ) -> list[int]:
        """Render a prompt; see `HarmonyRenderer.render`.

        Raises: ChatRequestError with the path of the offending field; PromptTooLong, where the options have a limit.
        """
        renderer = self._renderer
        if options.max_prompt_tokens is not None:
            renderer = HarmonyRenderer(BoundedCodec(self._codec, options.max_prompt_tokens), self.ids)
        return renderer.render(messages, tools, options)

    def render_completion(self, reply: AssistantReply) -> list[int]:
        """Render the ids that the model should emit for a reply; see `HarmonyRenderer.render_completion`."""
        return self._renderer.render_completion(reply)

    def parser(
        self,
        tools: Sequence[ToolDefinition] = (),  # noqa: ARG002  Harmony calls name themselves; other formats need them
        *,
        is_continuation: bool = False,
        parallel_tool_calls: bool = True,
        stream_arguments: bool = False,
    ) -> HarmonyParser:
        """Return the parser of one reply; see `HarmonyParser` for the options."""
        return HarmonyParser(
            self._codec,
            self.ids,
            self._new_call_id,
            is_continuation=is_continuation,
            parallel_tool_calls=parallel_tool_calls,
            stream_arguments=stream_arguments,
        )

    def map_reasoning_effort(self, effort: str | None) -> str:
        """Round an API effort to what the model knows.

        Raises: ChatRequestError for a word that is none of the API's.
        """
        return map_reasoning_effort(effort)


_FORMATS: dict[str, Callable[[TextCodec], ChatFormat]] = {"gpt_oss": HarmonyChat}


def chat_format_for(model_type: str, codec: TextCodec) -> ChatFormat:
    """Return the chat format of a model family, by `model_type` of its config.json.

    Raises: TextError when no format is known for it; TokenizerError when the tokenizer does not suit the format.
    """
    if model_type not in _FORMATS:
        raise TextError(f"no chat format is known for model_type {model_type!r} (known: {', '.join(_FORMATS)})")
    return _FORMATS[model_type](codec)


def random_call_id() -> str:
    """Return `call_` and 24 random letters and digits."""
    return "call_" + "".join(secrets.choice(_CALL_ID_ALPHABET) for _ in range(_CALL_ID_LEN))
