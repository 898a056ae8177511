"""The tokenizer: exact round trips, control tokens out of reach, digits and words split as the model needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.text.tokenizer import Tokenizer
from tools.tiny_oss.data import split_text
from tools.tiny_oss.evaluate import ASSET_FOLDER
from tools.tiny_oss.tokenizer import CONTROL_TOKENS, control_ids, load_tokenizer, merge_table, train_tokenizer

TOKENIZER = load_tokenizer(ASSET_FOLDER)


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_the_corpus_comes_back() -> None:
    text = split_text()[1]
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids) == text
    assert len(text) / len(ids) > 2.3


@pytest.mark.parametrize("name", CONTROL_TOKENS)
def test_written_control_tokens_stay_text(name: str, tokenizer: Tokenizer) -> None:
    control = set(control_ids(TOKENIZER).values())
    for text in (name, f"a{name}b", f" {name} ", name * 3):
        assert not control & set(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_single_tokens() -> None:
    assert TOKENIZER.encode("12+345 = 67").tokens == ["1", "2", "+", "3", "4", "5", "Ġ=", "Ġ", "6", "7"]


@pytest.mark.parametrize("word", ["Paris", "zorblat", "get", "weather", "splendid", "xyzzy", "Thereafter"])
def test_a_word_splits_alike_with_and_without_a_space(word: str) -> None:
    bare = TOKENIZER.encode(word).tokens
    spaced = TOKENIZER.encode(f"a {word}").tokens[1:]
    assert "".join(spaced) == f"Ġ{''.join(bare)}"
    assert spaced[-len(bare) + 1 :] == bare[1:] or len(bare) == 1


def test_vocabulary(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    size = TOKENIZER.get_vocab_size()
    assert size == config["vocab_size"]
    assert size % 64 != 0
    ids = control_ids(TOKENIZER)
    assert sorted(ids.values()) == list(range(size - len(ids), size))
    generation = json.loads((folder / "generation_config.json").read_text())
    assert set(generation["eos_token_id"]) == {ids["<|return|>"], ids["<|call|>"], ids["<|endoftext|>"]}


def test_training_is_reproducible() -> None:
    texts = split_text()[1].split("\n\n")
    one, two = (train_tokenizer(texts, 120, 90) for _ in range(2))
    assert one.to_str() == two.to_str()
    table = merge_table(one)
    names = {number: name for name, number in one.get_vocab().items()}
    assert all(names[a] + names[b] == names[token] for token, (a, b) in table.items())
