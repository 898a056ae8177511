"""Text in and text out: everything between strings and token ids, and nothing else.

No torch, no HTTP, no engine: the API process, the offline face and the training tools share it.

| module | holds |
|---|---|
| `errors` | `TextError` > `TokenizerError`, `ChatRequestError` (carries the path of the offending field) |
| `tokenizer` | `Tokenizer.from_folder`: encode, decode, bytes of each token; `TextCodec`, the seam |
| `messages` | `ChatMessage`, `ToolCall`, `ToolDefinition`, `RenderOptions`; readers of OpenAI's JSON |
| `harmony` | gpt-oss's chat format: render and streaming parse |
"""

from __future__ import annotations

from engine.text.errors import ChatRequestError, TextError, TokenizerError
from engine.text.harmony import AssistantReply, HarmonyIds, HarmonyRenderer
from engine.text.messages import (
    ChatMessage,
    RenderOptions,
    ResponseSchema,
    ToolCall,
    ToolDefinition,
    messages_from_openai,
    tools_from_openai,
)
from engine.text.tokenizer import TextCodec, Tokenizer

__all__ = [
    "AssistantReply",
    "ChatMessage",
    "ChatRequestError",
    "HarmonyIds",
    "HarmonyRenderer",
    "RenderOptions",
    "ResponseSchema",
    "TextCodec",
    "TextError",
    "Tokenizer",
    "TokenizerError",
    "ToolCall",
    "ToolDefinition",
    "messages_from_openai",
    "tools_from_openai",
]
