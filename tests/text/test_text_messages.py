"""OpenAI's JSON to conversations: what is read, what is tolerated, what is refused and by which path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import engine.text
from engine.text import ChatMessage, ChatRequestError, ToolCall, ToolDefinition, messages_from_openai, tools_from_openai

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def test_roles_and_contents():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    raw: list[dict[str, Any]] = [
        {"role": "system", "content": "s"},
        {"role": "developer", "content": [{"type": "text", "text": "d"}, {"type": "text", "text": "e"}]},
        {"role": "user", "content": "u", "name": "bob", "unknown": 1},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "r"},
        {"role": "tool", "tool_call_id": "c1", "content": "t"},
        {"role": "assistant", "content": "a", "reasoning": "r2", "tool_calls": None},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ]
    assert messages_from_openai(raw) == [
        ChatMessage("system", "s"),
        ChatMessage("developer", "de"),
        ChatMessage("user", "u", name="bob"),
        ChatMessage("assistant", None, "r", (ToolCall("c1", "f", '{"a":1}'),)),
        ChatMessage("tool", "t", tool_call_id="c1"),
        ChatMessage("assistant", "a", "r2"),
        ChatMessage("assistant", "no"),
    ]


def test_older_and_looser_shapes():
    raw: list[dict[str, Any]] = [
        {"role": "assistant", "function_call": {"name": "f", "arguments": {"a": "é"}}},
        {"role": "function", "name": "f", "content": "t"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "x", "function": {"name": "g"}}]},
    ]
    assert messages_from_openai(raw) == [
        ChatMessage("assistant", None, None, (ToolCall("", "f", '{"a":"é"}'),)),
        ChatMessage("tool", "t", name="f"),
        ChatMessage("assistant", "", None, (ToolCall("x", "g", "{}"),)),
    ]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (["hi"], "messages[0]"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "assistant"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "assistant", "tool_calls": "x"}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].function"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "a b"}}]}],
            "messages[0].tool_calls[0].function.name",
        ),
        ([{"role": "assistant", "tool_calls": [{"id": 1, "function": {"name": "f"}}]}], "messages[0].tool_calls[0].id"),
        ([{"role": "tool", "content": "x", "tool_call_id": 3}], "messages[0].tool_call_id"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": float("nan")}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_refusals_name_the_field(messages, param):
    with pytest.raises(ChatRequestError) as error:
        messages_from_openai(messages)
    assert error.value.param == param


def test_tools_in_both_shapes():
    schema = {"type": "object", "properties": {}}
    raw: list[dict[str, Any]] = [
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": schema, "strict": True}},
        {"type": "function", "name": "g"},
        {"type": "custom", "custom": {"name": "h"}},
    ]
    assert tools_from_openai(raw) == [ToolDefinition("f", "d", schema), ToolDefinition("g")]
    assert tools_from_openai(None) == []


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        ("x", "tools[0]"),
        ({"type": "function", "function": None}, "tools[0].function"),
        ({"type": "function", "function": {}}, "tools[0].function.name"),
        ({"type": "function", "function": {"name": "f\n"}}, "tools[0].function.name"),
        ({"type": "function", "name": "f", "parameters": []}, "tools[0].parameters"),
        ({"type": "function", "name": "f", "description": 1}, "tools[0].description"),
    ],
)
def test_tool_refusals_name_the_field(tool, param):
    with pytest.raises(ChatRequestError) as error:
        tools_from_openai([tool])
    assert error.value.param == param


MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]) | JSON},
    optional={"content": JSON, "tool_calls": JSON, "tool_call_id": JSON, "function_call": JSON, "reasoning": JSON},
)


def refusal(read: Callable[[list[Any]], object], raw: list[Any]) -> ChatRequestError | None:
    try:
        read(raw)
    except ChatRequestError as error:
        return error
    return None


@given(st.lists(MESSAGE | JSON, max_size=3))
def test_any_json_is_read_or_refused(raw):
    error = refusal(messages_from_openai, raw)
    assert error is None or (error.param.startswith("messages") and "\n" not in str(error))


@given(st.lists(JSON, max_size=3))
def test_any_tools_are_read_or_refused(raw):
    error = refusal(tools_from_openai, raw)
    assert error is None or error.param.startswith("tools[")


def test_refusals_quote_no_more_than_a_line():
    error = refusal(messages_from_openai, [{"role": "x\n" * 10_000, "content": "x"}])
    assert error is not None
    assert len(str(error)) < 120


def test_the_public_surface_is_what_it_says():
    assert sorted(engine.text.__all__) == list(engine.text.__all__)
    assert all(hasattr(engine.text, name) for name in engine.text.__all__)
