"""From engine outputs to what a client reads: stop strings, ends, positions, independence of the pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_support import numbered_ids, small_tokenizer

from engine.core.request import FinishReason
from engine.text import (
    AssistantReply,
    ChatOutputProcessor,
    ChatReply,
    ContentDelta,
    HarmonyChat,
    OutputProcessor,
    TextError,
    ToolCall,
    ToolDefinition,
    chat_format_for,
    collect_reply,
)
from engine.text.chat import random_call_id

SMALL = small_tokenizer()
CHAT = HarmonyChat(SMALL, numbered_ids())


def complete(
    text: str, sizes: list[int], reason: FinishReason = FinishReason.LENGTH, **options
) -> tuple[str, object, object]:
    tokens = SMALL.encode(text)
    processor, out, at = OutputProcessor(SMALL, **options), "", 0
    for size in [*sizes, len(tokens)]:
        piece, at = tokens[at : at + size], at + size
        update = processor.push(piece, reason if at >= len(tokens) else None)
        out += update.text
        if update.finish_reason:
            return out, update.finish_reason, update.stop_string
    raise AssertionError("never finished")


@given(st.text("abé€ ", max_size=20), st.lists(st.integers(0, 4), max_size=8), st.booleans())
def test_completions_do_not_depend_on_the_pieces(text, sizes, include):
    options = {"stop": ["ab", "é€", "b a"], "include_stop": include}
    assert complete(text, sizes, **options) == complete(text, [], **options)
    assert complete(text, sizes) == (text, FinishReason.LENGTH, None)


def test_a_stop_string_ends_the_text_and_asks_for_an_abort(small):
    processor = OutputProcessor(small, stop=["STOP"])
    tokens = small.encode("one ST") + small.encode("OP two")
    first = processor.push(tokens[:-3])
    update = processor.push(tokens[-3:]) if first.finish_reason is None else first
    assert (first.text + (update.text if update is not first else "")) == "one "
    assert update.finish_reason is FinishReason.STOP
    assert update.stop_string == "STOP"
    assert update.must_abort
    later = processor.push(small.encode("more"), FinishReason.LENGTH)
    assert (later.text, later.num_tokens, later.finish_reason) == ("", 0, None)


def test_tokens_after_a_stop_string_are_not_used(small):
    tokens = [token for char in "xSy" for token in small.encode(char)]
    update = OutputProcessor(small, stop=["S"]).push(tokens, FinishReason.LENGTH)
    assert (update.text, update.num_tokens, update.finish_reason) == ("x", 2, FinishReason.STOP)
    assert not update.must_abort


def test_held_text_leaves_at_the_end(small):
    processor = OutputProcessor(small, stop=["STOP"])
    assert processor.push(small.encode("a ST")).text == "a "
    update = processor.push([], FinishReason.LENGTH)
    assert (update.text, update.finish_reason, update.stop_string) == ("ST", FinishReason.LENGTH, None)


def test_stop_tokens_are_no_text(small):
    comma = small.encode(",")[0]
    end = small.special_ids["<|end|>"]
    for include, expected in ((False, "a"), (True, "a,")):
        processor = OutputProcessor(small, include_stop=include)
        assert processor.push([*small.encode("a"), comma], FinishReason.STOP, comma).text == expected
    kept = OutputProcessor(small, skip_special_tokens=False)
    assert kept.push([end, *small.encode("a"), end], FinishReason.STOP, end).text == "<|end|>a"


def test_an_incomplete_character_at_the_end(small):
    update = OutputProcessor(small, stop=["\ufffd"]).push(small.encode("a€")[:-1], FinishReason.LENGTH)
    assert (update.text, update.finish_reason) == ("a", FinishReason.STOP)


def chat(tokens: list[int], sizes: list[int], reason: FinishReason, **options) -> tuple[ChatReply, object]:
    processor, events, at = ChatOutputProcessor(CHAT, **options), [], 0
    for size in [*sizes, len(tokens)]:
        piece, at = tokens[at : at + size], at + size
        update = processor.push(piece, reason if at >= len(tokens) else None)
        events += update.events
        if update.finish_reason:
            assert processor.push([1], FinishReason.STOP).events == []
            return collect_reply(events), update.stop_string
    raise AssertionError("never finished")


@given(st.text("abS ", max_size=12), st.text("abS ", max_size=12), st.lists(st.integers(0, 4), max_size=12))
def test_chat_stop_strings_touch_the_answer_only(reasoning, final, sizes):
    tokens = CHAT.render_completion(AssistantReply(reasoning=reasoning, preamble=reasoning, final=final))
    reply, stop = chat(tokens, sizes, FinishReason.STOP, stop=["S", "ab"])
    ends = [end for end in range(len(final) + 1) if final[:end].endswith(("S", "ab"))]
    cut = final[: ends[0]] if ends else final
    expected = cut[: -1 if cut.endswith("S") else -2] if ends else final
    assert reply.reasoning == reasoning
    assert reply.content == reasoning + expected
    assert (stop is not None) == bool(ends)
    assert reply.finish_reason == "stop"


def test_chat_stop_strings_leave_calls_alone():
    call = ToolCall("", "f", '{"a": "STOP"}')
    tokens = CHAT.render_completion(AssistantReply(reasoning="STOP", tool_calls=(call,)))
    reply, stop = chat(tokens, [], FinishReason.STOP, stop=["STOP"])
    assert stop is None
    assert (reply.reasoning, reply.tool_calls[0].arguments, reply.finish_reason) == (
        "STOP",
        call.arguments,
        "tool_calls",
    )


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        ("", ("a ", "STOP")),
        ("<|start|>assistant<|channel|>analysis<|message|>r<|end|>", ("a ", "STOP")),
        ("<|start|>assistant<|channel|>commentary<|message|>c<|end|>", ("a STcOP b", None)),
        ("<|start|>assistant to=functions.f<|channel|>commentary<|message|>{}<|end|>", ("a STOP b", None)),
    ],
)
def test_stop_strings_where_messages_meet(between, expected):
    tokens = SMALL.encode_trusted(
        f"<|channel|>final<|message|>a ST<|end|>{between}<|start|>assistant<|channel|>final<|message|>OP b<|return|>"
    )
    for sizes in ([], [1] * len(tokens)):
        reply, stop = chat(tokens, sizes, FinishReason.STOP, stop=["STOP"])
        assert (reply.content, stop) == expected


def test_held_text_leaves_before_a_call():
    tokens = SMALL.encode_trusted(
        "<|channel|>final<|message|>ST<|end|><|start|>assistant to=functions.f<|message|><|call|>"
    )
    events = ChatOutputProcessor(CHAT, stop=["STOP"]).push(tokens).events
    assert isinstance(events[0], ContentDelta)
    assert events[0].text == "ST"


def test_a_complete_reply_asks_for_an_abort():
    tokens = CHAT.render_completion(AssistantReply(tool_calls=(ToolCall("", "f", "{}"), ToolCall("", "g", "{}"))))
    update = ChatOutputProcessor(CHAT, parallel_tool_calls=False).push(tokens)
    assert update.must_abort
    assert update.finish_reason == "tool_calls"
    assert len(collect_reply(update.events).tool_calls) == 1
    ended = ChatOutputProcessor(CHAT).push(tokens, FinishReason.STOP, CHAT.ids.call)
    assert not ended.must_abort


def test_a_clients_stop_token_is_no_text_and_the_formats_still_counts():
    comma = SMALL.encode(",")[0]
    begin = SMALL.encode_trusted("<|channel|>final<|message|>a")
    update = ChatOutputProcessor(CHAT).push([*begin, comma], FinishReason.STOP, comma)
    assert collect_reply(update.events).content == "a"
    header = SMALL.encode_trusted(" to=functions.f<|channel|>commentary<|call|>")
    update = ChatOutputProcessor(CHAT).push(header, FinishReason.STOP, CHAT.ids.call)
    assert collect_reply(update.events).finish_reason == "tool_calls"


def test_positions_point_into_the_push():
    tokens = CHAT.render_completion(AssistantReply(reasoning="r", final="xyz"))
    for stops in ((), ("never",)):
        processor = ChatOutputProcessor(CHAT, stop=stops)
        shown = []
        for at in range(0, len(tokens), 3):
            piece = tokens[at : at + 3]
            update = processor.push(piece)
            shown += [piece[position] for position in update.content_positions]
        assert SMALL.decode(shown) == "xyz"


@pytest.mark.parametrize("reason", list(FinishReason))
def test_every_engine_end_has_an_end_in_chat(reason):
    begin = SMALL.encode_trusted("<|channel|>final<|message|>a")
    reply, _ = chat(begin, [], reason)
    assert reply.content == "a"
    assert reply.finish_reason == ("length" if reason is FinishReason.LENGTH else "stop")


def test_a_continued_answer():
    update = ChatOutputProcessor(CHAT, [ToolDefinition("f")], is_continuation=True).push(SMALL.encode(" and so on"))
    assert update.events == [ContentDelta(" and so on", 0)]


def test_formats_are_chosen_by_model_type(small):
    chosen = chat_format_for("gpt_oss", small)
    assert isinstance(chosen, HarmonyChat)
    assert set(chosen.stop_token_ids) == {small.special_ids[f"<|{name}|>"] for name in ("return", "call", "endoftext")}
    assert chosen.map_reasoning_effort("max") == "high"
    with pytest.raises(TextError, match="'llama'"):
        chat_format_for("llama", small)


def test_call_ids_are_well_formed_and_differ():
    ids = {random_call_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(call_id) == 29 and call_id.startswith("call_") and call_id[5:].isalnum() for call_id in ids)
