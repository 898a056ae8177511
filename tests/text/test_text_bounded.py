"""A prompt that is too long is refused early, and only one that is too long."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from text_support import o200k_codec, small_tokenizer

from engine.text import (
    BoundedCodec,
    ChatMessage,
    HarmonyChat,
    PromptTooLong,
    RenderOptions,
    TextCodec,
    TokenizerError,
    bounded,
)
from engine.text.bounded import EXACT_BYTES, WINDOW_CHARS

PROSE = "The quick brown fox jumps over the lazy dog, and it's raining in 東京.\n"
# What could be cut worst: long words, runs, digits in groups, letters of several bytes, no words at all.
SHAPES = {
    "prose": PROSE,
    "one word": "a",
    "spaces": " ",
    "lines of spaces": " " * 700 + "\n",
    "newlines": "\r\n",
    "digits": "0123456789",
    "two letters": "ab",
    "emoji": "👋🏽",
    "marks": "e\u0301\u0302",
    "base64": "Q29weSBvZiB0aGUgd29yZHM",
    "signs": "-=-=*_",
}


class Counting:
    """A codec that counts what it is asked to encode."""

    def __init__(self, codec: TextCodec) -> None:
        self.codec = codec
        self.num_chars = 0

    @property
    def special_ids(self) -> Mapping[str, int]:
        return self.codec.special_ids

    @property
    def vocab_size(self) -> int:
        return self.codec.vocab_size

    @property
    def longest_token_bytes(self) -> int:
        return self.codec.longest_token_bytes

    def encode(self, text: str) -> list[int]:
        self.num_chars += len(text)
        return self.codec.encode(text)

    def token_bytes(self, token_id: int) -> bytes:
        return self.codec.token_bytes(token_id)


def text_of(shape: str, num_chars: int) -> str:
    piece = SHAPES[shape]
    return (piece * (num_chars // len(piece) + 1))[:num_chars]


def encode_often(prompt: BoundedCodec, times: int) -> None:
    for _ in range(times):
        prompt.encode(PROSE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocabulary", ["small", "o200k"])
def test_a_prompt_that_just_fits_is_encoded_exactly(
    shape: str, vocabulary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = small_tokenizer() if vocabulary == "small" else o200k_codec()
    # Short parts, for many cuts: what stands for o200k takes the square of a word's length.
    monkeypatch.setattr(bounded, "WINDOW_CHARS", 1009)
    monkeypatch.setattr(bounded, "EXACT_BYTES", 0)
    text = text_of(shape, 4077)
    ids = codec.encode(text)
    # Its bytes are above the exact ones, so parts are looked at, and must not seem more than the whole.
    monkeypatch.setattr(bounded, "EXACT_BYTES_PER_TOKEN", 0)
    assert BoundedCodec(codec, len(ids)).encode(text) == ids
    # Why it holds: a cut adds a token or two, and allowance is made for twice the longest.
    parts = sum(len(codec.encode(text[at : at + 1009])) for at in range(0, len(text), 1009))
    assert parts <= len(ids) + 4 * 8


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_of_many_contexts_is_refused_early(shape: str) -> None:
    codec = Counting(small_tokenizer())
    limit = 4096
    with pytest.raises(PromptTooLong, match="more than 4096 tokens"):
        BoundedCodec(codec, limit).encode(text_of(shape, 4 << 20))
    assert codec.num_chars <= limit * codec.longest_token_bytes + 2 * WINDOW_CHARS


def test_bytes_alone_can_prove_it() -> None:
    codec = Counting(small_tokenizer())
    limit = 1000
    with pytest.raises(PromptTooLong):
        BoundedCodec(codec, limit).encode("x" * max(EXACT_BYTES + 1, limit * codec.longest_token_bytes + 1))
    assert codec.num_chars == 0


def test_many_texts_add_up_and_short_prompts_are_exact_at_any_limit() -> None:
    codec = Counting(small_tokenizer())
    prompt = BoundedCodec(codec, 10)
    while codec.num_chars + len(PROSE.encode()) <= EXACT_BYTES // 2:
        assert prompt.encode(PROSE) == codec.codec.encode(PROSE)
    with pytest.raises(PromptTooLong):
        encode_often(prompt, EXACT_BYTES // len(PROSE))
    assert codec.num_chars <= EXACT_BYTES


def test_a_conversation_is_one_prompt() -> None:
    codec = Counting(small_tokenizer())
    chat = HarmonyChat(codec)
    messages = [ChatMessage("user", PROSE * 200)] * 400
    options = RenderOptions("2026-01-01", max_prompt_tokens=2000)
    with pytest.raises(PromptTooLong):
        chat.render(messages, [], options)
    assert codec.num_chars < 2 * EXACT_BYTES
    few = messages[:1]
    assert chat.render(few, [], options) == chat.render(few, [], RenderOptions("2026-01-01"))


def test_what_cannot_be_encoded_is_said_so() -> None:
    with pytest.raises(TokenizerError, match="lone surrogate"):
        BoundedCodec(small_tokenizer(), 1 << 20).encode("x" * EXACT_BYTES + "\ud800")
