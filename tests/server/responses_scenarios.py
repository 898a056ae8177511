"""What an unmodified `openai` client must be able to do with responses, against any server of ours.

As `scenarios.py`: `python tests/server/responses_scenarios.py http://127.0.0.1:8000 tiny-oss [API_KEY]`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import httpx
import openai
from messages_stream import events_of
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from responses_stream import response_of
from scenarios import Target, expect, run_all

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}
ADD: Any = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}, "strict": False}
# Codex offers tools of its maker's kinds beside functions.
MIXED: Any = [WEATHER, {"type": "web_search"}, {"type": "namespace", "name": "n", "description": "d", "tools": [ADD]}]
HELLO = "Hello! How are you?"
PARIS = "What is the weather in Paris?"
ENDLESS: Any = {"ignore_eos": True}
# The client builds its values without checking them; this checks.
EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)


def response_answers(target: Target) -> None:
    with target.client() as client:
        answer = client.responses.create(model=target.model, input=HELLO, max_output_tokens=64)
        _check(answer, target)
        if target.scripted:
            assert answer.output_text == "You said: Hello! How are you?. Bye!"
            assert [item.type for item in answer.output] == ["reasoning", "message"]
            assert answer.usage is not None
            assert answer.usage.output_tokens_details.reasoning_tokens


def response_streams_what_it_says(target: Target) -> None:
    body = {"model": target.model, "max_output_tokens": 48, "input": HELLO, "temperature": 0}
    with _raw(target) as http:
        whole = http.post("/v1/responses", json=body).json()
        stream = http.post("/v1/responses", json=body | {"stream": True})
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert "[DONE]" not in stream.text
    streamed = response_of(stream.text)
    for event in events_of(stream.text):
        EVENT.validate_python(event)
    for answer in (whole, streamed):
        Response.model_validate(answer)
        for key in ("id", "created_at", "completed_at"):
            del answer[key]
        del answer["usage"]["input_tokens_details"]
        for item in answer["output"]:
            del item["id"]
    assert whole == streamed


def stream_helper_accumulates(target: Target) -> None:
    with (
        target.client() as client,
        client.responses.stream(model=target.model, input=HELLO, max_output_tokens=64) as stream,
    ):
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response() if target.scripted else None
    if final is not None:
        assert text == final.output_text
        _check(final, target)


def tools_round_trip(target: Target) -> None:
    with target.client() as client:
        first = client.responses.create(model=target.model, input=PARIS, tools=MIXED, temperature=0)
        _check(first, target)
        calls = [item for item in first.output if item.type == "function_call"]
        assert [(call.name, call.arguments) for call in calls] == [("get_weather", '{"city":"Paris"}')]
        assert calls[0].call_id.startswith("call_")
        assert [tool.type for tool in first.tools] == ["function"], "those that the model was shown"
        history: Any = [{"role": "user", "content": PARIS}, *[item.model_dump() for item in first.output]]
        history.append({"type": "function_call_output", "call_id": calls[0].call_id, "output": "18 C"})
        second = client.responses.create(
            model=target.model, input=history, tools=[WEATHER], instructions="Be brief.", max_output_tokens=64
        )
        _check(second, target)
        assert second.instructions == "Be brief."
        if target.scripted:
            assert second.output_text == "The tool says: 18 C"
            history[-1]["output"] = [{"type": "input_text", "text": "19 C"}]
            again = client.responses.create(model=target.model, input=history, tools=[WEATHER])
            assert again.output_text == "The tool says: 19 C"


def tools_stream(target: Target) -> None:
    with (
        target.client() as client,
        client.responses.stream(model=target.model, input=PARIS, tools=MIXED, temperature=0) as stream,
    ):
        done = [event for event in stream if event.type == "response.function_call_arguments.done"]
        final = stream.get_final_response()
    assert [event.arguments for event in done] == ['{"city":"Paris"}']
    assert final.output[-1].type == "function_call"
    with _raw(target) as http:
        body = {"model": target.model, "input": PARIS, "tools": MIXED, "temperature": 0, "stream": True}
        for event in events_of(http.post("/v1/responses", json=body).text):
            EVENT.validate_python(event)


def tool_choices(target: Target) -> None:
    with target.client() as client:

        def ask(choice: Any, tools: Any) -> Response:
            return client.responses.create(
                model=target.model, input=PARIS, tools=tools, tool_choice=choice, max_output_tokens=60, temperature=0
            )

        none = ask("none", [WEATHER])
        assert all(item.type != "function_call" for item in none.output)
        assert none.tool_choice == "none"
        named = {"type": "function", "name": "get_weather"}
        allowed = {"type": "allowed_tools", "mode": "required", "tools": [named]}
        for choice, tools in (("required", [WEATHER]), (named, [WEATHER, ADD]), (allowed, [WEATHER, ADD])):
            answer = ask(choice, tools)
            Response.model_validate(answer.model_dump())
            if target.scripted:
                assert [item.type for item in answer.output] == ["function_call"]
        wrong: list[tuple[Any, Any, str]] = [
            ("required", [WEATHER, ADD], "tool_choice"),
            ({"type": "function", "name": "no"}, [WEATHER], "tool_choice.name"),
            ({"type": "web_search"}, [WEATHER], "tool_choice"),
        ]
        for choice, tools, param in wrong:
            error = expect(openai.BadRequestError, lambda: ask(choice, tools))  # noqa: B023
            assert error.param == param


def limits_are_incomplete(target: Target) -> None:
    with target.client() as client:
        answer = client.responses.create(model=target.model, input=HELLO, max_output_tokens=3, extra_body=ENDLESS)
        assert answer.status == "incomplete"
        assert answer.incomplete_details is not None
        assert answer.incomplete_details.reason == "max_output_tokens"
        assert answer.usage is not None
        assert answer.usage.output_tokens == 3
        events = list(
            client.responses.create(
                model=target.model, input=HELLO, max_output_tokens=8, stream=True, extra_body=ENDLESS
            )
        )
        assert events[-1].type == "response.incomplete"
        error = expect(
            openai.BadRequestError,
            lambda: client.responses.create(model=target.model, input=HELLO, max_output_tokens=10**7),
        )
        assert (error.code, error.param) == ("context_length_exceeded", "input")


def logprobs_come_when_they_are_included(target: Target) -> None:
    with target.client() as client:
        common: Any = {"model": target.model, "input": HELLO, "max_output_tokens": 64, "temperature": 0}
        answer = client.responses.create(**common, include=["message.output_text.logprobs"], top_logprobs=2)
        _check(answer, target)
        for item in answer.output:
            if item.type == "message":
                entries = item.content[0].logprobs  # type: ignore[union-attr]
                assert entries
                assert "".join(entry.token for entry in entries) == answer.output_text
                assert all(len(entry.top_logprobs) == 2 for entry in entries)
        plain = client.responses.create(**common, include=["reasoning.encrypted_content"])
        assert all(item.content[0].logprobs == [] for item in plain.output if item.type == "message")  # type: ignore[union-attr]


def stop_strings(target: Target) -> None:
    with target.client() as client:

        def ask(**extra: Any) -> Response:
            return client.responses.create(
                model=target.model, input=HELLO, max_output_tokens=64, temperature=0, extra_body=extra
            )

        said = ask().output_text
        stop = said[len(said) // 2 :][:2]
        assert stop
        assert ask(stop=["never said", stop]).output_text == said[: said.index(stop)]


def history_in_all_its_forms(target: Target) -> None:
    items: Any = [
        {"role": "developer", "content": [{"type": "input_text", "text": t} for t in ("Be ", "kind.")]},
        {"type": "message", "role": "user", "content": "One."},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "from elsewhere"},
        {"type": "reasoning", "id": "rs_2", "summary": [{"type": "summary_text", "text": "short"}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "phase": "commentary",
         "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}]},
        {"type": "function_call", "call_id": "a", "name": "add", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "add", "arguments": '{"x":1}'},
        {"type": "function_call_output", "call_id": "b", "output": "2"},
        {"type": "function_call_output", "call_id": "a", "output": "1"},
        {"role": "system", "content": "Be polite."},
        {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    with target.client() as client:
        answer = client.responses.create(
            model=target.model,
            input=items,
            tools=[ADD],
            max_output_tokens=8,
            store=True,
            metadata={"a": "b"},
            reasoning={"effort": "low", "summary": "auto"},
            text={"format": {"type": "text"}, "verbosity": "low"},
            truncation="auto",
            extra_body={"client_metadata": {"x": "y"}, "no_such_field": 1},
        )
        _check(answer, target)
        assert answer.metadata == {"a": "b"}
        assert answer.store is False, "nothing is stored, and the response says so"  # type: ignore[attr-defined]


def counts_are_those_of_the_answer(target: Target) -> None:
    with target.client() as client:
        common: Any = {"model": target.model, "input": PARIS, "instructions": "Be brief.", "tools": [WEATHER]}
        counted = client.responses.input_tokens.count(**common)
        usage = client.responses.create(max_output_tokens=2, **common).usage
        assert usage is not None
        assert counted.input_tokens == usage.input_tokens
        assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def errors_name_the_field(target: Target) -> None:
    with target.client() as client:

        def ask(**body: Any) -> object:
            return client.responses.create(**({"model": target.model, "input": "x"} | body))

        schema = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
        cases: list[tuple[dict[str, Any], str]] = [
            ({"previous_response_id": "resp_1"}, "previous_response_id"),
            ({"conversation": "conv_1"}, "conversation"),
            ({"background": True}, "background"),
            ({"input": []}, "input"),
            ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
            ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
            ({"input": [{"type": "function_call_output", "call_id": "x", "output": ""}]}, "input[0].call_id"),
            ({"text": {"format": schema}}, "text.format"),
            ({"reasoning": {"effort": "heroic"}}, "reasoning.effort"),
            ({"max_output_tokens": 0}, "max_output_tokens"),
            ({"temperature": 3}, "temperature"),
            ({"stream": True, "top_logprobs": 21}, "top_logprobs"),
        ]
        for body, param in cases:
            error = expect(openai.BadRequestError, lambda: ask(**body))  # noqa: B023
            assert error.param == param
        missing = expect(openai.NotFoundError, lambda: ask(model="no-such"))
        assert missing.code == "model_not_found"


def async_client_in_parallel(target: Target) -> None:
    async def work() -> list[str]:
        async with target.async_client() as client:

            async def one(number: int) -> str:
                stream = await client.responses.create(model=target.model, input=f"Say {number}", stream=True)
                return "".join([e.delta async for e in stream if e.type == "response.output_text.delta"])

            return await asyncio.gather(*(one(number) for number in range(8)))

    answers = asyncio.run(work())
    assert len(answers) == 8
    if target.scripted:
        assert answers == [f"You said: Say {number}. Bye!" for number in range(8)]


def early_close_leaves_a_working_server(target: Target) -> None:
    with target.client() as client:
        for _ in range(3):
            stream = client.responses.create(model=target.model, input=HELLO, stream=True, extra_body=ENDLESS)
            next(iter(stream))
            stream.close()
        _check(client.responses.create(model=target.model, input=HELLO, max_output_tokens=4), target)


SCENARIOS: list[Callable[[Target], None]] = [
    response_answers,
    response_streams_what_it_says,
    stream_helper_accumulates,
    tools_round_trip,
    tools_stream,
    tool_choices,
    limits_are_incomplete,
    logprobs_come_when_they_are_included,
    stop_strings,
    history_in_all_its_forms,
    counts_are_those_of_the_answer,
    errors_name_the_field,
    async_client_in_parallel,
    early_close_leaves_a_working_server,
]


def _raw(target: Target) -> httpx.Client:
    headers = {"authorization": f"Bearer {target.api_key}"}
    return httpx.Client(base_url=target.base_url, headers=headers, timeout=60, trust_env=False)


def _check(answer: Response, target: Target) -> None:
    Response.model_validate(answer.model_dump())
    assert (answer.object, answer.model) == ("response", target.model)
    assert answer.id.startswith("resp_")
    assert answer.status in ("completed", "incomplete")
    assert (answer.incomplete_details is not None) == (answer.status == "incomplete")
    assert answer.usage is not None
    assert answer.usage.output_tokens >= 1
    assert len({item.id for item in answer.output}) == len(answer.output)


if __name__ == "__main__":
    sys.exit(run_all(SCENARIOS))
