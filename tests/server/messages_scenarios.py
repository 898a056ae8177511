"""What an unmodified `anthropic` client must be able to do, against any server of ours.

As `scenarios.py`: `python tests/server/messages_scenarios.py http://127.0.0.1:8000 tiny-oss [API_KEY]` runs them
against any server; what depends on how clever the model is, is asked only of a `scripted` target.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import anthropic
import httpx
from anthropic.types import Message, RawMessageStreamEvent
from messages_stream import events_of, message_of
from pydantic import TypeAdapter
from scenarios import Target, expect, run_all

STOP_REASONS = {"end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"}
WEATHER: Any = {
    "name": "get_weather",
    "description": "Get the weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ADD: Any = {"name": "add", "input_schema": {"type": "object", "properties": {}}}
# The client builds its values without checking them; this checks.
EVENT: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)
HELLO: Any = [{"role": "user", "content": "Hello! How are you?"}]
PARIS: Any = [{"role": "user", "content": "What is the weather in Paris?"}]


def client_of(target: Target) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=target.base_url, api_key=target.api_key, timeout=60, max_retries=0)


def message_answers(target: Target) -> None:
    with client_of(target) as client:
        answer = client.messages.create(model=target.model, max_tokens=64, messages=HELLO)
        _check(answer, target)
        assert answer._request_id
        if target.scripted:
            assert _text(answer) == "You said: Hello! How are you?. Bye!"
            assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
            assert answer.content[0].type == "text", "who asks for no thinking gets none"


def message_streams_what_it_says(target: Target) -> None:
    body = {"model": target.model, "max_tokens": 48, "messages": HELLO, "temperature": 0, "thinking": ADAPTIVE}
    with _raw(target) as http:
        whole = http.post("/v1/messages", json=body).json()
        stream = http.post("/v1/messages", json=body | {"stream": True})
        assert stream.headers["content-type"].startswith("text/event-stream")
        streamed = message_of(stream.text)
        for event in events_of(stream.text):
            assert event["type"] == "ping" or EVENT.validate_python(event)
    for answer in (whole, streamed):
        Message.model_validate(answer)
        del answer["id"], answer["usage"]["cache_read_input_tokens"], answer["usage"]["input_tokens"]
        for block in answer["content"]:
            block.pop("signature", None)
    assert whole == streamed


def stream_helper_accumulates(target: Target) -> None:
    with (
        client_of(target) as client,
        client.messages.stream(model=target.model, max_tokens=32, messages=HELLO, thinking=ADAPTIVE) as stream,
    ):
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == _text(final)
    _check(final, target)


def tools_round_trip(target: Target) -> None:
    with client_of(target) as client:
        first = client.messages.create(
            model=target.model,
            max_tokens=100,
            messages=PARIS,
            tools=[WEATHER, ADD],
            extra_body=GREEDY,
            thinking=ADAPTIVE,
        )
        _check(first, target)
        calls = [block for block in first.content if block.type == "tool_use"]
        assert first.stop_reason == "tool_use"
        assert [(call.name, call.input) for call in calls] == [("get_weather", {"city": "Paris"})]
        assert first.content[-1].type == "tool_use"
        result: Any = {"type": "tool_result", "tool_use_id": calls[0].id, "content": [{"type": "text", "text": "18 C"}]}
        # The client sends back what it got, thinking and its signature included.
        history: Any = [*PARIS, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        second = client.messages.create(model=target.model, max_tokens=100, messages=history, tools=[WEATHER, ADD])
        _check(second, target)
        if target.scripted:
            assert _text(second) == "The tool says: 18 C"
            result |= {"is_error": True, "content": "no network"}
            failed = client.messages.create(model=target.model, max_tokens=100, messages=history, tools=[WEATHER])
            assert _text(failed) == "The tool says: Error: no network"


def tools_stream(target: Target) -> None:
    with (
        client_of(target) as client,
        client.messages.stream(
            model=target.model, max_tokens=100, messages=PARIS, tools=[WEATHER], extra_body=GREEDY
        ) as stream,
    ):
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert final.stop_reason == "tool_use"
    call = final.content[-1]
    assert call.type == "tool_use"
    assert call.input == {"city": "Paris"}
    assert call.id.startswith("toolu_")
    assert len(pieces) == 1
    with _raw(target) as http:
        body = {
            "model": target.model,
            "max_tokens": 100,
            "messages": PARIS,
            "tools": [WEATHER],
            "stream": True,
        } | GREEDY
        for event in events_of(http.post("/v1/messages", json=body).text):
            assert event["type"] == "ping" or EVENT.validate_python(event)


def tool_choices(target: Target) -> None:
    with client_of(target) as client:

        def ask(choice: Any, tools: Any) -> Message:
            return client.messages.create(
                model=target.model, max_tokens=60, messages=PARIS, tools=tools, tool_choice=choice, extra_body=GREEDY
            )

        none = ask({"type": "none"}, [WEATHER])
        assert none.stop_reason != "tool_use"
        assert all(block.type != "tool_use" for block in none.content)
        named = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
        for choice in ({"type": "any"}, named):
            answer = ask(choice, [WEATHER])
            if target.scripted or answer.stop_reason == "tool_use":
                assert [block.type for block in answer.content] == ["tool_use"]
        for choice, tools in (({"type": "any"}, [WEATHER, ADD]), ({"type": "tool", "name": "no"}, [WEATHER])):
            assert "tool_choice" in _message(expect(anthropic.BadRequestError, lambda: ask(choice, tools)))  # noqa: B023


def stop_sequences(target: Target) -> None:
    with client_of(target) as client:

        def ask(*stops: str) -> Message:
            return client.messages.create(
                model=target.model, max_tokens=64, messages=HELLO, stop_sequences=stops, extra_body=GREEDY
            )

        said = _text(ask())
        stop = said[len(said) // 2 :][:2]
        answer = ask("never said", stop)
        assert _text(answer) == said[: said.index(stop)]
        assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
        with client.messages.stream(
            model=target.model, max_tokens=64, messages=HELLO, stop_sequences=[stop], extra_body=GREEDY
        ) as stream:
            assert "".join(stream.text_stream) == said[: said.index(stop)]
            assert stream.get_final_message().stop_sequence == stop


def limits_have_their_own_reasons(target: Target) -> None:
    with client_of(target) as client:
        # Both would go on.
        more: Any = {"extra_body": {"ignore_eos": True}}
        answer = client.messages.create(model=target.model, max_tokens=3, messages=HELLO, **more)
        assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", 3)
        card = client.models.retrieve(target.model)
        assert card.max_input_tokens
        if card.max_input_tokens > 4096:
            return
        used = client.messages.count_tokens(model=target.model, messages=HELLO).input_tokens
        filler = "to be or not to be " * ((card.max_input_tokens - used) // 6)
        full: Any = [{"role": "user", "content": filler}]
        error = expect(
            anthropic.BadRequestError,
            lambda: client.messages.create(
                model=target.model, max_tokens=5, messages=[{"role": "user", "content": filler * 3}]
            ),
        )
        assert _message(error).startswith("prompt is too long: "), _message(error)
        if not target.scripted:
            cut = client.messages.create(model=target.model, max_tokens=100_000, messages=full, **more)
            assert cut.stop_reason == "model_context_window_exceeded"
            count = cut.usage.input_tokens + (cut.usage.cache_read_input_tokens or 0) + cut.usage.output_tokens
            assert count == card.max_input_tokens


def thinking_is_shown_on_request(target: Target) -> None:
    with client_of(target) as client:

        def blocks(thinking: Any) -> list[Any]:
            return client.messages.create(
                model=target.model, max_tokens=2000, messages=HELLO, thinking=thinking, extra_body=GREEDY
            ).content

        for kind in (ADAPTIVE, {"type": "enabled", "budget_tokens": 1024}, {"type": "between_tools"}):
            for block in blocks(kind):
                assert block.type != "thinking" or (block.thinking and block.signature)
        assert all(block.type != "thinking" for block in blocks({"type": "disabled"}))
        omitted = [block for block in blocks(ADAPTIVE | {"display": "omitted"}) if block.type == "thinking"]
        assert all(block.thinking == "" and block.signature for block in omitted)
        if target.scripted:
            assert [block.type for block in blocks(ADAPTIVE)] == ["thinking", "text"]
            assert len(omitted) == 1


def counts_are_those_of_the_answer(target: Target) -> None:
    common: Any = {
        "model": target.model,
        "messages": [*HELLO, {"role": "assistant", "content": "Well."}, *PARIS],
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "tools": [WEATHER],
        "thinking": ADAPTIVE,
    }
    with client_of(target) as client:
        counted = client.messages.count_tokens(**common)
        usage = client.messages.create(max_tokens=4, **common).usage
        assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
        assert usage.cache_creation_input_tokens == 0


def history_in_all_its_forms(target: Target) -> None:
    system: Any = [{"type": "text", "text": "x-anthropic-billing-header: cc_version=1.2.3"}, _block("Be brief.")]
    messages: Any = [
        {"role": "user", "content": [_block("One."), _block("Two.")]},
        {
            "role": "assistant",
            "content": [
                {"type": "redacted_thinking", "data": "xyz"},
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                _block("Let me see."),
                {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1"}, _block("And now?")]},
        {"role": "system", "content": "Be polite."},
    ]
    with client_of(target) as client:
        answer = client.messages.create(
            model=target.model, max_tokens=8, system=system, messages=messages, tools=[ADD], metadata={"user_id": "u"}
        )
        _check(answer, target)
        plain = client.messages.count_tokens(model=target.model, system="Be brief.", messages=messages, tools=[ADD])
        billed = client.messages.count_tokens(model=target.model, system=system, messages=messages, tools=[ADD])
        assert plain.input_tokens == billed.input_tokens, "the line that changes with every request is dropped"
        assert client.messages.create(
            model=target.model, max_tokens=4, messages=[*HELLO, {"role": "assistant", "content": "I am"}]
        ).content


def beta_client_is_served(target: Target) -> None:
    with client_of(target) as client:
        answer = client.beta.messages.create(
            model="claude-haiku-4-5",
            max_tokens=8,
            messages=HELLO,
            betas=["interleaved-thinking-2025-05-14", "no-such-beta"],
            context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            extra_body={"no_such_field": 1},
        )
        assert answer.model == target.model, "the answer says which model served a name of Anthropic's"
        cards = client.models.list().data
        assert (cards[0].id, cards[0].type) == (target.model, "model")
        assert cards[0].capabilities is not None
        assert cards[0].capabilities.thinking.types.adaptive.supported


def errors_have_anthropics_shape(target: Target) -> None:
    with client_of(target) as client:
        wrong: Any = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
        cases: list[tuple[Callable[[], object], type[anthropic.APIStatusError], str, str]] = [
            (
                lambda: client.messages.create(model="no-such", max_tokens=1, messages=HELLO),
                anthropic.NotFoundError,
                "not_found_error",
                "no-such",
            ),
            (
                lambda: client.messages.create(model=target.model, max_tokens=1, messages=wrong),
                anthropic.BadRequestError,
                "invalid_request_error",
                "messages[0].content[0].type",
            ),
            (
                lambda: client.messages.create(model=target.model, max_tokens=0, messages=HELLO, stream=True),
                anthropic.BadRequestError,
                "invalid_request_error",
                "max_tokens",
            ),
            (
                lambda: client.messages.count_tokens(model=target.model, messages=[]),
                anthropic.BadRequestError,
                "invalid_request_error",
                "messages",
            ),
            (
                lambda: client.models.retrieve("no-such"),
                anthropic.NotFoundError,
                "not_found_error",
                "no-such",
            ),
        ]
        for call, kind, type_, words in cases:
            error = expect(kind, call)
            assert isinstance(error.body, dict)
            assert set(error.body) == {"type", "error", "request_id"}
            assert (error.body["type"], error.body["error"]["type"]) == ("error", type_)
            assert error.body["request_id"] == error.request_id
            assert words in _message(error)
            assert set(error.body["error"]) == {"type", "message"}


def async_client_in_parallel(target: Target) -> None:
    async def work() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=target.base_url, api_key=target.api_key, timeout=60) as client:

            async def one(number: int) -> str:
                async with client.messages.stream(
                    model=target.model, max_tokens=64, messages=[{"role": "user", "content": f"Say {number}"}]
                ) as stream:
                    return "".join([text async for text in stream.text_stream])

            return await asyncio.gather(*(one(number) for number in range(8)))

    answers = asyncio.run(work())
    assert len(answers) == 8
    if target.scripted:
        assert answers == [f"You said: Say {number}. Bye!" for number in range(8)]


def early_close_leaves_a_working_server(target: Target) -> None:
    with client_of(target) as client:
        for _ in range(3):
            stream = client.messages.create(
                model=target.model, max_tokens=400, messages=HELLO, stream=True, extra_body={"ignore_eos": True}
            )
            next(iter(stream))
            stream.close()
        _check(client.messages.create(model=target.model, max_tokens=4, messages=HELLO), target)


ADAPTIVE: Any = {"type": "adaptive"}
# The API still takes it; the client has no argument for it any more.
GREEDY = {"temperature": 0}
SCENARIOS: list[Callable[[Target], None]] = [
    message_answers,
    message_streams_what_it_says,
    stream_helper_accumulates,
    tools_round_trip,
    tools_stream,
    tool_choices,
    stop_sequences,
    limits_have_their_own_reasons,
    thinking_is_shown_on_request,
    counts_are_those_of_the_answer,
    history_in_all_its_forms,
    beta_client_is_served,
    errors_have_anthropics_shape,
    async_client_in_parallel,
    early_close_leaves_a_working_server,
]


def _block(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _raw(target: Target) -> httpx.Client:
    return httpx.Client(base_url=target.base_url, headers={"x-api-key": target.api_key}, timeout=60, trust_env=False)


def _text(message: Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def _message(error: anthropic.APIStatusError) -> str:
    assert isinstance(error.body, dict)
    return str(error.body["error"]["message"])


def _check(answer: Message, target: Target) -> None:
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", target.model)
    assert answer.stop_reason in STOP_REASONS
    assert (answer.stop_reason == "tool_use") == any(block.type == "tool_use" for block in answer.content)
    assert answer.usage.output_tokens >= 1


if __name__ == "__main__":
    sys.exit(run_all(SCENARIOS))
