"""Text in and text out: everything between strings and token ids, and nothing else.

No torch, no HTTP, no engine: the API process, the offline face and the training tools share it.

| module | holds |
|---|---|
| `errors` | `TextError` > `TokenizerError`, `PromptTooLong`, `ChatRequestError` (carries the field's path) |
| `tokenizer` | `Tokenizer.from_folder`: encode, decode, bytes of each token; `TextCodec`, the seam |
| `bounded` | `BoundedCodec`: stops at a prompt that is too long for sure |
| `messages` | `ChatMessage`, `ToolCall`, `ToolDefinition`, `RenderOptions`; readers of OpenAI's JSON |
| `events` | what a chat parser says, and `collect_reply` |
| `harmony` | gpt-oss's chat format: render and streaming parse |
| `chat` | the seam `ChatFormat`, `HarmonyChat`, `chat_format_for(model_type, tokenizer)` |
| `detokenizer`, `stop` | the pieces of a text stream: bytes to characters, stop strings |
| `output` | `OutputProcessor`, `ChatOutputProcessor`: engine tokens → what a client reads |
"""

from __future__ import annotations

from engine.text.bounded import BoundedCodec
from engine.text.chat import ChatFormat, ChatParser, HarmonyChat, chat_format_for
from engine.text.detokenizer import Detokenizer
from engine.text.errors import ChatRequestError, PromptTooLong, TextError, TokenizerError
from engine.text.events import (
    ChatEvent,
    ChatReply,
    ContentDelta,
    ReasoningDelta,
    StreamEnd,
    ToolArgumentsDelta,
    ToolCallStart,
    collect_reply,
)
from engine.text.harmony import AssistantReply, HarmonyIds, HarmonyParser, HarmonyRenderer
from engine.text.messages import (
    ChatMessage,
    RenderOptions,
    ResponseSchema,
    ToolCall,
    ToolDefinition,
    messages_from_openai,
    tools_from_openai,
)
from engine.text.output import ChatOutputProcessor, ChatUpdate, OutputProcessor, TextUpdate, TokenText, token_text
from engine.text.stop import StopMatcher
from engine.text.tokenizer import TextCodec, Tokenizer

__all__ = [
    "AssistantReply",
    "BoundedCodec",
    "ChatEvent",
    "ChatFormat",
    "ChatMessage",
    "ChatOutputProcessor",
    "ChatParser",
    "ChatReply",
    "ChatRequestError",
    "ChatUpdate",
    "ContentDelta",
    "Detokenizer",
    "HarmonyChat",
    "HarmonyIds",
    "HarmonyParser",
    "HarmonyRenderer",
    "OutputProcessor",
    "PromptTooLong",
    "ReasoningDelta",
    "RenderOptions",
    "ResponseSchema",
    "StopMatcher",
    "StreamEnd",
    "TextCodec",
    "TextError",
    "TextUpdate",
    "TokenText",
    "Tokenizer",
    "TokenizerError",
    "ToolArgumentsDelta",
    "ToolCall",
    "ToolCallStart",
    "ToolDefinition",
    "chat_format_for",
    "collect_reply",
    "messages_from_openai",
    "token_text",
    "tools_from_openai",
]
