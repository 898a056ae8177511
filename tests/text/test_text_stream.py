"""Streams of text: the detokenizer and the stop matcher give the batch result however the stream is cut."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_support import small_inner, small_tokenizer
from tokenizers.decoders import DecodeStream

from engine.text import Detokenizer, StopMatcher

SMALL = small_tokenizer()
INNER = small_inner()


@given(st.lists(st.integers(-1, SMALL.vocab_size + 1)), st.booleans())
def test_pieces_concatenate_to_the_batch(ids, skip):
    stream = Detokenizer(SMALL, skip_special_tokens=skip)
    text = "".join(stream.push([i]) for i in ids) + stream.finish()
    known = [i for i in ids if 0 <= i < SMALL.vocab_size]
    assert text == SMALL.decode(known, skip)


@given(st.text(min_size=1))
def test_no_half_character_leaves(text):
    stream = Detokenizer(SMALL)
    done = ""
    for token in SMALL.encode(text):
        done += stream.push([token])
        assert text.startswith(done)
    assert done == text
    assert stream.finish() == ""


@given(st.text(alphabet="ab é€👋\n", max_size=30))
def test_equals_the_packages_stream(text):
    """The package waits for whole tokens, we for whole characters: never later, and the same in the end."""
    ids = INNER.encode(text, add_special_tokens=False).ids
    oracle, ours = DecodeStream(skip_special_tokens=True), Detokenizer(SMALL)
    expected = done = ""
    for token in ids:
        expected += oracle.step(INNER, token) or ""
        done += ours.push([token])
        assert done.startswith(expected)
    assert done == expected


def test_an_incomplete_tail_becomes_the_replacement_character_at_the_end(small):
    stream = Detokenizer(small)
    assert stream.push(small.encode("a€")[:-1]) == "a"
    assert stream.finish() == "\ufffd"


def batch_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The definition: cut at the first stop string to end, the longest of those that end there."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    st.booleans(),
    st.lists(st.integers(0, 5), max_size=10),
)
def test_stop_strings_equal_the_definition_however_the_text_is_cut(text, stops, include, sizes):
    expected = batch_stop(text, stops, include)
    for cuts in ([len(text)], [1] * len(text), [*sizes, len(text)]):
        matcher, out, at = StopMatcher(stops, include_stop=include), "", 0
        for size in cuts:
            out += matcher.push(text[at : at + size])
            at += size
            assert expected[0].startswith(out)
        out += matcher.finish()
        assert (out, matcher.matched) == expected


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
def test_no_more_is_held_back_than_may_begin_a_stop(text, stops):
    matcher, out = StopMatcher(stops), ""
    for end, char in enumerate(text, start=1):
        out += matcher.push(char)
        if matcher.matched:
            return
        held = text[len(out) : end]
        assert any(stop.startswith(held) for stop in stops)
        longer = text[len(out) - 1 : end] if out else None
        assert longer is None or not any(stop.startswith(longer) for stop in stops)


def test_nothing_follows_a_match():
    matcher = StopMatcher(["END"])
    assert matcher.push("so EN") == "so "
    assert matcher.push("D and more") == ""
    assert matcher.matched == "END"
    assert matcher.push("later") == matcher.finish() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["x", ""])


def test_matching_is_linear():
    stops = ["a" * 255 + "b"] * 1 + ["a" * n + "c" for n in range(200, 215)]

    def seconds(num_chars: int) -> float:
        matcher, begin = StopMatcher(stops), time.perf_counter()
        for _ in range(num_chars // 4):
            matcher.push("aaaa")
        return time.perf_counter() - begin

    seconds(1_000)
    # A quadratic matcher would take 100 times as long; the margin is for a busy machine.
    assert seconds(100_000) < 40 * max(seconds(10_000), 1e-3)
