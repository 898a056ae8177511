"""The Harmony parser: the package as oracle on well-formed streams, the tolerance table on malformed ones, fuzz."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_harmony import Role, StreamableParser
from text_support import O200kCodec, numbered_ids, o200k_codec, parse

from engine.core.request import FinishReason
from engine.text import (
    AssistantReply,
    ChatReply,
    ContentDelta,
    HarmonyChat,
    HarmonyIds,
    ReasoningDelta,
    TokenizerError,
    ToolArgumentsDelta,
    ToolCall,
    ToolCallStart,
)
from engine.text.harmony.header import may_be_header
from engine.text.harmony.parse import MAX_HEADER_TOKENS, is_json

WORDS = ["Hello", " world", " naïve", "\n\n", "東京", "👩‍👩‍👧", " 42", '"q"', " to=x", " json", "€", " assistant"]


def call(name: str = "f", arguments: str = "{}", number: int = 1) -> ToolCall:
    return ToolCall(f"call_{number}", name, arguments)


def reply(content: str = "", *calls: ToolCall, reasoning: str = "", finish: str | None = None) -> ChatReply:
    reason = finish or ("tool_calls" if calls else "stop")
    return ChatReply(content, reasoning, calls, reason, len(o200k_codec().encode(reasoning)))


# What arrives, and column "ours" of the format's tolerance table.
TOLERANCE = {
    "text before any header": ("hello<|return|>", reply("hello")),
    "text with spaces before any header": (" hello  you\n<|return|>", reply(" hello  you\n")),
    "text that begins like a header": ("to be<|return|>", reply("to be")),
    "no message token": ("<|channel|>final hello<|return|>", reply("hello")),
    "no message token, then another message": (
        "<|channel|>analysis hm<|end|><|start|>assistant<|channel|>final<|message|>x<|return|>",
        reply("x", reasoning="hm"),
    ),
    "empty stream": ("", reply()),
    "return at once": ("<|return|>", reply()),
    "newline after end": (
        "<|channel|>analysis<|message|>a<|end|>\n<|start|>assistant<|channel|>final<|message|>x<|return|>",
        reply("x", reasoning="a"),
    ),
    "no start token after end": (
        "<|channel|>analysis<|message|>a<|end|>assistant<|channel|>final<|message|>x<|return|>",
        reply("x", reasoning="a"),
    ),
    "newline and no start token": (
        "<|channel|>analysis<|message|>a<|end|>\nassistant<|channel|>final<|message|>x<|return|>",
        reply("x", reasoning="a"),
    ),
    "plain text after end": ("<|channel|>analysis<|message|>a<|end|>So: 4<|return|>", reply("So: 4", reasoning="a")),
    "no role": ("<|start|><|channel|>final<|message|>x<|return|>", reply("x")),
    "unknown role": ("<|start|>bot<|channel|>final<|message|>x<|return|>", reply("x")),
    "recipient twice": (" to=functions.f<|channel|>commentary to=functions.f<|message|>{}<|call|>", reply("", call())),
    "last recipient wins": (
        " to=functions.g<|channel|>commentary to=functions.f<|message|>{}<|call|>",
        reply("", call()),
    ),
    "first channel token lost": (
        "commentary to=functions.f<|channel|>commentary<|message|>{}<|call|>",
        reply("", call()),
    ),
    "first channel token lost, with type": (
        "commentary to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>",
        reply("", call()),
    ),
    "only channel token lost": (
        "analysis<|message|>a<|end|><|start|>assistantfinal<|message|>x<|return|>",
        reply("x", reasoning="a"),
    ),
    "a role before the start": ("assistant<|start|>assistant<|channel|>final<|message|>x<|return|>", reply("x")),
    "extra words": ("<|channel|>commentary to=functions.f json code<|message|>{}<|call|>", reply("", call())),
    "glued recipient": ("<|channel|>commentaryto=functions.f<|message|>{}<|call|>", reply("", call())),
    "constrained final": ("<|channel|>final <|constrain|>json<|message|>{}<|return|>", reply("{}")),
    "channel twice": ("<|channel|>analysis<|channel|>final<|message|>x<|return|>", reply("x")),
    "unknown channel": ("<|channel|>musing<|message|>x<|return|>", reply("x")),
    "unknown channel with recipient": ("<|channel|>musing to=functions.f<|message|>{}<|call|>", reply("", call())),
    "start inside content": (
        "<|channel|>analysis<|message|>a<|start|>assistant<|channel|>final<|message|>x<|return|>",
        reply("x", reasoning="a"),
    ),
    "channel inside content": (
        "<|channel|>analysis<|message|>a<|channel|>final<|message|>x<|return|>",
        reply("x", reasoning="a"),
    ),
    "endoftext inside content": ("<|channel|>final<|message|>x<|endoftext|>more<|return|>", reply("x")),
    "nothing after the end": (
        "<|channel|>final<|message|>x<|return|><|start|>assistant<|channel|>final<|message|>y",
        reply("x"),
    ),
    "several calls": (
        " to=functions.f<|channel|>commentary json<|message|>{}<|end|>"
        '<|start|>assistant to=functions.g<|channel|>commentary json<|message|>{"a": 1}<|call|>',
        reply("", call(), call("g", '{"a": 1}', 2)),
    ),
    "preamble": (
        "<|channel|>commentary<|message|>Wait.<|end|>"
        "<|start|>assistant to=functions.f<|channel|>commentary<|message|>{}<|call|>",
        reply("Wait.", call()),
    ),
    "call in analysis": ("<|channel|>analysis to=functions.f<|message|>{}<|call|>", reply("", call())),
    "bare name": (" to=lookup<|channel|>commentary<|message|>{}<|call|>", reply("", call("lookup"))),
    "python": (" to=python<|channel|>analysis<|message|>1<|call|>", reply(reasoning="1")),
    "browser": (" to=browser.search<|channel|>commentary<|message|>1<|call|>", reply(reasoning="1")),
    "a function named python": (
        " to=functions.python<|channel|>commentary<|message|>{}<|call|>",
        reply("", call("python")),
    ),
    "no arguments": (" to=functions.f<|channel|>commentary<|message|> \n<|call|>", reply("", call())),
    "call without its message token": (
        ' to=functions.f<|channel|>commentary json{"a":1}<|call|>',
        reply("", call(arguments='{"a":1}')),
    ),
    "call that ends in its header": (" to=functions.f<|channel|>commentary<|call|>", reply("", call())),
    "arguments that are no JSON": (" to=functions.f<|channel|>commentary json<|message|>{oops<|call|>", reply("{oops")),
    "arguments with NaN": (" to=functions.f<|channel|>commentary json<|message|>[NaN]<|call|>", reply("[NaN]")),
    "a recipient that is a role": ("<|channel|>final to=user<|message|>{}<|return|>", reply("{}")),
    "a turn for somebody else": (
        "<|channel|>final<|message|>x<|end|><|start|>user<|message|>no<|end|>"
        "<|start|>functions.f to=assistant<|channel|>commentary<|message|>no<|return|>",
        reply("x"),
    ),
    "other control tokens": (
        "<|channel|>final<|message|>x<|constrain|><|message|><|startoftext|>y<|return|>",
        reply("xy"),
    ),
}


@pytest.mark.parametrize("name", TOLERANCE)
def test_tolerance(o200k, name):
    text, expected = TOLERANCE[name]
    tokens = o200k.encode_trusted(text)
    assert parse(o200k, tokens) == expected
    assert parse(o200k, tokens, sizes=[1] * len(tokens)) == expected
    if tokens and tokens[-1] == HarmonyIds.from_codec(o200k).return_:
        assert parse(o200k, tokens[:-1]) == expected  # the engine says `stop` and keeps the token to itself


@pytest.mark.parametrize(
    "text",
    ["<|channel|>", "<|channel|>fin", "<|channel|>final hel", " to=functions.f<|channel|>comm", "<|start|>", "assist"],
)
def test_a_length_limit_inside_a_header_leaves_nothing(o200k, text):
    done = parse(o200k, o200k.encode_trusted(text), FinishReason.LENGTH)
    assert done == reply(finish="length")


def test_a_length_limit_inside_content(o200k):
    text = "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>x"
    assert parse(o200k, o200k.encode_trusted(text), FinishReason.LENGTH) == reply("x", reasoning="a", finish="length")
    first = " to=functions.f<|channel|>commentary json<|message|>{}<|end|><|start|>assistant"
    assert parse(o200k, o200k.encode_trusted(first), FinishReason.LENGTH) == reply("", call(), finish="tool_calls")
    cut = ' to=functions.f<|channel|>commentary json<|message|>{"a": 1'
    assert parse(o200k, o200k.encode_trusted(cut), FinishReason.LENGTH) == reply('{"a": 1', finish="length")


def test_a_split_character_waits_and_is_replaced_only_at_the_end(small):
    chat = HarmonyChat(small)
    parser = chat.parser(is_continuation=True)
    euro = small.encode("€")
    assert parser.push(euro[:1]) == []
    assert parser.push(euro[1:]) == [ContentDelta("€", 0)]
    assert parser.push(euro[:1]) == []
    assert parser.push([chat.ids.end]) == [ContentDelta("\ufffd", 0)]


def test_events_of_a_whole_reply(o200k):
    chat = HarmonyChat(o200k, numbered_ids())
    made = AssistantReply("Think.", "Wait.", (ToolCall("", "f", '{"a": "b"}'), ToolCall("", "g", "{}")))
    parser = chat.parser()
    events = parser.push(chat.render_completion(made))
    assert events == [
        ReasoningDelta("Think.", 0),
        ContentDelta("Wait.", 1, "commentary"),
        ToolCallStart(0, "call_1", "f"),
        ToolArgumentsDelta(0, '{"a": "b"}'),
        ToolCallStart(1, "call_2", "g"),
        ToolArgumentsDelta(1, "{}"),
    ]
    assert parser.is_ended


def test_arguments_may_stream(o200k):
    chat = HarmonyChat(o200k, numbered_ids())
    parser = chat.parser(stream_arguments=True)
    text = " to=functions.f<|channel|>commentary json<|message|>"
    assert parser.push(o200k.encode_trusted(text)) == []
    assert parser.push(o200k.encode('{"a')) == [ToolCallStart(0, "call_1", "f"), ToolArgumentsDelta(0, '{"a')]
    assert parser.push(o200k.encode('":1}')) == [ToolArgumentsDelta(0, '":1}')]
    assert parser.push([chat.ids.call]) == []
    empty = o200k.encode_trusted(text + "<|call|>")
    assert parse(o200k, empty, stream_arguments=True) == reply("", call())


def test_one_call_at_most(o200k):
    tokens = o200k.encode_trusted(TOLERANCE["several calls"][0])
    for sizes in ([], [1] * len(tokens)):
        assert parse(o200k, tokens, sizes=sizes, parallel_tool_calls=False) == reply("", call())


def test_a_continuation_begins_inside_the_answer(o200k):
    assert parse(o200k, o200k.encode_trusted(" to=x yes<|return|>"), is_continuation=True) == reply(" to=x yes")


def test_a_header_without_end_becomes_content(o200k):
    words = " json" * (MAX_HEADER_TOKENS * 2)
    assert parse(o200k, o200k.encode_trusted(words), FinishReason.LENGTH) == reply(words, finish="length")
    lost = parse(
        o200k, o200k.encode_trusted("<|channel|>final" + " word" * (MAX_HEADER_TOKENS * 2)), FinishReason.LENGTH
    )
    assert lost.content == ("word" + " word" * (MAX_HEADER_TOKENS * 2 - 1))


def test_a_character_split_where_a_header_overflows_survives(small):
    euro = small.encode("€")
    ids = HarmonyIds.from_codec(small)
    fill = small.encode("x")
    header = [ids.channel, *small.encode("final ")]
    tokens = [*header, *fill * (MAX_HEADER_TOKENS + 1 - len(header)), *euro, ids.return_]
    assert parse(small, tokens).content.endswith("x€")


def test_positions_of_content_tokens(o200k):
    parser = HarmonyChat(o200k).parser()
    tokens = o200k.encode_trusted(
        "<|channel|>analysis<|message|>a b<|end|><|start|>assistant<|channel|>final<|message|>x y<|return|>"
    )
    parser.push(tokens[:-2])
    parser.push(tokens[-2:])
    assert [tokens[i] for i in parser.take_content_positions()] == o200k.encode("x y")
    assert parser.take_content_positions() == []


@given(st.text(st.sampled_from("asinftalco=mery \n.dejx"), max_size=20), st.text(max_size=3))
def test_text_that_is_no_header_stays_none(text, more):
    assert may_be_header(text) or not may_be_header(text + more)


@pytest.mark.parametrize("text", ["{}", "[1e999, 1]", "9" * 6_000, '"\\ud800"', "null", ' {"a": [true]} '])
def test_json_is_accepted(text):
    assert is_json(text)


@pytest.mark.parametrize("text", ["", "{", "NaN", "[Infinity]", "{'a': 1}", "[" * 100_000, '{"a": 1}}', "\x00"])
def test_what_is_no_json(text):
    assert not is_json(text)


def test_a_tokenizer_without_control_tokens_is_refused():
    class Plain:
        special_ids = {"<|start|>": 1}  # noqa: RUF012
        vocab_size = 2

        def encode(self, text: str) -> list[int]:
            return []

        def token_bytes(self, token_id: int) -> bytes:
            return b""

    with pytest.raises(TokenizerError, match=r"<\|end\|>"):
        HarmonyIds.from_codec(Plain())


# Well-formed streams, against the package.


def random_messages(rng: random.Random) -> list[tuple[str, str, str, str]]:
    """(header without start and role, channel, recipient, content) of each message of one reply."""
    made = []
    names = [f"tool_{i}" for i in range(rng.randint(1, 4))]
    for _ in range(rng.randint(1, 5)):
        text = "".join(rng.choices(WORDS, k=rng.randint(0, 8)))
        kind = rng.choice(["analysis", "commentary", "final", "call", "call"])
        if kind != "call":
            made.append((f"<|channel|>{kind}", kind, "", text))
            continue
        name = f"functions.{rng.choice(names)}"
        channel = rng.choice(["commentary", "analysis"])
        header = rng.choice(
            [
                f" to={name}<|channel|>{channel} json",
                f" to={name}<|channel|>{channel} <|constrain|>json",
                f" to={name}<|channel|>{channel}",
                f"<|channel|>{channel} to={name} <|constrain|>json",
                f"<|channel|>{channel} to={name} code",
                f"<|channel|>{channel} to={name}<|constrain|>json",
            ]
        )
        made.append((header, channel, name, json.dumps({text: [text]}, ensure_ascii=rng.random() < 0.5)))
    return made


def test_well_formed_streams_equal_the_package(o200k):
    rng = random.Random(11)
    for _ in range(400):
        messages = random_messages(rng)
        texts = [f"{header}<|message|>{content}" for header, _, _, content in messages]
        stream = "<|end|><|start|>assistant".join(texts) + rng.choice(["<|return|>", "<|call|>"])
        tokens = o200k.encode_trusted(stream)
        oracle = StreamableParser(o200k.oracle, Role.ASSISTANT)
        for token in tokens:
            oracle.process(token)
        ours = ours_by_message(o200k, tokens)
        theirs = [(m.channel, m.recipient or "", "".join(c.text for c in m.content)) for m in oracle.messages]
        assert [(c, r, t) for _, c, r, t in messages] == theirs
        assert ours == [expected_route(*message) for message in theirs if message[2]]


def expected_route(channel: str, recipient: str, text: str) -> tuple[str, str]:
    if recipient:
        return recipient.removeprefix("functions."), text
    return ("reasoning" if channel == "analysis" else "content"), text


def ours_by_message(codec: O200kCodec, tokens: list[int]) -> list[tuple[str, str]]:
    """Our events as (route or function, text) of each message that says something."""
    parser = HarmonyChat(codec, numbered_ids()).parser()
    events = [event for token in tokens for event in parser.push([token])]
    out: list[tuple[object, str, str]] = []
    for event in events:
        if isinstance(event, ToolCallStart):
            out.append((("call", event.index), event.name, ""))
            continue
        if isinstance(event, ToolArgumentsDelta):
            key, route = ("call", event.index), out[-1][1]
        else:
            assert isinstance(event, ReasoningDelta | ContentDelta)
            key, route = event.message, "reasoning" if isinstance(event, ReasoningDelta) else "content"
        if out and out[-1][0] == key:
            out[-1] = (key, route, out[-1][2] + event.text)
        else:
            out.append((key, route, event.text))
    return [(route, text) for _, route, text in out]


# Fuzz.


def random_stream(rng: random.Random, codec: O200kCodec, pieces: list[list[int]]) -> list[int]:
    tokens: list[int] = []
    for _ in range(rng.randint(0, 30)):
        if rng.random() < 0.05:
            tokens.append(rng.choice([rng.randrange(199_998), rng.randrange(199_998, 201_089), -1, 2**40]))
        else:
            tokens += rng.choice(pieces)
    return tokens


def fuzz_pieces(codec: O200kCodec) -> list[list[int]]:
    controls = ["start", "end", "message", "channel", "constrain"] * 3 + ["return", "call", "endoftext"]
    words = ["assistant", " assistant", "user", "analysis", "commentary", "final", " to=functions.f", "to=functions.g"]
    words += [" json", "code", " to=python", "{}", '{"a":', " 1}", "hello", " ", "\n", "€", " to=", "bot"]
    pieces = [codec.encode_trusted(f"<|{name}|>") for name in controls]
    pieces += [codec.encode(word) for word in words]
    openings = [
        "<|channel|>analysis",
        "<|channel|>final",
        "<|channel|>commentary",
        " to=functions.f<|channel|>commentary",
    ]
    wholes = [f"<|start|>assistant{opening}<|message|>" for opening in openings] * 2
    wholes += ['<|start|>assistant to=functions.g<|channel|>commentary json<|message|>{"a": 1}<|end|>', "<|end|>"] * 2
    return [*pieces, *map(codec.encode_trusted, wholes), codec.encode("👩‍👩‍👧")[:1]]


def test_fuzz_never_raises_and_does_not_depend_on_the_chunks(o200k):
    rng = random.Random(2024)
    pieces = fuzz_pieces(o200k)
    for number in range(10_000):
        tokens = random_stream(rng, o200k, pieces)
        reason = rng.choice(list(FinishReason))
        whole = parse(o200k, tokens, reason)
        assert parse(o200k, tokens, reason, [1] * len(tokens)) == whole
        assert parse(o200k, tokens, reason, [rng.randint(0, 4) for _ in tokens]) == whole
        assert whole.finish_reason == "tool_calls" or not whole.tool_calls
        for made in whole.tool_calls:
            assert made.name
            assert is_json(made.arguments)
        assert "<|" not in whole.content + whole.reasoning
        if number % 20 == 0:
            before = ""
            for end in range(len(tokens) + 1):
                now = streamed_text(o200k, tokens[:end])
                assert now.startswith(before)
                before = now


def streamed_text(codec: O200kCodec, tokens: list[int]) -> str:
    events = HarmonyChat(codec, numbered_ids()).parser().push(tokens)
    return "".join(event.text for event in events if isinstance(event, ContentDelta | ReasoningDelta))
