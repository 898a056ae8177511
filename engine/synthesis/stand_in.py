"""A tokenizer of a model's size for models whose own is not at hand: honest bytes in, made-up words out.

gpt-oss's tokenizer belongs to its authors' repository and does not travel with synthetic weights. With this one a
server can start, take text and stream text: text is encoded byte by byte, and every id of the vocabulary has letters of
its own, so that what random weights say is visible. Harmony's control tokens have their true ids. Token *counts* of a
text are several times those of the real tokenizer: for figures, give prompts as token ids.

Knows: the format of `tokenizer.json` for byte-level BPE. Refuses to know: any real vocabulary.
"""

from __future__ import annotations

import json
from typing import Any

from engine.text.tokenizer import byte_level_alphabet

HARMONY_TOKENS = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
}
MIN_VOCAB_SIZE = 1 + max(HARMONY_TOKENS.values())
NOTE = "a stand-in made by hlaunch synth: encodes text byte by byte; it is not the model's own tokenizer"


def stand_in_tokenizer(vocab_size: int) -> dict[str, bytes]:
    """Make `tokenizer.json` and `tokenizer_config.json` for a vocabulary with Harmony's control tokens.

    Raises: ValueError when the vocabulary is too small to hold the control tokens at their ids.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"a vocabulary of {vocab_size} does not hold Harmony's ids up to {MIN_VOCAB_SIZE - 1}")
    vocab = {char: byte for byte, char in enumerate(byte_level_alphabet())}
    control = {token_id: literal for literal, token_id in HARMONY_TOKENS.items()}
    for token_id in range(256, vocab_size):
        vocab[control.get(token_id) or f"Ġ{_word(token_id)}"] = token_id
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(token_id, literal) for token_id, literal in sorted(control.items())],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 131072,
        "stand_in": NOTE,
    }
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")).encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
    }


def _added(token_id: int, literal: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": literal, **flags}


def _word(number: int) -> str:
    """Spell a number in syllables: two letters for each digit of base 100, so that no two numbers share a word."""
    consonants, vowels = "bcdfghjklmnprstvwxyz", "aeiou"
    word = ""
    while number:
        number, digit = divmod(number, 100)
        word = consonants[digit // 5] + vowels[digit % 5] + word
    return word
