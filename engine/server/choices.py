"""What the dialects share: checks of the common fields, engine requests, logprobs, usage.

Knows limits and the arithmetic of contexts and seeds. Refuses to know how an answer is laid out.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.core.request import EngineRequest, RequestOutput, TokenLogprobs
from engine.core.sampling_params import SamplingParams, sequence_seed
from engine.server import errors
from engine.server.schemas import GenerationBody, SamplingBody
from engine.text import Tokenizer
from engine.text.tokenizer import readable_token

if TYPE_CHECKING:
    from engine.server.app import App

MAX_SEQUENCES = 128
MAX_CACHE_SALT_CHARS = 256


def check_common(body: GenerationBody) -> None:
    """Raise ApiError 400 for combinations that neither completions nor chat takes."""
    if body.stream_options is not None and not body.stream:
        raise errors.invalid_value("stream_options", "stream_options is only allowed when stream is true.")
    check_sharing(body)


def check_sharing(body: SamplingBody) -> None:
    """Raise ApiError 400 for a cache salt or a priority that no engine request can carry."""
    if body.cache_salt is not None and not 1 <= len(body.cache_salt) <= MAX_CACHE_SALT_CHARS:
        raise errors.invalid_value("cache_salt", f"cache_salt must have 1 to {MAX_CACHE_SALT_CHARS} characters.")
    if body.priority is not None and not -(2**31) <= body.priority < 2**31:
        raise errors.invalid_value("priority", "priority must be a 32-bit integer.")


def resolve_max_tokens(app: App, num_prompt_tokens: int, asked: int | None, default: int | None, param: str) -> int:
    """Return the output tokens that a prompt may get: what was asked, or the default, or the room in the context.

    Raises: ApiError 400 `context_length_exceeded` when prompt and completion do not fit.
    """
    limit = app.engine.max_model_len
    room = limit - num_prompt_tokens
    if asked is not None:
        if asked > room:
            raise errors.context_length_exceeded(limit, num_prompt_tokens, asked, param)
        return asked
    if room < 1:
        raise errors.context_length_exceeded(limit, num_prompt_tokens, 1, param)
    return room if default is None else min(default, room)


def engine_requests(
    app: App,
    answer_id: str,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    max_tokens: Sequence[int],
    stop_token_ids: tuple[int, ...],
    body: SamplingBody,
) -> list[EngineRequest]:
    """Make prompts × n requests, numbered in order; choice j of every prompt has the j-th derived seed."""
    if len(prompts) * params.n > MAX_SEQUENCES:
        raise errors.invalid_value("n", f"At most {MAX_SEQUENCES} sequences per request (prompts times n).")
    base = params.seed if params.seed is not None else app.next_seed()
    stops = stop_token_ids if not params.ignore_eos else ()
    stops = tuple(dict.fromkeys((*stops, *params.stop_token_ids)))
    salt = hashlib.sha256(body.cache_salt.encode()).hexdigest() if body.cache_salt else ""
    # A digest bounds the length of a name that lives as long as the server.
    key = body.prompt_cache_key
    conversation = hashlib.sha256(key.encode()).hexdigest() if key else ""
    now = time.monotonic()
    return [
        EngineRequest(
            request_id=f"{answer_id}-{index * params.n + j}",
            prompt_token_ids=prompt,
            params=params,
            max_tokens=limit,
            seed=sequence_seed(base, j),
            stop_token_ids=stops,
            priority=body.priority or 0,
            arrival_time=now,
            cache_salt=salt,
            conversation=conversation,
        )
        for index, (prompt, limit) in enumerate(zip(prompts, max_tokens, strict=True))
        for j in range(params.n)
    ]


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


@dataclass(slots=True)
class Usage:
    """Token counts of one answer. Prompts count once, whatever `n` is."""

    prompt_tokens: int
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: dict[int, int] = field(default_factory=dict)

    def add(self, prompt_index: int, output: RequestOutput, num_used: int) -> None:
        self.completion_tokens += num_used
        if output.num_cached_tokens is not None:
            seen = self.cached_tokens.get(prompt_index, 0)
            self.cached_tokens[prompt_index] = max(seen, output.num_cached_tokens)

    @property
    def num_cached(self) -> int:
        """Prompt tokens that the prefix cache held, never more than there are."""
        return min(self.prompt_tokens, sum(self.cached_tokens.values()))

    def to_json(self) -> dict[str, Any]:
        """Lay out as chat and completions do."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


class TokenNames:
    """Tokens as logprobs show them. Control tokens are empty unless the request asked to see them."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens

    def bytes(self, token_id: int) -> bytes:
        if self._skips and self._tokenizer.is_special(token_id):
            return b""
        return self._tokenizer.token_bytes(token_id)

    def chat_entry(self, token_id: int, logprobs: TokenLogprobs, num_top: int) -> dict[str, Any]:
        """Lay out one position for chat; `top_logprobs` best first."""
        top = zip(logprobs.top_ids[:num_top], logprobs.top_logprobs[:num_top], strict=True)
        entry = self._chat_token(token_id, logprobs.logprob)
        entry["top_logprobs"] = [self._chat_token(top_id, value) for top_id, value in top]
        return entry

    def _chat_token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self.bytes(token_id)
        return {"token": readable_token(data), "logprob": finite(logprob), "bytes": list(data)}

    def completion_top(self, token_id: int, logprobs: TokenLogprobs, num_top: int) -> dict[str, float]:
        """Lay out the alternatives of one position for completions; the sampled token is always among them."""
        top = zip(logprobs.top_ids[:num_top], logprobs.top_logprobs[:num_top], strict=True)
        found = {readable_token(self.bytes(top_id)): finite(value) for top_id, value in top}
        found.setdefault(readable_token(self.bytes(token_id)), finite(logprobs.logprob))
        return found


def finite(value: float) -> float:
    """Clamp what JSON cannot carry: -inf and NaN become -9999.0."""
    return value if value > -9999.0 else -9999.0
