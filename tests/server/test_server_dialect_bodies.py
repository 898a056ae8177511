"""Bodies that the messages and responses routes refuse: one clear 400 that names the field, never a 500."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from server_support import RunningServer, running
from test_server_bodies import JSON, malformed, values
from test_server_guard import CANARIES

M, R = "/v1/messages", "/v1/responses"
MC, RC = "/v1/messages/count_tokens", "/v1/responses/input_tokens"
SCHEMA = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}, "required": ["a"]}
RICH: dict[str, dict[str, Any]] = {
    M: {
        "model": "tiny-oss",
        "max_tokens": 2,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "One."},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "text", "text": "Two."},
                    {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": [1]}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "3"}]},
                    {"type": "text", "text": "And?"},
                ],
            },
            {"role": "system", "content": "Be kind."},
        ],
        "tools": [
            {"name": "add", "description": "d", "input_schema": SCHEMA},
            {"type": "bash_20250124", "name": "bash"},
        ],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 2048},
        "output_config": {"effort": "low"},
        "stop_sequences": ["x"],
        "temperature": 0.5,
        "top_k": 3,
        "metadata": {"user_id": "u"},
    },
    R: {
        "model": "tiny-oss",
        "max_output_tokens": 2,
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "One."}]},
            {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Two."}]},
            {"type": "function_call", "call_id": "t1", "name": "add", "arguments": '{"a":[1]}'},
            {"type": "function_call_output", "call_id": "t1", "output": "3"},
            {"role": "developer", "content": "Be kind."},
        ],
        "tools": [{"type": "function", "name": "add", "parameters": SCHEMA, "strict": False}, {"type": "web_search"}],
        "tool_choice": {"type": "function", "name": "add"},
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"format": {"type": "text"}},
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 1,
        "temperature": 0.5,
        "metadata": {"a": "b"},
        "truncation": "disabled",
    },
}
RICH[MC] = {key: value for key, value in RICH[M].items() if key not in ("max_tokens", "stop_sequences")}
RICH[RC] = {key: value for key, value in RICH[R].items() if key not in ("max_output_tokens", "include", "top_logprobs")}
DEEP: Any = {}
for _ in range(300):
    DEEP = {"a": DEEP}


def param_of(answer: httpx.Response) -> str:
    """Return the field that a refusal names, in either dialect's shape; Anthropic's has it in the message."""
    body = answer.json()
    assert not CANARIES.search(answer.text)
    if "type" in body:
        assert set(body) == {"type", "error", "request_id"}
        assert set(body["error"]) == {"type", "message"}
        return str(body["error"]["message"])
    assert set(body["error"]) == {"message", "type", "param", "code"}
    # Two sentences are others' word for word.
    if body["error"]["code"] not in ("model_not_found", "context_length_exceeded"):
        assert body["error"]["param"] in body["error"]["message"]
    return str(body["error"]["param"])


def edited(path: str, where: str, value: Any) -> dict[str, Any]:
    """Return the rich body with one value replaced; `where` is a path such as `messages.1.content.0.type`."""
    body = copy.deepcopy(RICH[path])
    *parents, last = [int(step) if step.isdigit() else step for step in where.split(".")]
    node: Any = body
    for step in parents:
        node = node[step]
    node[last] = value
    return body


CASES: list[tuple[str, str, Any, str]] = [
    (M, "max_tokens", 0, "max_tokens"),
    (M, "max_tokens", "2", "max_tokens"),
    (M, "max_tokens", None, "max_tokens"),
    (M, "temperature", 1.5, "temperature"),
    (M, "top_k", -7, "top_k"),
    (M, "stop_sequences", ["a"] * 17, "stop_sequences"),
    (M, "stop_sequences", [""], "stop_sequences"),
    (M, "stop_sequences", [1], "stop_sequences[0]"),
    (M, "messages", [], "messages"),
    (M, "messages", "hi", "messages"),
    (M, "messages.0", 7, "messages[0]"),
    (M, "messages.0.role", "tool", "messages[0].role"),
    (M, "messages.0.content", None, "messages[0].content"),
    (M, "messages.0.content", [3], "messages[0].content[0]"),
    (M, "messages.0.content", [{"type": "image", "source": {}}], "messages[0].content[0].type"),
    (M, "messages.0.content", [{"type": "document"}], "messages[0].content[0].type"),
    (M, "messages.0.content", [{"type": "text"}], "messages[0].content[0].text"),
    (M, "messages.1.content.0.thinking", 1, "messages[1].content[0].thinking"),
    (M, "messages.1.content.0.type", "server_tool_use", "messages[1].content[0].type"),
    (M, "messages.1.content.2.input", "{}", "messages[1].content[2].input"),
    (M, "messages.1.content.2.id", "", "messages[1].content[2].id"),
    (M, "messages.1.content.2.name", "a b<|end|>", "messages[1].content[2].name"),
    (M, "messages.2.content.0.tool_use_id", "t2", "messages[2].content[0].tool_use_id"),
    (M, "messages.2.content.0.content", 5, "messages[2].content[0].content"),
    (M, "messages.2.content.0.content.0.type", "image", "messages[2].content[0].content[0].type"),
    (M, "messages.3", {"role": "assistant", "content": ""}, "messages[3].content"),
    (M, "messages.3.content", [{"type": "tool_result"}], "messages[3].content[0].type"),
    (M, "system", 1, "system"),
    (M, "system.0.type", "image", "system[0].type"),
    (M, "tools", [{"name": "x", "input_schema": {}}] * 129, "tools"),
    (M, "tools.0.name", "", "tools[0].name"),
    (M, "tools.0.input_schema", None, "tools[0].input_schema"),
    (M, "tools.0.input_schema", "object", "tools[0].input_schema"),
    (M, "tools.0.input_schema", DEEP, "tools"),
    (M, "tools.0.description", 1, "tools[0].description"),
    (M, "tool_choice.type", "some", "tool_choice.type"),
    (M, "tool_choice", {"type": "tool"}, "tool_choice.name"),
    (M, "tool_choice", {"type": "tool", "name": "bash"}, "tool_choice.name"),
    (M, "tool_choice.disable_parallel_tool_use", 1, "tool_choice.disable_parallel_tool_use"),
    (M, "thinking.type", "sometimes", "thinking.type"),
    (M, "thinking.budget_tokens", 10, "thinking.budget_tokens"),
    (M, "thinking.budget_tokens", 2048.5, "thinking.budget_tokens"),
    (M, "thinking.display", "loud", "thinking.display"),
    (M, "output_config.effort", "heroic", "output_config.effort"),
    (M, "output_config.effort", 3, "output_config.effort"),
    (M, "output_config.format", {"type": "json_schema", "schema": {}}, "output_config.format"),
    (M, "mcp_servers", [{"url": "http://x"}], "mcp_servers"),
    (M, "guided_json", {}, "guided_json"),
    (M, "cache_salt", "", "cache_salt"),
    (MC, "messages.0.content", [{"type": "image"}], "messages[0].content[0].type"),
    (MC, "thinking.type", 1, "thinking.type"),
    (R, "max_output_tokens", 0, "max_output_tokens"),
    (R, "max_output_tokens", 10**6, "input"),
    (R, "min_tokens", 3, "min_tokens"),
    (R, "temperature", 2.5, "temperature"),
    (R, "input", [], "input"),
    (R, "input", {"role": "user"}, "input"),
    (R, "input.0", "hi", "input[0]"),
    (R, "input.0.role", "tool", "input[0].role"),
    (R, "input.0.role", ["user"], "input[0].role"),
    (R, "input.0.content", None, "input[0].content"),
    (R, "input.0.content.0", 1, "input[0].content[0]"),
    (R, "input.0.content.0.type", "input_image", "input[0].content[0].type"),
    (R, "input.0.content.0.type", ["input_text"], "input[0].content[0].type"),
    (R, "input.0.content.0.text", 5, "input[0].content[0].text"),
    (R, "input.1.content", "hm", "input[1].content"),
    (R, "input.1.content.0.type", "text2", "input[1].content[0].type"),
    (R, "input.2.type", "item_reference", "input[2].type"),
    (R, "input.2.type", {"a": 1}, "input[2].type"),
    (R, "input.2", {}, "input[2].type"),
    (R, "input.3.call_id", 4, "input[3].call_id"),
    (R, "input.3.name", None, "input[3].name"),
    (R, "input.3.arguments", [1], "input[3].arguments"),
    (R, "input.4.call_id", "other", "input[4].call_id"),
    (R, "input.4.output", None, "input[4].output"),
    (R, "input.4.output", [{"type": "input_file"}], "input[4].output[0].type"),
    (R, "tools.0.name", "a b", "tools[0].name"),
    (R, "tools.0.parameters", [], "tools[0].parameters"),
    (R, "tools.0.parameters", DEEP, "tools"),
    (R, "tool_choice", "sometimes", "tool_choice"),
    (R, "tool_choice.name", "sub", "tool_choice.name"),
    (R, "tool_choice", {"type": "web_search"}, "tool_choice"),
    (R, "tool_choice", {"type": "allowed_tools", "mode": "auto", "tools": [1]}, "tool_choice.allowed_tools"),
    (R, "reasoning.effort", "heroic", "reasoning.effort"),
    (R, "text.format", {"type": "json_object"}, "text.format"),
    (R, "text.format.type", "yaml", "text.format.type"),
    (R, "top_logprobs", 21, "top_logprobs"),
    (R, "include", "all", "include"),
    (R, "metadata", {"a": DEEP}, "metadata[...]"),
    (R, "truncation", "some", "truncation"),
    (R, "background", True, "background"),
    (R, "previous_response_id", "resp_1", "previous_response_id"),
    (R, "conversation", {"id": "c"}, "conversation"),
    (R, "prompt", {"id": "p"}, "prompt"),
    (RC, "input.4.call_id", "other", "input[4].call_id"),
    (RC, "previous_response_id", "resp_1", "previous_response_id"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "where", "value", "param"), CASES, ids=lambda value: str(value)[:40])
def test_one_clear_refusal_names_the_field(http: httpx.Client, path: str, where: str, value: Any, param: str) -> None:
    answer = http.post(path, content=json.dumps(edited(path, where, value)), headers=JSON)
    assert answer.status_code == 400, answer.text
    named = param_of(answer)
    assert named == param if path in (R, RC) else named.startswith((f"{param}:", f"{param} ")), answer.text


@pytest.mark.parametrize("path", RICH)
def test_the_rich_bodies_are_taken(http: httpx.Client, path: str) -> None:
    answer = http.post(path, json=RICH[path])
    assert answer.status_code == 200, answer.text
    warnings = answer.headers["x-hlaunch-warning"]
    if path in (M, MC):
        assert warnings == "tools of type bash_20250124 are skipped; thinking.budget_tokens is served as effort low"
    else:
        assert warnings == "tools of type web_search are skipped"


@pytest.mark.parametrize("path", RICH)
def test_strict_tools_are_taken_with_a_warning(http: httpx.Client, path: str) -> None:
    answer = http.post(path, content=json.dumps(edited(path, "tools.0.strict", True)), headers=JSON)
    assert answer.status_code == 200, answer.text
    assert "strict tools: arguments are not held to their schema" in answer.headers["x-hlaunch-warning"]


@pytest.mark.parametrize("path", RICH)
def test_malformed_bodies(http: httpx.Client, path: str) -> None:
    for body in malformed():
        answer = http.post(path, content=body, headers=JSON)
        assert answer.status_code in (200, 400, 404), body[:80]
        assert not CANARIES.search(answer.text)
        if answer.status_code != 200:
            assert ("request_id" in answer.json()) == (path in (M, MC))


def places(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths of all values below a node."""
    found = []
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        found += [(*at, key), *places(child, (*at, key))]
    return found


