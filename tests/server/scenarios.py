"""What an unmodified `openai` client must be able to do, against any server of ours.

Each scenario takes a `Target` and raises on failure, so the same list runs against the scripted engine in the tests
and against a real model: `python tests/server/scenarios.py http://127.0.0.1:8000 tiny-oss [API_KEY]`.
Scenarios ask about the protocol. What depends on how clever the model is, is asked only of a `scripted` target.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import openai
from openai.types.chat import ChatCompletion, ChatCompletionChunk

E = TypeVar("E", bound=Exception)

REASONS = {"stop", "length", "tool_calls", "content_filter"}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
HELLO: Any = [{"role": "user", "content": "Hello! How are you?"}]


@dataclass(frozen=True)
class Target:
    """A running server. `scripted` means that its answers are those of the test script."""

    base_url: str
    model: str
    api_key: str = "none"
    scripted: bool = False

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.base_url}/v1", api_key=self.api_key, timeout=60, **options)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.base_url}/v1", api_key=self.api_key, timeout=60)


def models_are_listed(target: Target) -> None:
    with target.client() as client:
        cards = client.models.list().data
        assert target.model in [card.id for card in cards]
        card = client.models.retrieve(target.model)
        assert card.object == "model"
        assert card.max_model_len >= 1  # type: ignore[attr-defined]
        assert card.context_length == card.max_model_len  # type: ignore[attr-defined]


def unknown_model_is_not_found(target: Target) -> None:
    with target.client() as client:
        for call in (
            lambda: client.models.retrieve("org/no-such-model"),
            lambda: client.chat.completions.create(model="no-such-model", messages=HELLO),
            lambda: client.completions.create(model="no-such-model", prompt="x"),
        ):
            error = expect(openai.NotFoundError, call)
            assert error.code == "model_not_found"


def chat_answers(target: Target) -> None:
    with target.client() as client:
        answer = client.chat.completions.create(model=target.model, messages=HELLO, max_completion_tokens=64)
        _check_chat(answer, target)
        message = answer.choices[0].message
        assert message.role == "assistant"
        if target.scripted:
            assert message.content == "You said: Hello! How are you?. Bye!"
            assert answer.choices[0].finish_reason == "stop"
            assert message.reasoning == message.reasoning_content  # type: ignore[attr-defined]
            assert answer.usage is not None
            assert answer.usage.completion_tokens_details is not None
            assert answer.usage.completion_tokens_details.reasoning_tokens


def chat_streams(target: Target) -> None:
    with target.client() as client:
        chunks = list(
            client.chat.completions.create(
                model=target.model,
                messages=HELLO,
                max_completion_tokens=64,
                stream=True,
                stream_options={"include_usage": True},
                seed=11,
                temperature=0,
            )
        )
        _check_stream_order(chunks, num_choices=1, has_usage=True)
        whole = client.chat.completions.create(
            model=target.model, messages=HELLO, max_completion_tokens=64, seed=11, temperature=0
        )
        assert _joined(chunks, 0, "content") == (whole.choices[0].message.content or "")
        assert chunks[-1].usage is not None
        assert whole.usage is not None
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def chat_stream_without_usage_has_none(target: Target) -> None:
    with target.client() as client:
        chunks = list(client.chat.completions.create(model=target.model, messages=HELLO, max_tokens=8, stream=True))
        assert all(chunk.usage is None for chunk in chunks)
        assert all(chunk.choices for chunk in chunks)


def chat_stream_helper_accumulates(target: Target) -> None:
    with (
        target.client() as client,
        client.chat.completions.stream(model=target.model, messages=HELLO, max_completion_tokens=32) as stream,
    ):
        for _ in stream:
            pass
        snapshot = stream.current_completion_snapshot
        assert snapshot.choices[0].finish_reason in REASONS
        assert snapshot.choices[0].message.role == "assistant"


def chat_length_limit(target: Target) -> None:
    with target.client() as client:
        answer = client.chat.completions.create(model=target.model, messages=HELLO, max_completion_tokens=3)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 3
        # The older name counts too, and the newer one wins.
        answer = client.chat.completions.create(
            model=target.model, messages=HELLO, max_tokens=50, max_completion_tokens=2
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2


def chat_n_choices(target: Target) -> None:
    with target.client() as client:
        answer = client.chat.completions.create(
            model=target.model, messages=HELLO, n=3, max_completion_tokens=16, temperature=1, seed=5
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        one = client.chat.completions.create(model=target.model, messages=HELLO, max_completion_tokens=1)
        assert answer.usage is not None
        assert one.usage is not None
        assert answer.usage.prompt_tokens == one.usage.prompt_tokens
        chunks = list(
            client.chat.completions.create(
                model=target.model,
                messages=HELLO,
                n=3,
                max_completion_tokens=16,
                temperature=1,
                seed=5,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        _check_stream_order(chunks, num_choices=3, has_usage=True)
        for index in range(3):
            assert _joined(chunks, index, "content") == (answer.choices[index].message.content or "")


def chat_stop_strings(target: Target) -> None:
    with target.client() as client:
        whole = client.chat.completions.create(
            model=target.model, messages=HELLO, max_completion_tokens=64, temperature=0
        )
        text = whole.choices[0].message.content or ""
        if len(text) < 6:
            return
        stop = text[3:5]
        answer = client.chat.completions.create(
            model=target.model, messages=HELLO, max_completion_tokens=64, temperature=0, stop=[stop, "\u0007never"]
        )
        assert answer.choices[0].message.content == text[: text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        chunks = list(
            client.chat.completions.create(
                model=target.model, messages=HELLO, max_completion_tokens=64, temperature=0, stop=stop, stream=True
            )
        )
        assert _joined(chunks, 0, "content") == text[: text.index(stop)]


def chat_logprobs(target: Target) -> None:
    with target.client() as client:
        answer = client.chat.completions.create(
            model=target.model, messages=HELLO, max_completion_tokens=48, logprobs=True, top_logprobs=4, temperature=0
        )
        choice = answer.choices[0]
        assert choice.logprobs is not None
        entries = choice.logprobs.content or []
        data = b"".join(bytes(entry.bytes or []) for entry in entries)
        assert data.decode("utf-8", "replace") == (choice.message.content or "")
        for entry in entries:
            assert -9999.0 <= entry.logprob <= 0.0
            assert len(entry.top_logprobs) == 4
            values = [top.logprob for top in entry.top_logprobs]
            assert values == sorted(values, reverse=True)
        chunks = list(
            client.chat.completions.create(
                model=target.model,
                messages=HELLO,
                max_completion_tokens=48,
                logprobs=True,
                top_logprobs=4,
                temperature=0,
                stream=True,
            )
        )
        streamed = [
            entry.token
            for chunk in chunks
            for part in chunk.choices
            if part.logprobs is not None
            for entry in part.logprobs.content or []
        ]
        assert streamed == [entry.token for entry in entries]


def completion_seeds_repeat(target: Target) -> None:
    with target.client() as client:

        def say(seed: int) -> str:
            answer = client.completions.create(
                model=target.model, prompt="Once", max_tokens=12, temperature=1.0, seed=seed
            )
            return answer.choices[0].text

        assert say(7) == say(7)
        assert len({say(seed) for seed in range(1, 7)}) > 1


def chat_roles_and_parts(target: Target) -> None:
    messages: Any = [
        {"role": "system", "content": "Be kind."},
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "Hello.", "reasoning_content": "They greet."},
        {"role": "user", "content": "Good day", "name": "ada"},
    ]
    with target.client() as client:
        _check_chat(
            client.chat.completions.create(
                model=target.model,
                messages=messages,
                max_completion_tokens=16,
                reasoning_effort="low",
                user="u1",
                metadata={"a": "b"},
                service_tier="auto",
                store=False,
            ),
            target,
        )


def tools_round_trip(target: Target) -> None:
    question: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    with target.client() as client:
        answer = client.chat.completions.create(
            model=target.model, messages=question, tools=[WEATHER], max_completion_tokens=128, temperature=0
        )
        calls = answer.choices[0].message.tool_calls or []
        if target.scripted:
            assert len(calls) == 1
        if not calls:
            return
        assert answer.choices[0].finish_reason == "tool_calls"
        assert answer.choices[0].message.content is None or target.scripted is False
        call = calls[0]
        assert call.type == "function"
        assert call.id.startswith("call_")
        json.loads(call.function.arguments)
        history: Any = [
            *question,
            answer.choices[0].message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "18 degrees, sunny"},
        ]
        final = client.chat.completions.create(
            model=target.model, messages=history, tools=[WEATHER], max_completion_tokens=64, temperature=0
        )
        _check_chat(final, target)
        if target.scripted:
            assert final.choices[0].message.content == "The tool says: 18 degrees, sunny"


def tools_stream(target: Target) -> None:
    question: Any = [{"role": "user", "content": "What is the weather in Paris and Oslo?"}]
    with target.client() as client:
        chunks = list(
            client.chat.completions.create(
                model=target.model,
                messages=question,
                tools=[WEATHER],
                max_completion_tokens=128,
                temperature=0,
                stream=True,
            )
        )
        _check_stream_order(chunks, num_choices=1, has_usage=False)
        names: dict[int, list[str]] = {}
        arguments: dict[int, str] = {}
        for chunk in chunks:
            for delta in chunk.choices[0].delta.tool_calls or []:
                assert delta.function is not None
                if delta.index not in names:
                    assert delta.id
                    assert delta.type == "function"
                    assert delta.function.name
                    names[delta.index] = [delta.function.name]
                else:
                    assert delta.id is None
                    assert delta.function.name is None
                arguments[delta.index] = arguments.get(delta.index, "") + (delta.function.arguments or "")
        for text in arguments.values():
            json.loads(text)
        if target.scripted:
            assert list(names) == [0, 1]
            assert arguments == {0: '{"city":"Paris"}', 1: '{"city":"Oslo"}'}
            assert chunks[-1].choices[0].finish_reason == "tool_calls"


def tools_choice(target: Target) -> None:
    question: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    other: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    with target.client() as client:

        def ask(**options: Any) -> ChatCompletion:
            answer: ChatCompletion = client.chat.completions.create(
                model=target.model, messages=question, max_completion_tokens=96, temperature=0, **options
            )
            return answer

        none = ask(tools=[WEATHER], tool_choice="none")
        assert not none.choices[0].message.tool_calls
        assert none.choices[0].finish_reason in {"stop", "length"}
        for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
            forced = ask(tools=[WEATHER], tool_choice=choice)
            calls = forced.choices[0].message.tool_calls or []
            if target.scripted:
                assert [call.function.name for call in calls if call.type == "function"] == ["get_weather"]
                assert forced.choices[0].finish_reason == "tool_calls"
        single = ask(tools=[WEATHER], parallel_tool_calls=False)
        assert len(single.choices[0].message.tool_calls or []) <= 1
        error = expect(openai.BadRequestError, lambda: ask(tools=[WEATHER, other], tool_choice="required"))
        assert error.code == "unsupported_parameter"
        assert error.param == "tool_choice"
        error = expect(
            openai.BadRequestError,
            lambda: ask(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "nope"}}),
        )
        assert error.param == "tool_choice.function.name"


def completions_answer(target: Target) -> None:
    with target.client() as client:
        answer = client.completions.create(model=target.model, prompt="Once upon a time", max_tokens=8, temperature=0)
        assert answer.object == "text_completion"
        assert answer.choices[0].finish_reason in {"stop", "length"}
        assert answer.usage is not None
        assert 1 <= answer.usage.completion_tokens <= 8
        default = client.completions.create(model=target.model, prompt="Once upon a time")
        assert default.usage is not None
        assert default.usage.completion_tokens <= 16
        echo = client.completions.create(model=target.model, prompt="Once upon", max_tokens=4, echo=True, temperature=0)
        assert echo.choices[0].text.startswith("Once upon")
        nothing = client.completions.create(model=target.model, prompt="Once upon", max_tokens=0, echo=True)
        assert nothing.choices[0].text == "Once upon"


def completions_many_prompts(target: Target) -> None:
    with target.client() as client:
        ids = httpx.post(
            f"{target.base_url}/tokenize",
            json={"prompt": "The king"},
            headers={"authorization": f"Bearer {target.api_key}"},
        ).json()["tokens"]
        answer = client.completions.create(
            model=target.model, prompt=["A", "B"], n=2, max_tokens=3, temperature=1, seed=3
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        for prompt in (ids, [ids, ids[:1]]):
            answer = client.completions.create(model=target.model, prompt=prompt, max_tokens=3, temperature=0)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens in {len(ids), len(ids) + 1}


def completions_stream(target: Target) -> None:
    with target.client() as client:
        options: Any = {"model": target.model, "prompt": "To be", "max_tokens": 24, "temperature": 0, "seed": 1}
        chunks = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **options))
        whole = client.completions.create(**options)
        assert "".join(c.text for chunk in chunks for c in chunk.choices) == whole.choices[0].text
        assert chunks[-1].choices == []
        assert chunks[-1].usage == whole.usage
        assert all(chunk.usage is None for chunk in chunks[:-1])


def completions_logprobs(target: Target) -> None:
    with target.client() as client:
        answer = client.completions.create(
            model=target.model, prompt="To be", max_tokens=12, temperature=0, logprobs=3, echo=False
        )
        found = answer.choices[0].logprobs
        assert found is not None
        assert found.tokens is not None
        assert found.text_offset is not None
        assert len(found.tokens) == len(found.token_logprobs or []) == len(found.top_logprobs or [])
        text = answer.choices[0].text
        for token, offset in zip(found.tokens, found.text_offset, strict=True):
            if not token.startswith("bytes:"):
                assert text.startswith(token, offset)


def errors_have_the_sdk_shape(target: Target) -> None:
    with target.client() as client:

        def chat(**options: Any) -> Callable[[], object]:
            return lambda: client.chat.completions.create(
                **({"model": target.model, "messages": HELLO, "max_completion_tokens": 4} | options)
            )

        cases: list[tuple[Callable[[], object], str, str | None]] = [
            (chat(temperature=3), "invalid_value", "temperature"),
            (chat(top_p=0), "invalid_value", "top_p"),
            (chat(n=17), "invalid_value", "n"),
            (chat(top_logprobs=2), "invalid_value", "top_logprobs"),
            (chat(logprobs=True, top_logprobs=21), "invalid_value", "top_logprobs"),
            (chat(stream_options={"include_usage": True}), "invalid_value", "stream_options"),
            (chat(messages=[]), "invalid_value", "messages"),
            (chat(messages=[{"role": "wizard", "content": "x"}]), "invalid_value", "messages[0].role"),
            (
                chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
                "invalid_value",
                "messages[0].content[0].type",
            ),
            (chat(response_format={"type": "json_object"}), "unsupported_parameter", "response_format"),
            (chat(logit_bias={"999999999": 1}), "invalid_value", "logit_bias"),
            (chat(max_completion_tokens=10**9), "context_length_exceeded", "messages"),
        ]
        for call, code, param in cases:
            error = expect(openai.BadRequestError, call)
            assert (error.code, error.param) == (code, param), error.message
            assert error.type == "invalid_request_error"
            assert error.request_id


def context_limit_is_exact(target: Target) -> None:
    with target.client() as client:
        limit = client.models.retrieve(target.model).max_model_len  # type: ignore[attr-defined]
        room = 4
        fits = client.completions.create(model=target.model, prompt=[5] * (limit - room), max_tokens=room)
        assert fits.usage is not None
        assert fits.usage.prompt_tokens == limit - room
        error = expect(
            openai.BadRequestError,
            lambda: client.completions.create(model=target.model, prompt=[5] * (limit - room), max_tokens=room + 1),
        )
        assert error.code == "context_length_exceeded"
        assert (
            f"This model's maximum context length is {limit} tokens, however you requested {limit + 1} tokens "
            f"({limit - room} in the messages, {room + 1} in the completion)." in error.message
        )


def async_client_in_parallel(target: Target) -> None:
    async def work() -> list[str]:
        async with target.async_client() as client:

            async def one(number: int) -> str:
                stream = await client.chat.completions.create(
                    model=target.model,
                    messages=[{"role": "user", "content": f"Say {number}"}],
                    max_completion_tokens=64,
                    stream=True,
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*(one(number) for number in range(8)))

    answers = asyncio.run(work())
    assert len(answers) == 8
    if target.scripted:
        assert answers == [f"You said: Say {number}. Bye!" for number in range(8)]


def early_close_leaves_a_working_server(target: Target) -> None:
    with target.client() as client:
        for _ in range(3):
            stream = client.completions.create(
                model=target.model, prompt="On and on", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
            )
            next(iter(stream))
            stream.close()
        _check_chat(client.chat.completions.create(model=target.model, messages=HELLO, max_tokens=4), target)


def extensions_are_taken(target: Target) -> None:
    with target.client() as client:
        answer = client.chat.completions.create(
            model=target.model,
            messages=HELLO,
            max_completion_tokens=6,
            extra_body={
                "top_k": 5,
                "min_p": 0.05,
                "repetition_penalty": 1.1,
                "min_tokens": 2,
                "ignore_eos": True,
                "return_token_ids": True,
                "cache_salt": "mine",
                "priority": 1,
                "some_unknown_field": {"a": 1},
            },
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 6
        extra = answer.choices[0].model_dump()
        assert len(extra["token_ids"]) == 6


SCENARIOS: list[Callable[[Target], None]] = [
    models_are_listed,
    unknown_model_is_not_found,
    chat_answers,
    chat_streams,
    chat_stream_without_usage_has_none,
    chat_stream_helper_accumulates,
    chat_length_limit,
    chat_n_choices,
    chat_stop_strings,
    chat_logprobs,
    completion_seeds_repeat,
    chat_roles_and_parts,
    tools_round_trip,
    tools_stream,
    tools_choice,
    completions_answer,
    completions_many_prompts,
    completions_stream,
    completions_logprobs,
    errors_have_the_sdk_shape,
    context_limit_is_exact,
    async_client_in_parallel,
    early_close_leaves_a_working_server,
    extensions_are_taken,
]


def expect(kind: type[E], call: Callable[[], object]) -> E:
    """Return the error that a call must raise."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def _check_chat(answer: ChatCompletion, target: Target) -> None:
    assert answer.object == "chat.completion"
    assert answer.model == target.model
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert all(choice.finish_reason in REASONS for choice in answer.choices)


