"""Harmony prompts, token-exact: against the oss-harmony package where it agrees with the format, else goldens."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_harmony import (
    Conversation,
    DeveloperContent,
    Message,
    ReasoningEffort,
    RenderConversationConfig,
    Role,
    SystemContent,
    ToolDescription,
)
from text_support import O200kCodec, o200k_codec, small_tokenizer

from engine.text import (
    AssistantReply,
    ChatMessage,
    ChatRequestError,
    HarmonyChat,
    HarmonyRenderer,
    RenderOptions,
    ResponseSchema,
    ToolCall,
    ToolDefinition,
)
from engine.text.harmony.typescript import render_tools

DATE = "2025-06-28"
SYSTEM = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: 2024-06\nCurrent date: 2025-06-28\n\nReasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
)
SYSTEM_WITH_FUNCTIONS = SYSTEM.replace(
    "message.<|end|>", "message.\nCalls to these tools must go to the commentary channel: 'functions'.<|end|>"
)
WEATHER = ToolDefinition(
    "get_current_weather",
    "Gets the current weather in the provided location.",
    {
        "type": "object",
        "properties": {
            "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
            "format": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
        },
        "required": ["location"],
    },
)
CALL = ToolCall("c1", "f", '{"a":1}')
TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)


def rendered(codec: O200kCodec, messages, tools=(), **options) -> str:
    ids = HarmonyRenderer(codec).render(messages, tools, RenderOptions(DATE, **options))
    return codec.oracle.decode(ids)


def oracle_prompt(codec: O200kCodec, instructions, tools, turns, effort=ReasoningEffort.MEDIUM) -> list[int]:
    system = SystemContent.new().with_reasoning_effort(effort).with_conversation_start_date(DATE)
    messages = [Message.from_role_and_content(Role.SYSTEM, system)]
    if instructions or tools:
        developer = DeveloperContent.new()
        if instructions:
            developer = developer.with_instructions(instructions)
        if tools:
            described = [ToolDescription.new(t.name, t.description, parameters=t.parameters) for t in tools]
            developer = developer.with_function_tools(described)
        messages.append(Message.from_role_and_content(Role.DEVELOPER, developer))
    for role, text in turns:
        message = Message.from_role_and_content(Role.USER if role == "user" else Role.ASSISTANT, text)
        messages.append(message if role == "user" else message.with_channel("final"))
    config = RenderConversationConfig(auto_drop_analysis=False)
    conversation = Conversation.from_messages(messages)
    return codec.oracle.render_conversation_for_completion(conversation, Role.ASSISTANT, config)


def test_the_shortest_prompt_is_exact(o200k):
    ids = HarmonyRenderer(o200k).render([ChatMessage("user", "Hi")], [], RenderOptions(DATE))
    assert o200k.oracle.decode(ids) == SYSTEM + "<|start|>user<|message|>Hi<|end|><|start|>assistant"
    assert ids[-2:] == [200006, 173781]
    assert ids == oracle_prompt(o200k, None, [], [("user", "Hi")])


@pytest.mark.parametrize(
    ("effort", "expected"),
    [(None, "medium"), ("none", "low"), ("minimal", "low"), ("low", "low"), ("high", "high"), ("xhigh", "high")],
)
def test_effort_is_rounded(o200k, effort, expected):
    assert f"\n\nReasoning: {expected}\n\n" in rendered(o200k, [ChatMessage("user", "x")], reasoning_effort=effort)


@settings(deadline=None, max_examples=60)
@given(st.none() | TEXT, st.lists(st.tuples(st.sampled_from(["user", "assistant"]), TEXT), max_size=5))
def test_plain_conversations_equal_the_package(instructions, turns):
    codec = o200k_codec()
    leading = [ChatMessage("system", instructions)] if instructions else []
    ids = HarmonyRenderer(codec).render([*leading, *(ChatMessage(*turn) for turn in turns)], [], RenderOptions(DATE))
    assert ids == oracle_prompt(codec, instructions, [], turns)


def test_the_documented_tools_are_exact(o200k):
    location = ToolDefinition("get_location", "Gets the location of the user.")
    messages = [ChatMessage("developer", "Use a friendly tone."), ChatMessage("user", "How is it?")]
    expected = SYSTEM_WITH_FUNCTIONS + (
        "<|start|>developer<|message|># Instructions\n\nUse a friendly tone.\n\n# Tools\n\n## functions\n\n"
        "namespace functions {\n\n"
        "// Gets the location of the user.\ntype get_location = () => any;\n\n"
        "// Gets the current weather in the provided location.\ntype get_current_weather = (_: {\n"
        "// The city and state, e.g. San Francisco, CA\nlocation: string,\n"
        'format?: "celsius" | "fahrenheit", // default: celsius\n'
        "}) => any;\n\n} // namespace functions<|end|><|start|>user<|message|>How is it?<|end|><|start|>assistant"
    )
    tools = [location, WEATHER]
    assert rendered(o200k, messages, tools) == expected
    ids = HarmonyRenderer(o200k).render(messages, tools, RenderOptions(DATE))
    assert ids == oracle_prompt(o200k, "Use a friendly tone.", tools, [("user", "How is it?")])


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, object]:
    words = ["a", "The city", "naïve", 'say "x"', "12"]
    kinds = ["string", "number", "integer", "boolean", "enum", "list", "ref", "null"]
    kind = rng.choice(kinds if depth > 2 else [*kinds, "object", "array", "oneOf"])
    schema: dict[str, object] = {"type": kind}
    if kind == "enum":
        schema = {"type": "string", "enum": rng.sample(["x", "y", "z"], rng.randint(1, 3))}
    elif kind == "list":
        schema = {"type": rng.sample(["string", "integer", "null"], 2)}
    elif kind == "ref":
        schema = {"$ref": "#/definitions/x"}
    elif kind == "oneOf":
        schema = {"oneOf": [random_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
    elif kind == "array" and rng.random() < 0.8:
        schema["items"] = random_schema(rng, depth + 1)
    elif kind == "object":
        schema |= random_fields(rng, depth + 1)
    if rng.random() < 0.4:
        schema["description"] = rng.choice(words)
    if rng.random() < 0.2 and kind != "object":
        schema["default"] = rng.choice(["x", 3, 1.5, True, None, ["q"], {"k": "v"}])
    if rng.random() < 0.1:
        schema["title"] = rng.choice(words)
    if rng.random() < 0.1:
        schema["examples"] = rng.sample(["e1", "e2", 7], 2)
    if rng.random() < 0.1:
        schema["nullable"] = True
    return schema


def random_fields(rng: random.Random, depth: int = 0) -> dict[str, object]:
    names = rng.sample(["a", "b_c", "d-e", "city", "n"], rng.randint(1, 4))
    return {
        "properties": {name: random_schema(rng, depth) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
    }


def random_tools(rng: random.Random) -> list[ToolDefinition]:
    tools = []
    for index in range(rng.randint(1, 4)):
        parameters = {"type": "object", **random_fields(rng)} if rng.random() < 0.9 else None
        tools.append(ToolDefinition(f"tool_{index}", rng.choice(["", "One line.", "Two\nlines."]), parameters))
    return tools


def test_random_tools_equal_the_package(o200k):
    rng = random.Random(7)
    for _ in range(300):
        tools = random_tools(rng)
        ids = HarmonyRenderer(o200k).render([ChatMessage("user", "x")], tools, RenderOptions(DATE))
        expected = oracle_prompt(o200k, None, tools, [("user", "x")])
        assert o200k.oracle.decode(ids) == o200k.oracle.decode(expected)
        assert ids == expected


def test_where_tools_differ_from_the_package():
    no_fields = ToolDefinition("f", "d", {"type": "object", "properties": {}})
    lines = ToolDefinition("g", "", {"properties": {"x": {"type": "string", "description": "one\ntwo"}}})
    assert "// d\ntype f = () => any;\n\n" in render_tools([no_fields])
    assert "type g = (_: {\n// one\n// two\nx?: string,\n}) => any;\n\n" in render_tools([lines])


def test_hostile_schemas_render():
    deep: dict[str, object] = {"type": "string"}
    for _ in range(2_000):
        deep = {"type": "object", "properties": {"x": deep}}
    odd = {"type": 3, "properties": {"a": None, "b": {"enum": 5, "oneOf": "x"}, "c": {"type": []}}, "required": "a"}
    for parameters in (deep, odd, {"properties": {"x": {"oneOf": [1, {}]}}}, {"properties": []}):
        assert render_tools([ToolDefinition("f", "", parameters)]).startswith("namespace functions {")


def test_calls_and_results_have_the_forms_of_the_format(o200k):
    messages = [
        ChatMessage("user", "q"),
        ChatMessage("assistant", "Looking.", reasoning="think", tool_calls=(CALL, ToolCall("c2", "g", ""))),
        ChatMessage("tool", "one", tool_call_id="c2"),
        ChatMessage("tool", "two", tool_call_id="c1"),
    ]
    assert rendered(o200k, messages, [WEATHER]).partition("<|start|>user")[2] == (
        "<|message|>q<|end|><|start|>assistant<|channel|>analysis<|message|>think<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>Looking.<|end|>"
        '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"a":1}<|call|>'
        "<|start|>assistant to=functions.g<|channel|>commentary json<|message|>{}<|call|>"
        "<|start|>functions.g to=assistant<|channel|>commentary<|message|>one<|end|>"
        "<|start|>functions.f to=assistant<|channel|>commentary<|message|>two<|end|><|start|>assistant"
    )


def test_analysis_before_the_last_final_is_dropped(o200k):
    call = ChatMessage("assistant", None, reasoning="R3", tool_calls=(CALL,))
    messages = [
        ChatMessage("user", "q1"),
        ChatMessage("assistant", None, reasoning="R0", tool_calls=(CALL,)),
        ChatMessage("tool", "t", tool_call_id="c1"),
        ChatMessage("assistant", "a1", reasoning="R1"),
        ChatMessage("user", "q2"),
        ChatMessage("assistant", "a2", reasoning="R2"),
        ChatMessage("user", "q3"),
        call,
        ChatMessage("tool", "t", tool_call_id="c1"),
    ]
    text = rendered(o200k, messages)
    assert [f"R{i}" in text for i in range(4)] == [False, False, False, True]
    assert text.count("<|return|>") == 0
    assert "R3" not in rendered(o200k, [*messages, ChatMessage("assistant", "done")])


def test_a_continuation_stays_open_and_keeps_its_reasoning(o200k):
    messages = [ChatMessage("user", "q"), ChatMessage("assistant", "It is", reasoning="R")]
    text = rendered(o200k, messages, continue_final_message=True)
    assert text.endswith("analysis<|message|>R<|end|><|start|>assistant<|channel|>final<|message|>It is")
    with pytest.raises(ChatRequestError) as error:
        rendered(o200k, messages[:1], continue_final_message=True)
    assert error.value.param == "messages[0]"
    assert rendered(o200k, messages, add_generation_prompt=False).endswith("It is<|end|>")


def test_instructions_join_in_front_and_stay_in_place_later(o200k):
    messages = [ChatMessage("system", "A"), ChatMessage("developer", "B"), ChatMessage("user", "q")]
    text = rendered(o200k, [*messages, ChatMessage("system", "C")])
    assert text == SYSTEM + (
        "<|start|>developer<|message|># Instructions\n\nA\n\nB<|end|><|start|>user<|message|>q<|end|>"
        "<|start|>developer<|message|># Instructions\n\nC<|end|><|start|>assistant"
    )


def test_a_response_schema_closes_the_developer_message(o200k):
    schema = ResponseSchema("list", {"type": "object", "properties": {"é": {}}}, "What to buy")
    text = rendered(o200k, [ChatMessage("system", "Help."), ChatMessage("user", "q")], response_schema=schema)
    assert (
        "<|start|>developer<|message|># Instructions\n\nHelp.\n\n# Response Formats\n\n## list\n\n// What to buy\n"
        '{"type":"object","properties":{"é":{}}}<|end|><|start|>user' in text
    )


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([ChatMessage("user", "q"), ChatMessage("tool", "t", tool_call_id="nope")], "messages[1].tool_call_id"),
        ([ChatMessage("tool", "t")], "messages[0].tool_call_id"),
        (
            [ChatMessage("tool", "t", tool_call_id="c1"), ChatMessage("assistant", tool_calls=(CALL,))],
            "messages[0].tool_call_id",
        ),
    ],
)
def test_a_result_without_its_call_is_refused(o200k, messages, param):
    with pytest.raises(ChatRequestError) as error:
        rendered(o200k, messages)
    assert error.value.param == param


def test_an_old_result_names_its_function(o200k):
    text = rendered(o200k, [ChatMessage("tool", "t", name="f")])
    assert "<|start|>functions.f to=assistant<|channel|>commentary<|message|>t<|end|>" in text


def test_an_unknown_effort_is_refused(o200k):
    with pytest.raises(ChatRequestError) as error:
        rendered(o200k, [ChatMessage("user", "x")], reasoning_effort="extreme")
    assert error.value.param == "reasoning_effort"


def num_controls(codec, ids) -> int:
    return len([i for i in ids if i in set(codec.special_ids.values())])


@pytest.mark.parametrize("codec", [o200k_codec(), small_tokenizer()], ids=["o200k", "small"])
def test_no_text_of_a_request_becomes_a_control_token(codec):
    def prompt(text: str) -> list[int]:
        tool = ToolDefinition("f", text, {"properties": {text: {"description": text, "enum": [text], "default": text}}})
        messages = [
            ChatMessage("system", text),
            ChatMessage("user", text),
            ChatMessage("assistant", text, reasoning=text, tool_calls=(ToolCall("1", text, text),)),
            ChatMessage("tool", text, tool_call_id="1"),
            ChatMessage("assistant", text),
            ChatMessage("developer", text),
        ]
        options = RenderOptions(text, response_schema=ResponseSchema(text, {text: text}, text))
        return HarmonyRenderer(codec).render(messages, [tool], options)

    expected = num_controls(codec, prompt("x"))
    for literal in [name for name in codec.special_ids if "reserved" not in name]:
        assert num_controls(codec, prompt(literal)) == expected
    assert num_controls(codec, prompt("".join(codec.special_ids))) == expected


def test_completions_continue_the_prompt(o200k):
    chat = HarmonyChat(o200k)
    decode = o200k.oracle.decode
    final = chat.render_completion(AssistantReply(reasoning="R", final="F"))
    assert decode(final) == (
        "<|channel|>analysis<|message|>R<|end|><|start|>assistant<|channel|>final<|message|>F<|return|>"
    )
    assert decode(chat.render_completion(AssistantReply(final=""))) == "<|channel|>final<|message|><|return|>"
    calls = chat.render_completion(AssistantReply(preamble="P", tool_calls=(CALL, CALL)))
    assert decode(calls) == (
        "<|channel|>commentary<|message|>P<|end|>"
        '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"a":1}<|end|>'
        '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"a":1}<|call|>'
    )
    only = chat.render_completion(AssistantReply(tool_calls=(CALL,)))
    history = [ChatMessage("user", "q"), ChatMessage("assistant", tool_calls=(CALL,))]
    options = RenderOptions(DATE)
    prompt = chat.render(history[:1], [], options)
    assert prompt + only == chat.render(history, [], RenderOptions(DATE, add_generation_prompt=False))
    for reply in (AssistantReply(), AssistantReply(final="x", tool_calls=(CALL,))):
        with pytest.raises(ValueError, match="ends either"):
            chat.render_completion(reply)


def test_rendering_is_a_pure_function(o200k):
    messages = [ChatMessage("user", json.dumps({"a": 1}))]
    assert rendered(o200k, messages, [WEATHER]) == rendered(o200k, messages, [WEATHER])
