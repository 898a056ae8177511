"""The tokenizer: round trips, control tokens that text cannot write, clean errors."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_support import CONTROL, small_inner, small_tokenizer
from tokenizers import models, normalizers, pre_tokenizers

from engine.text import Tokenizer, TokenizerError, token_text
from engine.text import tokenizer as module

SMALL = small_tokenizer()
INNER = small_inner()
LITERALS = [f"<|{name}|>" for name in CONTROL]


@given(st.text())
def test_text_survives_a_round_trip(text):
    assert SMALL.decode(SMALL.encode(text)) == text
    assert b"".join(SMALL.token_bytes(i) for i in SMALL.encode(text)) == text.encode()


@given(st.lists(st.integers(0, SMALL.vocab_size - 1)), st.booleans())
def test_decode_equals_the_package(ids, skip):
    assert SMALL.decode(ids, skip) == INNER.decode(ids, skip_special_tokens=skip)


@given(st.lists(st.sampled_from([*LITERALS, "<think>", "<|", "|>", "end", " ", "hi"])).map("".join))
def test_text_never_becomes_an_added_token(text):
    ids = SMALL.encode(text)
    assert not set(ids) & set(SMALL.added_ids.values())
    assert SMALL.decode(ids, skip_special_tokens=False) == text


@given(st.lists(st.sampled_from([*LITERALS, "<think>", "Hello", " wörld"])).map("".join))
def test_trusted_text_equals_the_package(text):
    assert SMALL.encode_trusted(text) == INNER.encode(text, add_special_tokens=False).ids


def test_ordinary_text_equals_the_package(tokenizer):
    text = "The quick brown fox, 12 + 3 = 15.\n\n  Grüße aus 東京 👋🏽"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_trusted(text) == tokenizer.encode(text)


def test_control_tokens_and_ranges(tokenizer):
    assert set(LITERALS) <= set(tokenizer.special_ids)
    start = tokenizer.special_ids["<|start|>"]
    assert tokenizer.is_special(start)
    assert tokenizer.token_bytes(start) == b"<|start|>"
    assert tokenizer.decode([start]) == ""
    assert tokenizer.decode([start], skip_special_tokens=False) == "<|start|>"
    tokenizer.check_ids([0, tokenizer.vocab_size - 1])
    for bad in (-1, tokenizer.vocab_size, 10**12):
        with pytest.raises(TokenizerError, match=str(bad)):
            tokenizer.check_ids([0, bad])
        with pytest.raises(TokenizerError, match="outside the vocabulary"):
            tokenizer.decode([bad])
        assert tokenizer.token_bytes(bad) == b""


def test_readable_tokens(small):
    euro = small.encode("€")
    assert len(euro) > 1
    assert small.token_str(euro[0]) == "bytes:\\xe2"
    assert token_text(small, euro[0]).bytes == [0xE2]
    assert token_text(small, small.encode("a")[0]).token == "a"
    end = small.special_ids["<|end|>"]
    assert token_text(small, end).token == ""
    assert token_text(small, end, skip_special_tokens=False).token == "<|end|>"


def test_lone_surrogates_are_refused(small):
    with pytest.raises(TokenizerError, match=r"U\+D800.* at character 2"):
        small.encode("ab\ud800")


@pytest.mark.parametrize("length", [module.LONG_TEXT_CHARS - 1, module.LONG_TEXT_CHARS, 40_000])
def test_long_text_has_the_ids_of_short_text(tokenizer, monkeypatch: pytest.MonkeyPatch, length):
    text = ("Grüße aus 東京 <|end|>\n\x00 12 👋🏽 " * 2000)[:length]
    ids = tokenizer.encode(text)
    with pytest.raises(TokenizerError, match=f"at character {length}"):
        tokenizer.encode(text + "\ud800")
    monkeypatch.setattr(module, "LONG_TEXT_CHARS", sys.maxsize)
    assert tokenizer.encode(text) == ids


def test_other_threads_run_while_long_text_is_encoded(small):
    num_beats, is_over = 0, threading.Event()

    def beat() -> None:
        nonlocal num_beats
        while not is_over.wait(0.001):
            num_beats += 1

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        while not num_beats:
            pass
        before = num_beats
        small.encode("wörd " * 100_000)
        # With the GIL held there would be one or two: at the call and at its end.
        assert num_beats - before > 5
    finally:
        is_over.set()
        thread.join()


def test_byte_level_alphabet_is_the_packages():
    alphabet = module.byte_level_alphabet()
    assert sorted(alphabet) == sorted(pre_tokenizers.ByteLevel.alphabet())
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for code in (*range(0x80), 0xE9, 0x20AC, 0x1F44B):
        written = "".join(alphabet[byte] for byte in chr(code).encode())
        assert splitter.pre_tokenize_str(chr(code)) == [(written, (0, 1))]


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[", b"[" * 100_000, b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"null"]
)
def test_broken_files_are_named(tmp_path: Path, data: bytes):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a usable tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_missing_and_oversized_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(INNER.to_str())
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 100)
    with pytest.raises(TokenizerError, match="larger than 100 bytes"):
        Tokenizer.from_folder(tmp_path)


def test_foreign_tokenizers_are_refused():
    tree = json.loads(INNER.to_str())
    with pytest.raises(TokenizerError, match="only byte-level BPE"):
        Tokenizer.from_bytes(json.dumps({**tree, "decoder": None}).encode())
    word_level = {**tree, "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    with pytest.raises(TokenizerError, match="WordLevel"):
        Tokenizer.from_bytes(json.dumps(word_level).encode())


def test_a_control_token_that_text_can_reach_is_refused():
    inner = small_inner()
    inner.model = models.BPE(vocab={"<": 0, "e": 1, ">": 2, "<e": 3, "<e>": 4}, merges=[("<", "e"), ("<e", ">")])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.add_special_tokens(["<e>"])
    with pytest.raises(TokenizerError, match="encodes to the control token"):
        Tokenizer(inner)


def test_the_normalizer_of_the_file_applies():
    inner = small_inner()
    inner.normalizer = normalizers.NFC()
    assert Tokenizer(inner).encode("e\u0301<|end|>") == SMALL.encode("\u00e9<|end|>")


def test_a_file_round_trip_keeps_the_ids(tmp_path: Path, small):
    (tmp_path / "tokenizer.json").write_text(INNER.to_str())
    loaded = Tokenizer.from_folder(tmp_path)
    assert loaded.special_ids == small.special_ids
    assert loaded.vocab_size == small.vocab_size
    assert loaded.encode("Hello, wörld") == small.encode("Hello, wörld")