def _joined(chunks: list[ChatCompletionChunk], index: int, field: str) -> str:
    return "".join(
        getattr(choice.delta, field, None) or ""
        for chunk in chunks
        for choice in chunk.choices
        if choice.index == index
    )


def _check_stream_order(chunks: list[ChatCompletionChunk], *, num_choices: int, has_usage: bool) -> None:
    assert len({chunk.id for chunk in chunks}) == 1
    assert len({chunk.created for chunk in chunks}) == 1
    body = chunks[:-1] if has_usage else chunks
    if has_usage:
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
    for index in range(num_choices):
        own = [choice for chunk in body for choice in chunk.choices if choice.index == index]
        assert own[0].delta.role == "assistant"
        assert own[0].delta.content == ""
        assert all(choice.delta.role is None for choice in own[1:])
        assert own[-1].finish_reason in REASONS
        assert all(choice.finish_reason is None for choice in own[:-1])
    assert all(chunk.choices for chunk in body)


def run_all(scenarios: list[Callable[[Target], None]]) -> int:
    """Run scenarios against the server that the command line names; return the exit code."""
    target = Target(sys.argv[1].rstrip("/"), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "none")
    num_failed = 0
    for scenario in scenarios:
        started = time.monotonic()
        try:
            scenario(target)
            verdict = "passed"
        except Exception:  # noqa: BLE001
            num_failed += 1
            verdict = "FAILED\n" + traceback.format_exc()
        print(f"{scenario.__name__:45} {time.monotonic() - started:6.2f} s  {verdict}")
    print(f"{len(scenarios) - num_failed} of {len(scenarios)} scenarios passed")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(run_all(SCENARIOS))