@pytest.fixture(scope="module")
def fuzzed() -> Any:
    with running() as server, server.http() as client:
        yield server, client


@settings(
    max_examples=800,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    path=st.sampled_from(list(RICH)),
    seed=st.integers(0, 2**32),
    edits=st.lists(st.tuples(st.sampled_from(["replace", "delete", "add", "move"]), values), min_size=1, max_size=3),
    is_streaming=st.booleans(),
)
def test_edited_bodies_never_give_5xx(
    fuzzed: tuple[RunningServer, httpx.Client], path: str, seed: int, edits: list[tuple[str, Any]], is_streaming: bool
) -> None:
    """Values anywhere in a whole body are replaced, dropped, added and moved."""
    server, client = fuzzed
    body: Any = copy.deepcopy(RICH[path]) | {"stream": is_streaming}
    rng = random.Random(seed)
    for kind, value in edits:
        everywhere = places(body)
        if not everywhere:
            break
        *parents, last = rng.choice(everywhere)
        node = body
        for step in parents:
            node = node[step]
        if kind == "replace":
            node[last] = value
        elif kind == "delete":
            del node[last]
        elif kind == "move":
            node[last] = copy.deepcopy(rng.choice([body[key] for key in body]))
        elif isinstance(node, list):
            node.insert(last, value)
        else:
            node[str(last) + "x"] = value
    answer = client.post(path, content=json.dumps(body), headers=JSON)
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert param_of(answer) not in ("", "None")
    elif is_streaming and path in (M, R):
        assert '"type":"error"' not in answer.text
        assert "response.failed" not in answer.text
    assert server.app.lifecycle.num_running == 0
