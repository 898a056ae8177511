"""A scripted engine behind the server's seam: no torch, exact tokens, delays and failures on demand.

It keeps the contract of `EngineClient`: outputs in order, an end with a reason, aborts that free what was held. The
default script is a tiny "model" that answers Harmony prompts, so that SDK scenarios have something to talk to.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from engine.async_engine import EngineState, EngineUnavailable, OutputStream
from engine.config import BUNDLED_MODELS, ModelConfig, load_model_config
from engine.core.request import EngineRequest, FinishReason, RequestOutput, SchedulerStats, TokenLogprobs
from engine.text import AssistantReply, HarmonyChat, Tokenizer, ToolCall
from engine.usage import EngineUsage, NodeTraffic, RankUsage

MODEL_FOLDER = BUNDLED_MODELS["tiny-oss"]


@dataclass
class Script:
    """What one sequence says. `chunks` are the tokens of each output; `error` ends it after them."""

    chunks: list[list[int]]
    delay_seconds: float = 0.0
    first_delay_seconds: float = 0.0
    error: str | None = None
    num_cached_tokens: int = 0


Writer = Callable[[EngineRequest], Script]


@dataclass
class FakeEngine:
    """Runs scripts as tasks of the event loop; `live` is what still holds blocks."""

    write: Writer
    model: ModelConfig = field(default_factory=lambda: load_model_config(MODEL_FOLDER))
    max_model_len: int = 2048
    state: EngineState = EngineState.READY
    load_fraction: float = 1.0
    refusal: EngineUnavailable | None = None
    submitted: list[EngineRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    live: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    num_tokens: int = 0
    num_engines: int = 1

    def submit(self, request: EngineRequest) -> OutputStream:
        if self.refusal is not None:
            raise self.refusal
        if request.request_id in self.live:
            raise ValueError("duplicate request id")
        self.submitted.append(request)
        # Several engines take turns.
        stream = OutputStream(request.request_id, self._abort, (len(self.submitted) - 1) % self.num_engines)
        task = asyncio.get_running_loop().create_task(self._run(request, self.write(request), stream))
        self.live[request.request_id] = task
        return stream

    def stats(self) -> SchedulerStats:
        return SchedulerStats(num_running=len(self.live), num_blocks=64, num_used_blocks=len(self.live))

    def stats_by_engine(self) -> list[SchedulerStats]:
        return [self.stats()] * self.num_engines

    def states_by_engine(self) -> list[EngineState]:
        """A degraded one has lost its last engine."""
        if self.state is not EngineState.DEGRADED:
            return [self.state] * self.num_engines
        return [EngineState.READY] * (self.num_engines - 1) + [EngineState.FAILED]

    def usage_by_engine(self) -> list[EngineUsage]:
        """Two ranks of each: the first computes on a GPU, the second, of which less is known, waits."""
        return [
            EngineUsage(
                [
                    RankUsage(
                        2 * engine, "node0", "cuda:0", "computing", 0.25, 1.0, 10.0 + engine, 2.0, 8 << 30, 412.5
                    ),
                    RankUsage(2 * engine + 1, "node1", "cpu:0", "stopped by a signal", 3.0, 1.0, 9.0, 3.0),
                ],
                [NodeTraffic("node0", 5.0 + engine, 1000 + engine, 3000)],
            )
            for engine in range(self.num_engines)
        ]

    def _abort(self, request_id: str) -> None:
        task = self.live.pop(request_id, None)
        if task is not None:
            task.cancel()
            self.aborted.append(request_id)

    async def _run(self, request: EngineRequest, script: Script, stream: OutputStream) -> None:
        await asyncio.sleep(script.first_delay_seconds)
        num_out = 0
        cached: int | None = script.num_cached_tokens
        for chunk in script.chunks:
            ids: list[int] = []
            reason: FinishReason | None = None
            stop_id: int | None = None
            for token_id in chunk:
                ids.append(token_id)
                num_out += 1
                self.num_tokens += 1
                if token_id in request.stop_token_ids and num_out >= request.params.min_tokens:
                    reason, stop_id = FinishReason.STOP, token_id
                elif num_out >= request.max_tokens:
                    reason = FinishReason.LENGTH
                if reason is not None:
                    break
            stream.put(
                RequestOutput(
                    request.request_id,
                    ids,
                    finish_reason=reason,
                    new_logprobs=self._logprobs(request, ids),
                    num_cached_tokens=cached,
                    stop_token_id=stop_id,
                )
            )
            cached = None
            if reason is not None:
                self.live.pop(request.request_id, None)
                return
            await asyncio.sleep(script.delay_seconds)
        self.live.pop(request.request_id, None)
        error = script.error or "internal: the script ended"
        stream.put(RequestOutput(request.request_id, [], finish_reason=FinishReason.ERROR, error=error))

    def _logprobs(self, request: EngineRequest, ids: Sequence[int]) -> list[TokenLogprobs] | None:
        num_top = request.params.logprobs
        if num_top is None:
            return None
        vocab = self.model.vocab_size
        return [
            TokenLogprobs(
                -0.25,
                [token_id, *((token_id + i) % vocab for i in range(1, num_top))][:num_top],
                [-0.25, *(float("-inf") if i % 3 == 0 else -1.0 - i for i in range(1, num_top))][:num_top],
            )
            for token_id in ids
        ]


class Brain:
    """The default script: reads the rendered prompt as text and answers in Harmony, or as plain text."""

    def __init__(self, tokenizer: Tokenizer, *, delay_seconds: float = 0.0) -> None:
        self._tokenizer = tokenizer
        self._chat = HarmonyChat(tokenizer)
        self._delay = delay_seconds

    def __call__(self, request: EngineRequest) -> Script:
        prompt = self._tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
        if prompt.endswith("json<|message|>"):
            ids = [*self._tokenizer.encode('{"city":"Paris"}'), self._chat.ids.call]
        elif prompt.endswith("<|start|>assistant"):
            ids = self._chat.render_completion(self._reply(prompt))
        else:
            text = "".join(self._babble(request.seed))
            ids = [*self._tokenizer.encode(text), self._chat.ids.return_]
        return Script([[i] for i in ids], self._delay)

    def _reply(self, prompt: str) -> AssistantReply:
        question = re.findall(r"<\|start\|>user<\|message\|>(.*?)<\|end\|>", prompt, re.DOTALL)[-1]
        result = re.search(r"<\|start\|>functions\.(\w+) to=assistant.*?<\|message\|>(.*?)<\|end\|>", prompt, re.DOTALL)
        if result:
            return AssistantReply(final=f"The tool says: {result.group(2)}")
        if "namespace functions" in prompt and "weather" in question:
            cities = re.findall(r"[A-Z][a-z]+", question.replace("What", ""))
            calls = tuple(ToolCall("", "get_weather", f'{{"city":"{city}"}}') for city in cities or ["Paris"])
            return AssistantReply(reasoning="I should look at the weather.", tool_calls=calls)
        if "silent" in question:
            return AssistantReply(final="Yes.")
        return AssistantReply(reasoning=f"They said {len(question)} characters.", final=f"You said: {question}. Bye!")

    def _babble(self, seed: int) -> Iterator[str]:
        words = ["the ", "king ", "and ", "the ", "sea, ", "café ", "naïve ", "日本 ", "end. ", "\n"]
        for step in range(40):
            seed = (seed * 6364136223846793005 + 1442695040888963407 + step) & (2**64 - 1)
            yield words[(seed >> 33) % len(words)]


def scripted(chunks: list[list[int]], **options: float | str | int | None) -> Writer:
    """Return a writer that says the same to every request."""
    return lambda request: Script([list(chunk) for chunk in chunks], **options)  # type: ignore[arg-type]
