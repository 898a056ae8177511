"""The unmodified `anthropic` and `openai` clients, messages and responses, against the real tiny-oss server."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from e2e_support import Running
from messages_scenarios import SCENARIOS as MESSAGES
from responses_scenarios import SCENARIOS as RESPONSES
from scenarios import Target
from test_disconnects import gauges

BODIES: dict[str, dict[str, Any]] = {
    "/v1/messages": {"model": "tiny-oss", "max_tokens": 1500, "messages": [{"role": "user", "content": "Go on."}]},
    "/v1/responses": {"model": "tiny-oss", "max_output_tokens": 1500, "input": "Go on."},
}


@pytest.mark.parametrize("scenario", [*MESSAGES, *RESPONSES], ids=lambda scenario: scenario.__name__)
def test_client(scenario: Callable[[Target], None], running: Running) -> None:
    scenario(Target(running.url, "tiny-oss"))


@pytest.mark.parametrize("path", BODIES)
def test_clients_that_leave_free_their_blocks(path: str, running: Running) -> None:
    with httpx.Client(base_url=running.url, trust_env=False) as client:
        for number in range(24):
            body = BODIES[path] | {"stream": number % 3 > 0, "ignore_eos": True}
            with (
                contextlib.suppress(httpx.ReadTimeout),
                client.stream("POST", path, json=body, timeout=0.02 * (number % 4 + 1)) as answer,
            ):
                next(answer.iter_raw())
    deadline = time.monotonic() + 10
    while any(found := gauges(running.url).values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(found), gauges(running.url)


def test_a_forced_call_is_a_call_in_both_dialects(running: Running) -> None:
    """The header is given, the model writes the arguments; whatever they are, they arrive as the dialect promises."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    question = "What is the weather in Paris?"
    with httpx.Client(base_url=running.url, trust_env=False, timeout=60) as client:
        message = client.post(
            "/v1/messages",
            json={
                **BODIES["/v1/messages"],
                "messages": [{"role": "user", "content": question}],
                "tools": [{"name": "get_weather", "input_schema": schema}],
                "tool_choice": {"type": "any"},
                "temperature": 0,
            },
        ).json()
        response = client.post(
            "/v1/responses",
            json={
                **BODIES["/v1/responses"],
                "input": question,
                "tools": [{"type": "function", "name": "get_weather", "parameters": schema}],
                "tool_choice": "required",
                "temperature": 0,
            },
        ).json()
    assert message["stop_reason"] == "tool_use"
    assert [block["input"] for block in message["content"]] == [{"city": "Paris"}]
    assert [json.loads(item["arguments"]) for item in response["output"]] == [{"city": "Paris"}]
