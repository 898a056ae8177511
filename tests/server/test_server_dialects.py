"""What the messages and responses routes promise beyond single answers: streams, ends, keys, prompts."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace
from typing import Any

import anthropic
import httpx
import openai
import pytest
from fake_engine import Script, scripted
from messages_stream import events_of, message_of
from responses_stream import response_of
from server_support import CHAT, SERVER, TOKENIZER, RunningServer, running, wait_for
from test_server_streams import TOOL, random_reply, split

from engine.async_engine import EngineUnavailable
from engine.core.request import EngineRequest
from engine.server import errors
from engine.text import AssistantReply, ToolCall

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
HELLO: dict[str, dict[str, Any]] = {
    MESSAGES: {"model": "tiny-oss", "max_tokens": 64, "messages": [{"role": "user", "content": "hi"}]},
    RESPONSES: {"model": "tiny-oss", "input": "hi"},
}
ENDLESS = scripted([[token] for token in TOKENIZER.encode("on and on it goes ") * 200], delay_seconds=0.01)
STOPS = ["STOP", "king", "日", "to be or", "zzz", "é"]


def random_options(rng: random.Random, path: str) -> dict[str, Any]:
    is_messages = path == MESSAGES
    options: dict[str, Any] = {"max_tokens" if is_messages else "max_output_tokens": rng.randint(1, 80)}
    if rng.random() < 0.4:
        options["stop_sequences" if is_messages else "stop"] = rng.sample(STOPS, 2)
    if rng.random() < 0.5:
        choice = rng.choice(["auto", "none", "required"])
        if is_messages:
            options["tools"] = [{"name": "add", "input_schema": {"type": "object"}}]
            kind = "any" if choice == "required" else choice
            options["tool_choice"] = {"type": kind, "disable_parallel_tool_use": rng.random() < 0.3}
        else:
            options["tools"] = [{"type": "function", "name": "add", "parameters": {"type": "object"}}]
            options |= {"tool_choice": choice, "parallel_tool_calls": rng.random() < 0.7}
    if is_messages:
        options["thinking"] = rng.choice([None, {"type": "adaptive"}, {"type": "adaptive", "display": "omitted"}])
    elif rng.random() < 0.4:
        options |= {"include": ["message.output_text.logprobs"], "top_logprobs": rng.randint(0, 3)}
    return options


def without_ids(answer: dict[str, Any]) -> dict[str, Any]:
    for key in ("id", "created_at", "completed_at"):
        answer.pop(key, None)
    for part in answer.get("content", answer.get("output", [])):
        for key in ("id", "call_id", "signature"):
            part.pop(key, None)
    return answer


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
def test_stream_equals_whole(path: str) -> None:
    seed = 20261121
    rng = random.Random(seed)
    reply: list[int] = []

    def write(request: EngineRequest) -> Script:
        # The same tokens, split differently every time.
        return Script([*split(list(reply), rng), [CHAT.ids.return_]])

    fold = message_of if path == MESSAGES else response_of
    with running(write) as server, server.http() as client:
        for number in range(150):
            reply[:] = random_reply(rng)
            body = HELLO[path] | random_options(rng, path)
            whole = client.post(path, json=body)
            streamed = client.post(path, json=body | {"stream": True})
            where = f"seed {seed}, case {number}: {body} {reply}"
            assert whole.status_code == streamed.status_code == 200, f"{where} {whole.text}"
            answer = without_ids(whole.json())
            assert without_ids(fold(streamed.text)) == answer, where
            texts = json.dumps(answer.get("content", answer.get("output")), ensure_ascii=False)
            assert not any(literal in texts for literal in TOKENIZER.special_ids)
            if "tools" not in body or body["tool_choice"] in ("none", {"type": "none"}):
                assert "tool_use" not in texts
                assert "function_call" not in texts


def test_one_conversation_is_one_prompt_in_three_dialects() -> None:
    """However a conversation is written down, the model reads the same tokens."""
    tool = TOOL["function"]
    schema = tool["parameters"]
    chat = {
        "model": "tiny-oss",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "2 + 2? <|end|>"},
            {
                "role": "assistant",
                "content": "Let me see.",
                "reasoning_content": "I add.",
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":2}'}},
                    {"id": "c2", "type": "function", "function": {"name": "add", "arguments": '{"a":3}'}},
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "4"},
            {"role": "tool", "tool_call_id": "c2", "content": "5"},
            {"role": "user", "content": "And now?"},
        ],
        "tools": [TOOL],
        "reasoning_effort": "high",
        "max_tokens": 1,
    }
    messages = {
        "model": "tiny-oss",
        "max_tokens": 1,
        "system": "Be brief.",
        "messages": [
            {"role": "user", "content": "2 + 2? <|end|>"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "I add.", "signature": "x"},
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 2}},
                    {"type": "tool_use", "id": "c2", "name": "add", "input": {"a": 3}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": "4"},
                    {"type": "tool_result", "tool_use_id": "c2", "content": [{"type": "text", "text": "5"}]},
                    {"type": "text", "text": "And now?"},
                ],
            },
        ],
        "tools": [{"name": "add", "input_schema": schema}],
        "output_config": {"effort": "high"},
    }
    responses = {
        "model": "tiny-oss",
        "max_output_tokens": 1,
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "2 + 2? <|end|>"}]},
            {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "I add."}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
            {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a":2}'},
            {"type": "function_call", "call_id": "c2", "name": "add", "arguments": '{"a":3}'},
            {"type": "function_call_output", "call_id": "c1", "output": "4"},
            {"type": "function_call_output", "call_id": "c2", "output": "5"},
            {"role": "user", "content": "And now?"},
        ],
        "tools": [{"type": "function", **tool}],
        "reasoning": {"effort": "high"},
    }
    with running() as server, server.http() as client:
        for path, body in (("/v1/chat/completions", chat), (MESSAGES, messages), (RESPONSES, responses)):
            assert client.post(path, json=body).status_code == 200
        prompts = [request.prompt_token_ids for request in server.engine.submitted]
        assert prompts[0] == prompts[1] == prompts[2]
        assert TOKENIZER.decode(prompts[0], skip_special_tokens=False).count("I add.") == 1


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
def test_a_failure_in_the_stream_has_the_dialects_form(path: str) -> None:
    chunks = [[token] for token in TOKENIZER.encode("So it begins")]
    with running(scripted(chunks, error="numerical_error: not finite")) as server:
        with server.http() as client:
            events = events_of(client.post(path, json=HELLO[path] | {"stream": True}).text)
            whole = client.post(path, json=HELLO[path])
        assert whole.status_code == 500
        assert whole.headers["x-should-retry"] == "false"
        if path == MESSAGES:
            assert events[-1]["type"] == "error"
            assert events[-1]["error"] == {
                "type": "api_error",
                "message": "The model produced a value that is not finite.",
            }
            assert whole.json()["error"]["type"] == "api_error"
            with (
                anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as sdk,
                pytest.raises(anthropic.APIStatusError),
            ):
                list(sdk.messages.create(**HELLO[path], stream=True))
        else:
            assert whole.json()["error"]["code"] == "numerical_error"
            assert events[-1]["type"] == "response.failed"
            assert [event["sequence_number"] for event in events] == list(range(len(events)))
            failed = events[-1]["response"]
            assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as sdk_openai:
                last = list(sdk_openai.responses.create(**HELLO[path], stream=True))[-1]
                assert last.type == "response.failed"
                assert last.response.error is not None


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
def test_a_failure_before_the_first_token_of_a_stream_kept_alive(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.server.stream.EventStream.__init__.__defaults__", (0.2,))
    with running(scripted([], first_delay_seconds=0.9, error="numerical_error: not finite")) as server:
        with server.http() as client:
            text = client.post(path, json=HELLO[path] | {"stream": True}).text
        types = [event["type"] for event in events_of(text.replace(": ping\n\n", ""))]
    assert "ping" in text
    if path == MESSAGES:
        assert types[-1] == "error"
    else:
        assert types == ["response.created", "response.in_progress", "response.failed"]


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
@pytest.mark.parametrize("is_streaming", [False, True])
def test_a_client_that_leaves_frees_its_blocks(path: str, is_streaming: bool) -> None:
    with running(ENDLESS) as server:
        with server.http() as client:
            body = HELLO[path] | {"max_tokens": 1000, "stream": is_streaming}
            try:
                with client.stream("POST", path, json=body, timeout=0.3) as answer:
                    next(answer.iter_raw())
            except httpx.ReadTimeout:
                assert not is_streaming
        assert wait_for(lambda: not server.engine.live)
        assert len(server.engine.aborted) == 1
        assert server.app.lifecycle.num_running == 0


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
def test_drain_lets_streams_end_and_takes_no_more(path: str) -> None:
    slow = scripted([[token] for token in TOKENIZER.encode("one two three")] + [[CHAT.ids.return_]], delay_seconds=0.1)
    with running(slow) as server, server.http() as client, server.http() as other:
        with client.stream("POST", path, json=HELLO[path] | {"stream": True}) as answer:
            chunks = answer.iter_text()
            first = next(chunks)
            server.call(server.app.begin_drain)
            refused = other.post(path, json=HELLO[path])
            rest = "".join(chunks)
        assert (message_of if path == MESSAGES else response_of)(first + rest)
        assert int(refused.headers["retry-after"]) >= 1
        if path == MESSAGES:
            assert refused.status_code == 529
            assert refused.json()["error"]["type"] == "overloaded_error"
        else:
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"


def test_silence_is_filled_in_the_dialects_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.server.stream.EventStream.__init__.__defaults__", (0.2,))
    ids = [[token] for token in TOKENIZER.encode("late")] + [[CHAT.ids.return_]]
    with running(scripted(ids, delay_seconds=0.7)) as server, server.http() as client:
        text = client.post(MESSAGES, json=HELLO[MESSAGES] | {"stream": True}).text
        assert [event["type"] for event in events_of(text)].count("ping") >= 3
        assert message_of(text)["content"] == [{"type": "text", "text": "late"}]
        text = client.post(RESPONSES, json=HELLO[RESPONSES] | {"stream": True}).text
        assert text.count(": ping\n\n") >= 2
        assert response_of(text.replace(": ping\n\n", ""))["output"][0]["content"][0]["text"] == "late"


@pytest.fixture(scope="module")
def locked() -> Any:
    with running(server=replace(SERVER, api_key_sha256=(hashlib.sha256(b"right").hexdigest(),))) as server:
        yield server


def test_the_key_may_come_in_either_header(locked: RunningServer) -> None:
    common: Any = HELLO[MESSAGES]
    for options in ({"api_key": "right"}, {"auth_token": "right"}):
        with anthropic.Anthropic(base_url=locked.url, **options) as client:
            assert client.messages.create(**common).content
            assert client.messages.count_tokens(model="tiny-oss", messages=common["messages"]).input_tokens
    with locked.http() as http:
        assert http.post(MESSAGES, json=common, headers={"x-api-key": "right"}).status_code == 200
        for path in (MESSAGES, f"{MESSAGES}/count_tokens", RESPONSES, f"{RESPONSES}/input_tokens"):
            assert http.post(path, json={}).status_code == 401
            assert http.post(path, json={}, headers={"x-api-key": "wrong"}).status_code == 401
    with anthropic.Anthropic(base_url=locked.url, api_key="wrong", max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            client.messages.create(**common)
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["error"]["type"] == "authentication_error"
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key="right") as client_openai:
        assert client_openai.responses.create(model="tiny-oss", input="hi").output_text


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (errors.invalid_value("a.b", "a.b: no."), 400, "invalid_request_error"),
        (errors.invalid_api_key(), 401, "authentication_error"),
        (errors.forbidden("x", "No."), 403, "permission_error"),
        (errors.unknown_route(), 404, "not_found_error"),
        (errors.method_not_allowed(("POST",)), 405, "invalid_request_error"),
        (errors.request_timeout("Late."), 408, "invalid_request_error"),
        (errors.request_too_large(1), 413, "request_too_large"),
        (errors.unsupported_media_type(), 415, "invalid_request_error"),
        (errors.rate_limited("Slow."), 429, "rate_limit_error"),
        (errors.internal_error(), 500, "api_error"),
        (errors.engine_dead(), 500, "api_error"),
        (errors.draining(), 529, "overloaded_error"),
        (errors.loading(0.5), 529, "overloaded_error"),
    ],
)
def test_errors_have_anthropics_types(error: errors.ApiError, status: int, kind: str) -> None:
    body = json.loads(error.anthropic_body("req_1"))
    assert (error.anthropic_status, body["error"]["type"], body["request_id"]) == (status, kind, "req_1")
    assert error.param is None or error.param in body["error"]["message"]


def test_a_full_engine_is_anthropics_overload() -> None:
    with running() as server, server.http() as client:
        server.engine.refusal = EngineUnavailable("overloaded", "full")
        answer = client.post(MESSAGES, json=HELLO[MESSAGES])
        assert (answer.status_code, answer.json()["error"]["type"]) == (529, "overloaded_error")
        assert answer.headers["x-should-retry"] == "true"
        assert answer.headers["request-id"] == answer.headers["x-request-id"] == answer.json()["request_id"]


def test_a_session_of_claude_code_and_a_cache_key_name_their_conversation() -> None:
    with running() as server, server.http() as client:
        client.post(MESSAGES, json=HELLO[MESSAGES], headers={"x-claude-code-session-id": "s1"})
        client.post(RESPONSES, json=HELLO[RESPONSES] | {"prompt_cache_key": "s1"})
        client.post(MESSAGES, json=HELLO[MESSAGES])
        named, keyed, plain = (request.conversation for request in server.engine.submitted)
        assert named == keyed != ""
        assert plain == ""


def test_arguments_that_are_no_object_are_wrapped_and_numbers_kept() -> None:
    """A call's `input` is an object whatever the model wrote, and holds its digits as they were."""
    for arguments, wanted in (("[1]", '{"value":[1]}'), ('{"n": 123456789012345678901234567890}', None)):
        reply = AssistantReply(tool_calls=(ToolCall("", "add", arguments),))
        with running(scripted([CHAT.render_completion(reply)])) as server, server.http() as client:
            body = HELLO[MESSAGES] | {"tools": [{"name": "add", "input_schema": {"type": "object"}}]}
            answer = client.post(MESSAGES, json=body)
            assert json.loads(wanted or arguments) == answer.json()["content"][0]["input"]
            assert (wanted or arguments) in answer.text
            assert json.dumps(wanted or arguments) in client.post(MESSAGES, json=body | {"stream": True}).text
