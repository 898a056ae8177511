"""POST /v1/completions: body → engine requests, engine outputs → bytes.

Streamed and whole answers are made from the same pieces, so one is the concatenation of the other.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from engine.core.request import EngineRequest, RequestOutput
from engine.core.sampling_params import SamplingParams
from engine.server import errors, info
from engine.server.choices import (
    TokenNames,
    Usage,
    check_common,
    engine_requests,
    finite,
    new_id,
    resolve_max_tokens,
)
from engine.server.generation import Generation
from engine.server.http import Exchange
from engine.server.parsing import check_fields, convert, sampling_params
from engine.server.schemas import CompletionBody
from engine.server.stream import EventStream
from engine.text import BoundedCodec, OutputProcessor, PromptTooLong, TokenizerError
from engine.text.tokenizer import readable_token

if TYPE_CHECKING:
    from engine.server.app import App

MAX_PROMPTS = 64
DEFAULT_MAX_TOKENS = 16


@dataclass(slots=True)
class Piece:
    """What one engine output adds to one choice. `entries` are (token, logprob, alternatives, offset)."""

    index: int
    text: str
    entries: list[tuple[str, float, dict[str, float], int]] = field(default_factory=list)
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class Choice:
    """One sequence of the answer: engine outputs in, pieces out."""

    def __init__(self, app: App, index: int, params: SamplingParams, body: CompletionBody, echo: str) -> None:
        self.index = index
        self._processor = OutputProcessor(
            app.tokenizer,
            stop=params.stop,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
        )
        self._names = TokenNames(app.tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._num_top = params.logprobs
        self._returns_ids = bool(body.return_token_ids)
        self._echo = echo
        self._offset = len(echo)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, output: RequestOutput) -> tuple[Piece, int, bool]:
        """Return the piece, the number of tokens used, and whether the engine must be told to stop."""
        update = self._processor.push(output.new_token_ids, output.finish_reason, output.stop_token_id)
        text = self._echo + update.text if self._echo else update.text
        self._echo = ""
        piece = Piece(self.index, text)
        if update.finish_reason is not None:
            piece.finish_reason = update.finish_reason.value
        if self._num_top is not None and output.new_logprobs is not None:
            self._add_entries(piece, output, update.num_tokens)
        if self._returns_ids:
            piece.token_ids = output.new_token_ids[: update.num_tokens]
        return piece, update.num_tokens, update.must_abort

    def only_echo(self) -> Piece:
        """Return the piece of a request for no tokens."""
        return Piece(self.index, self._echo, finish_reason="length", token_ids=[] if self._returns_ids else None)

    def _add_entries(self, piece: Piece, output: RequestOutput, num_used: int) -> None:
        used = zip(output.new_token_ids[:num_used], (output.new_logprobs or ())[:num_used], strict=False)
        for token_id, logprobs in used:
            data = self._names.bytes(token_id)
            if not data:
                continue
            top = self._names.completion_top(token_id, logprobs, self._num_top or 0)
            piece.entries.append((readable_token(data), finite(logprobs.logprob), top, self._offset))
            self._offset += len(self._decoder.decode(data))


@dataclass(slots=True)
class Plan:
    """A completion request, understood: what to run and how to lay the answer out."""

    id: str
    created: int
    model: str
    requests: list[EngineRequest]
    choices: list[Choice]
    usage: Usage
    num_per_prompt: int
    has_logprobs: bool
    is_streaming: bool
    includes_usage: bool


async def create_completion(app: App, exchange: Exchange) -> None:
    """Answer POST /v1/completions."""
    info.check_accepting(app)
    data = await exchange.read_json(app.config.server.max_body_bytes)
    plan = await app.run_text(exchange.body_bytes, _plan, app, data)
    if not plan.requests:
        pieces = [choice.only_echo() for choice in plan.choices]
        await _answer_pieces(app, exchange, plan, _replay(pieces))
        return
    async with Generation(app, exchange, plan.requests) as generation:
        await _answer_pieces(app, exchange, plan, _pieces(plan, generation))


def _plan(app: App, data: dict[str, Any]) -> Plan:
    check_fields(data, CompletionBody)
    body = convert(data, CompletionBody)
    info.check_model(app, body.model)
    check_common(body)
    if body.suffix:
        raise errors.unsupported_parameter("suffix", "This model has no fill-in-the-middle tokens.")
    if body.echo and body.logprobs is not None:
        raise errors.unsupported_parameter("logprobs", "logprobs together with echo is not supported yet.")
    params = sampling_params(
        body,
        defaults=app.generation_defaults,
        max_tokens=body.max_tokens,
        logprobs=body.logprobs,
        vocab_size=app.engine.model.vocab_size,
        n=body.n,
        stop=body.stop,
    )
    if body.best_of is not None and body.best_of != params.n:
        if body.best_of < params.n:
            raise errors.invalid_value("best_of", "best_of must not be below n.")
        raise errors.unsupported_parameter("best_of", "best_of above n is not supported yet.")
    prompts = read_prompts(app, body.prompt)
    encoded, limits = [], []
    for prompt, path in prompts:
        ids = _encode(app, prompt, path, body.max_tokens)
        encoded.append(ids)
        limits.append(resolve_max_tokens(app, len(ids), body.max_tokens, DEFAULT_MAX_TOKENS, path))
    answer_id = new_id("cmpl-")
    requests = engine_requests(app, answer_id, encoded, params, limits, app.engine.model.eos_token_ids, body)
    echoes = [_echo(app, prompt) if body.echo else "" for prompt, _ in prompts]
    choices = [
        Choice(app, i * params.n + j, params, body, echo) for i, echo in enumerate(echoes) for j in range(params.n)
    ]
    return Plan(
        id=answer_id,
        created=int(time.time()),
        model=body.model,
        requests=requests if body.max_tokens != 0 else [],
        choices=choices,
        usage=Usage(sum(len(ids) for ids in encoded)),
        num_per_prompt=params.n,
        has_logprobs=body.logprobs is not None,
        is_streaming=bool(body.stream),
        includes_usage=bool(body.stream_options and body.stream_options.include_usage),
    )


def read_prompts(app: App, prompt: object) -> list[tuple[str | list[int], str]]:
    """Read `prompt` in its four forms and return each prompt with its path.

    Raises: ApiError 400 for another form, an empty prompt, too many, or an id outside the vocabulary.
    """
    if isinstance(prompt, list) and prompt and not _is_ids(prompt):
        if len(prompt) > MAX_PROMPTS:
            raise errors.invalid_value("prompt", f"At most {MAX_PROMPTS} prompts per request.")
        found = [(_one_prompt(app, item, f"prompt[{i}]"), f"prompt[{i}]") for i, item in enumerate(prompt)]
    else:
        found = [(_one_prompt(app, prompt, "prompt"), "prompt")]
    return found


def _one_prompt(app: App, prompt: object, path: str) -> str | list[int]:
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and _is_ids(prompt):
        check_ids(app, prompt, path)
        return prompt
    if prompt in ("", []):
        raise errors.invalid_value(path, f"{path}: the prompt is empty.")
    raise errors.invalid_value(path, f"{path}: expected a string, a list of token ids, or a list of these.")


def _is_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)


def check_ids(app: App, ids: list[int], path: str) -> None:
    """Raise ApiError 400 for an id that is no row of the model's embedding."""
    size = app.engine.model.vocab_size
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < size:
            raise errors.invalid_value(
                f"{path}[{position}]", f"{path}[{position}]: token ids are between 0 and {size - 1}."
            )


