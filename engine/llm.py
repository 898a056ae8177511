"""The offline face: load a model in this process, generate for a list of prompts, return text.

    from engine import LLM, SamplingParams

    llm = LLM("tiny-oss")
    for result in llm.generate(["ROMEO:", "JULIET:"], SamplingParams(max_tokens=40)):
        print(result.prompt, result.outputs[0].text)

The same scheduler, worker and text processing as the server's; no socket, no second process.
"""

from __future__ import annotations

import datetime
import itertools
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tqdm import tqdm

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.core.request import EngineRequest, FinishReason, RequestOutput, TokenLogprobs
from engine.core.sampling_params import SamplingParams, sequence_seed
from engine.device import default_device
from engine.engine_core import EngineCore, open_model
from engine.text import (
    ChatFormat,
    ChatOutputProcessor,
    OutputProcessor,
    RenderOptions,
    TextUpdate,
    Tokenizer,
    ToolCall,
    chat_format_for,
    collect_reply,
    messages_from_openai,
    tools_from_openai,
)
from engine.text.events import ChatEvent

Prompt = str | Sequence[int]


class GenerationError(RuntimeError):
    """A request was refused or failed; the message says which one and why."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer. `finish_reason` is `stop` or `length`, for a chat also `tool_calls`."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprobs] | None = None
    stop_string: str | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A prompt and its `n` answers, in order. `prompt` is None when token ids were given."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion]
    num_cached_tokens: int = 0


class _TokensOnly:
    """An output processor for models without a tokenizer: no text, no stop strings."""

    def push(
        self, token_ids: Sequence[int], finish_reason: FinishReason | None, stop_token_id: int | None
    ) -> TextUpdate:
        del stop_token_id
        return TextUpdate("", len(token_ids), finish_reason)


@dataclass(slots=True)
class _Sequence:
    """One engine request under way and what it has said."""

    prompt_index: int
    index: int
    processor: OutputProcessor | ChatOutputProcessor | _TokensOnly
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    events: list[ChatEvent] = field(default_factory=list)
    finish_reason: str | None = None
    stop_string: str | None = None
    num_cached_tokens: int = 0

    def push(self, output: RequestOutput) -> bool:
        """Take an output; True when the text ended before the engine did."""
        update = self.processor.push(output.new_token_ids, output.finish_reason, output.stop_token_id)
        self.token_ids += output.new_token_ids[: update.num_tokens]
        if output.new_logprobs is not None:
            self.logprobs += output.new_logprobs[: update.num_tokens]
        if output.num_cached_tokens is not None:
            self.num_cached_tokens = output.num_cached_tokens
        if hasattr(update, "events"):
            self.events += update.events
        else:
            self.parts.append(update.text)
        if update.finish_reason is not None:
            self.finish_reason = str(update.finish_reason)
            self.stop_string = update.stop_string
        return update.must_abort

    def completion(self, *, wants_logprobs: bool) -> Completion:
        reply = collect_reply(self.events)
        return Completion(
            index=self.index,
            text=reply.content if self.events else "".join(self.parts),
            token_ids=self.token_ids,
            finish_reason=self.finish_reason or "stop",
            logprobs=self.logprobs if wants_logprobs else None,
            stop_string=self.stop_string,
            reasoning=reply.reasoning,
            tool_calls=reply.tool_calls,
        )


class LLM:
    """A model loaded in this process.

    `model` is a bundled name (`tiny-oss`) or a checkpoint folder. `device="auto"` takes the first CUDA GPU, else the
    CPU. `kv_blocks=0` sizes the KV pool from free memory. `load_format="dummy"` makes weights up. With `skip_tokenizer`
    prompts and answers are token ids only, and the folder needs no tokenizer. With parallel sizes above 1 the model is
    split over processes of their own.
    Raises: ConfigError, CheckpointError; each names what is wrong, where, and the fix.
    """

    def __init__(
        self,
        model: str,
        *,
        max_model_len: int = 0,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 2048,
        block_size: int = 16,
        kv_blocks: int = 0,
        enable_prefix_caching: bool = True,
        async_scheduling: bool = False,
        seed: int | None = None,
        cpu_threads: int = 0,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        enable_expert_parallel: bool = False,
        device: str = "auto",
        load_format: Literal["auto", "safetensors", "dummy"] = "auto",
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        skip_tokenizer: bool = False,
    ) -> None:
        self.config = EngineConfig(
            model=model,
            device=default_device() if device == "auto" else device,
            load_format=load_format,
            enforce_eager=enforce_eager,
            max_model_len=max_model_len,
            seed=seed,
            cpu_threads=cpu_threads,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            enable_expert_parallel=enable_expert_parallel,
            scheduler=SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max(max_num_batched_tokens, max_num_seqs),
                enable_prefix_caching=enable_prefix_caching,
                async_scheduling=async_scheduling,
                # The caller hands over the whole list at once: nothing is gained by refusing a part of it.
                max_queue=1 << 30,
            ),
            cache=CacheConfig(
                block_size=block_size, num_blocks=kv_blocks, gpu_memory_utilization=gpu_memory_utilization
            ),
        )
        folder, model_config = open_model(self.config)
        self._tokenizer = None if skip_tokenizer else Tokenizer.from_folder(folder)
        self._chat = None if skip_tokenizer else chat_format_for(model_config.model_type, self.tokenizer)
        self._core = EngineCore.start(self.config)
        self._failure: str | None = None
        self._stop_ids = tuple(
            dict.fromkeys((*model_config.eos_token_ids, *(self._chat.stop_token_ids if self._chat else ())))
        )
        self._counter = itertools.count()

    @property
    def max_model_len(self) -> int:
        return self._core.max_model_len

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises: GenerationError when it was skipped."""
        if self._tokenizer is None:
            raise GenerationError("text needs a tokenizer: give token ids, or load without skip_tokenizer")
        return self._tokenizer

    @property
    def _chat_format(self) -> ChatFormat:
        if self._chat is None:
            raise GenerationError("chat needs a tokenizer: load without skip_tokenizer")
        return self._chat

    def close(self) -> None:
        self._core.stop()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[GenerationResult]:
        """Complete prompts (text or token ids), in their order; all of them run in one continuous batch.

        Raises: GenerationError when a prompt is empty or does not fit; nothing has run then.
        """
        items = _as_list(prompts)
        texts = [item if isinstance(item, str) else None for item in items]
        ids = [self.tokenizer.encode(item) if isinstance(item, str) else list(item) for item in items]
        params = _as_params(sampling_params, len(items))

        def processor(one: SamplingParams) -> OutputProcessor | _TokensOnly:
            if self._tokenizer is None:
                return _TokensOnly()
            return OutputProcessor(
                self.tokenizer,
                stop=one.stop,
                include_stop=one.include_stop_str_in_output,
                skip_special_tokens=one.skip_special_tokens,
            )

        return self._run(texts, ids, params, processor, use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        reasoning_effort: str | None = None,
        use_tqdm: bool = True,
    ) -> list[GenerationResult]:
        """Answer one conversation, or a list of them, in OpenAI's message form.

        Raises: ChatRequestError with the path of a malformed field; GenerationError as `generate`.
        """
        conversations: Sequence[Any] = [messages] if messages and isinstance(messages[0], Mapping) else messages
        definitions = tools_from_openai(list(tools))
        options = RenderOptions(
            current_date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(), reasoning_effort=reasoning_effort
        )
        ids = [
            self._chat_format.render(messages_from_openai(list(conversation)), definitions, options)
            for conversation in conversations
        ]
        params = _as_params(sampling_params, len(ids))

        def processor(one: SamplingParams) -> ChatOutputProcessor:
            return ChatOutputProcessor(
                self._chat_format, definitions, stop=one.stop, include_stop=one.include_stop_str_in_output
            )

        return self._run([None] * len(ids), ids, params, processor, use_tqdm=use_tqdm)

    def _run(
        self,
        texts: Sequence[str | None],
        prompt_ids: Sequence[list[int]],
        params: Sequence[SamplingParams],
        make_processor: Any,
        *,
        use_tqdm: bool,
    ) -> list[GenerationResult]:
        if self._failure is not None:
            raise GenerationError(f"the engine failed earlier ({self._failure}); load the model anew")
        for number, ids in enumerate(prompt_ids):
            self._check_prompt(number, ids, params[number])
        sequences: dict[str, _Sequence] = {}
        for number, (ids, one) in enumerate(zip(prompt_ids, params, strict=True)):
            for request in self._requests(ids, one):
                sequences[request.request_id] = _Sequence(number, len(sequences), make_processor(one))
                only = self._core.add(request)
                if only is None:
                    continue
                if only.finish_reason is FinishReason.ERROR:
                    for request_id in sequences:
                        self._core.abort(request_id)
                    raise GenerationError(f"prompt {number}: {only.error}")
                # A request for no tokens is over before it began.
                sequences[request.request_id].push(only)
        self._drive(sequences, use_tqdm=use_tqdm)
        results = []
        for number, ids in enumerate(prompt_ids):
            own = [sequence for sequence in sequences.values() if sequence.prompt_index == number]
            for index, sequence in enumerate(own):
                sequence.index = index
            wants = params[number].logprobs is not None
            outputs = [sequence.completion(wants_logprobs=wants) for sequence in own]
            results.append(GenerationResult(texts[number], ids, outputs, own[0].num_cached_tokens))
        return results

    def _drive(self, sequences: Mapping[str, _Sequence], *, use_tqdm: bool) -> None:
        """Step until every sequence has ended; an exception on the way aborts what is left.

        A step that fails leaves the worker's state unknown: from then on every call is refused.
        """
        open_ids = dict.fromkeys(key for key, sequence in sequences.items() if sequence.finish_reason is None)
        num_tokens = 0
        try:
            with tqdm(total=len(open_ids), desc="Generating", unit="req", disable=not use_tqdm) as bar:
                while open_ids:
                    for output in self._step():
                        if output.request_id not in open_ids:
                            continue
                        if output.finish_reason is FinishReason.ERROR:
                            raise GenerationError(f"prompt {sequences[output.request_id].prompt_index}: {output.error}")
                        num_tokens += len(output.new_token_ids)
                        must_abort = sequences[output.request_id].push(output)
                        if must_abort:
                            self._core.abort(output.request_id)
                        if must_abort or output.finish_reason is not None:
                            del open_ids[output.request_id]
                            bar.update(1)
                    bar.set_postfix_str(f"{num_tokens} tokens", refresh=False)
        finally:
            for request_id in open_ids:
                self._core.abort(request_id)
            while self._core.has_work and self._failure is None:
                self._step()

    def _step(self) -> list[RequestOutput]:
        try:
            return self._core.step()
        except Exception as error:
            self._failure = f"{type(error).__name__}: {error}"
            raise

    def _requests(self, prompt_ids: list[int], params: SamplingParams) -> list[EngineRequest]:
        room = self.max_model_len - len(prompt_ids)
        base = params.seed if params.seed is not None else self._draw_seed()
        stop_ids = params.stop_token_ids if params.ignore_eos else (*self._stop_ids, *params.stop_token_ids)
        return [
            EngineRequest(
                request_id=f"offline-{next(self._counter)}",
                prompt_token_ids=prompt_ids,
                params=replace(params, n=1),
                max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
                seed=sequence_seed(base, index),
                stop_token_ids=tuple(dict.fromkeys(stop_ids)),
            )
            for index in range(params.n)
        ]

    def _draw_seed(self) -> int:
        if self.config.seed is not None:
            return self.config.seed
        return secrets.randbits(62)

    def _check_prompt(self, number: int, ids: Sequence[int], params: SamplingParams) -> None:
        vocab_size = self._core.model.vocab_size
        if not ids:
            raise GenerationError(f"prompt {number} is empty")
        if any(not 0 <= token_id < vocab_size for token_id in ids):
            raise GenerationError(f"prompt {number} holds a token id outside 0 to {vocab_size - 1}")
        if any(token_id >= vocab_size for token_id in params.logit_bias):
            raise GenerationError(f"logit_bias names a token id above {vocab_size - 1}")
        if len(ids) >= self.max_model_len:
            raise GenerationError(
                f"prompt {number} has {len(ids)} tokens; the context holds {self.max_model_len}, answer included"
            )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = list(prompts)
    return [items] if items and isinstance(items[0], int) else items


def _as_params(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise GenerationError(f"{count} prompts but {len(params)} sampling params")
    return list(params)
