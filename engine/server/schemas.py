"""The bodies that clients send, as structs: one source of truth for parsing and for the OpenAPI document.

Knows field names and types. Ranges of sampling options live in `SamplingParams`; everything else that must hold is
checked where the field is used. Every optional field takes null, because SDKs send it. Unknown fields are ignored.
"""

from __future__ import annotations

from typing import Any, ClassVar

from msgspec import Struct


class StreamOptions(Struct):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Body(Struct):
    """What `check_fields` reads of every generating route's body."""

    # Fields that are known and cannot be honoured yet. A value other than null is an error, not a silent surprise.
    UNSUPPORTED: ClassVar[dict[str, str]] = {}
    # Accepted and without effect; listed so that they are not reported as unknown.
    IGNORED: ClassVar[frozenset[str]] = frozenset()


class SamplingBody(Body, kw_only=True):
    """What all dialects share. Extensions carry vLLM's names."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None
    # Requests with the same key go to the same one of several engines.
    prompt_cache_key: str | None = None

    UNSUPPORTED: ClassVar[dict[str, str]] = {
        "prompt_logprobs": "Log-probabilities of prompt tokens are not supported yet.",
        "prompt_embeds": "Prompt embeddings are not supported.",
        "bad_words": "bad_words is not supported yet.",
        "allowed_token_ids": "allowed_token_ids is not supported yet.",
        "structured_outputs": "Structured output is not supported yet.",
        "guided_json": "Structured output is not supported yet.",
        "guided_regex": "Structured output is not supported yet.",
        "guided_choice": "Structured output is not supported yet.",
        "guided_grammar": "Structured output is not supported yet.",
        "thinking_token_budget": "thinking_token_budget is not supported yet.",
    }


class GenerationBody(SamplingBody, kw_only=True):
    """What completions and chat share."""

    n: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    IGNORED: ClassVar[frozenset[str]] = frozenset(
        {
            "user",
            "metadata",
            "store",
            "service_tier",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "verbosity",
            "prediction",
            "moderation",
        }
    )


class CompletionBody(GenerationBody, kw_only=True):
    """POST /v1/completions."""

    prompt: Any
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None
    best_of: int | None = None


class ChatBody(GenerationBody, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    functions: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    function_call: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[str] | None = None

    UNSUPPORTED: ClassVar[dict[str, str]] = {
        **GenerationBody.UNSUPPORTED,
        "audio": "Audio is not supported.",
        "web_search_options": "Web search is not supported.",
        "chat_template": "A request cannot bring its own chat template.",
    }


class CountTokensBody(SamplingBody, kw_only=True):
    """POST /v1/messages/count_tokens, which takes what the messages route takes."""

    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None

    UNSUPPORTED: ClassVar[dict[str, str]] = {
        **SamplingBody.UNSUPPORTED,
        "mcp_servers": "The server connects to no tool servers.",
        "output_format": "Structured output is not supported yet.",
    }
    IGNORED: ClassVar[frozenset[str]] = frozenset(
        {
            "cache_control",
            "container",
            "context_management",
            "diagnostics",
            "inference_geo",
            "metadata",
            "service_tier",
            "speed",
            "user_profile_id",
            "workspace_id",
        }
    )


class MessagesBody(CountTokensBody, kw_only=True):
    """POST /v1/messages (Anthropic)."""

    max_tokens: int
    stop_sequences: list[str] | None = None


class ReasoningConfig(Struct):
    effort: str | None = None


class TextConfig(Struct):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class InputTokensBody(SamplingBody, kw_only=True):
    """POST /v1/responses/input_tokens, which takes what the responses route takes."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningConfig | None = None
    text: TextConfig | None = None
    truncation: str | None = None

    UNSUPPORTED: ClassVar[dict[str, str]] = {
        **SamplingBody.UNSUPPORTED,
        "previous_response_id": "Responses are not stored: send the whole conversation as input.",
        "conversation": "Conversations are not stored: send the whole conversation as input.",
        "prompt": "Prompts are not stored: send instructions and input.",
    }
    IGNORED: ClassVar[frozenset[str]] = frozenset(
        {
            "access_programs",
            "client_metadata",
            "context_management",
            "image",
            "max_tool_calls",
            "moderation",
            "personality",
            "prompt_cache_options",
            "prompt_cache_retention",
            "service_tier",
            "store",
            "stream_options",
        }
    )


class ResponsesBody(InputTokensBody, kw_only=True):
    """POST /v1/responses."""

    max_output_tokens: int | None = None
    stop: str | list[str] | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    background: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None


class TokenizeBody(Struct, kw_only=True):
    """POST /tokenize: either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Struct, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None