def _encode(app: App, prompt: str | list[int], path: str, asked: int | None) -> list[int]:
    if isinstance(prompt, list):
        return prompt
    limit = app.engine.max_model_len
    try:
        return BoundedCodec(app.tokenizer, limit).encode(prompt)
    except PromptTooLong:
        raise errors.context_length_exceeded(limit, None, 1 if asked is None else asked, path) from None
    except TokenizerError:
        raise errors.invalid_value(path, f"{path}: this text cannot be encoded.") from None


def _echo(app: App, prompt: str | list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    known = [token_id for token_id in prompt if token_id < app.tokenizer.vocab_size]
    return app.tokenizer.decode(known)


async def _pieces(plan: Plan, generation: Generation) -> AsyncIterator[Piece]:
    async for index, output in generation.outputs():
        piece, num_used, must_abort = plan.choices[index].feed(output)
        plan.usage.add(index // plan.num_per_prompt, output, num_used)
        if must_abort:
            generation.stop(index)
        yield piece


async def _replay(pieces: list[Piece]) -> AsyncIterator[Piece]:
    for piece in pieces:
        yield piece


async def _answer_pieces(app: App, exchange: Exchange, plan: Plan, pieces: AsyncIterator[Piece]) -> None:
    if plan.is_streaming:
        await _stream(app, exchange, plan, pieces)
    else:
        await _whole(app, exchange, plan, pieces)


async def _stream(app: App, exchange: Exchange, plan: Plan, pieces: AsyncIterator[Piece]) -> None:
    head = _chunk_head(app, plan)
    tail = b',"usage":null}\n\n' if plan.includes_usage else b"}\n\n"
    async with EventStream(exchange) as stream:
        async for piece in pieces:
            await stream.send(head + orjson.dumps(_choice_json(plan, [piece])) + b"]" + tail)
        last = b""
        if plan.includes_usage:
            last = head + b'],"usage":' + orjson.dumps(plan.usage.to_json()) + b"}\n\n"
        await stream.end(last)


def _chunk_head(app: App, plan: Plan) -> bytes:
    head = {
        "id": plan.id,
        "object": "text_completion",
        "created": plan.created,
        "model": plan.model,
        "system_fingerprint": app.fingerprint,
        "choices": [],
    }
    return b"data: " + orjson.dumps(head)[:-2]


async def _whole(app: App, exchange: Exchange, plan: Plan, pieces: AsyncIterator[Piece]) -> None:
    collected: list[list[Piece]] = [[] for _ in plan.choices]
    async for piece in pieces:
        collected[piece.index].append(piece)
    await exchange.answer_json(
        200,
        {
            "id": plan.id,
            "object": "text_completion",
            "created": plan.created,
            "model": plan.model,
            "system_fingerprint": app.fingerprint,
            "choices": [_choice_json(plan, parts) for parts in collected],
            "usage": plan.usage.to_json(),
        },
    )


def _choice_json(plan: Plan, pieces: list[Piece]) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": pieces[-1].index,
        "text": "".join([piece.text for piece in pieces]),
        "logprobs": _logprobs_json(pieces) if plan.has_logprobs else None,
        "finish_reason": pieces[-1].finish_reason,
    }
    if pieces[-1].token_ids is not None:
        choice["token_ids"] = [token_id for piece in pieces for token_id in piece.token_ids or ()]
    return choice


def _logprobs_json(pieces: list[Piece]) -> dict[str, Any]:
    entries = [entry for piece in pieces for entry in piece.entries]
    return {
        "tokens": [entry[0] for entry in entries],
        "token_logprobs": [entry[1] for entry in entries],
        "top_logprobs": [entry[2] for entry in entries],
        "text_offset": [entry[3] for entry in entries],
    }
