"""Helpers for the tests of `engine.text`: a small tokenizer made on the spot and the published o200k vocabulary."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import tokenizers
from openai_harmony import HarmonyEncoding, load_harmony_encoding
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from engine.core.request import FinishReason
from engine.text import ChatReply, HarmonyChat, StreamEnd, TextCodec, Tokenizer, collect_reply

CONTROL = ("startoftext", "endoftext", "return", "constrain", "channel", "start", "end", "message", "call")
CORPUS = """assistant analysis commentary final user system developer functions json code to=functions.get_weather
The quick brown fox jumps over the lazy dog, and it's raining. {"city": "Paris", "n": 12} Grüße, naïve café — 東京 👋
# Valid channels: analysis, commentary, final. Reasoning: low medium high.
type weather = (_: { location: string, }) => any;
"""


def small_tokenizer() -> Tokenizer:
    """A byte-level BPE of about 400 tokens with Harmony's control tokens and one added token that is not special."""
    return Tokenizer(small_inner())


def small_inner() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([CORPUS] * 4, trainer)
    inner.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in CONTROL])
    inner.add_tokens([AddedToken("<think>", special=False)])
    return inner


class O200kCodec:
    """gpt-oss's own vocabulary, out of the oss-harmony package, behind our seam."""

    def __init__(self) -> None:
        self.oracle: HarmonyEncoding = load_harmony_encoding("HarmonyGptOss")
        specials = self.oracle.special_tokens_set
        ids = {name: self.oracle.encode(name, allowed_special="all")[0] for name in specials}
        self._special_ids = MappingProxyType(ids)

    @property
    def special_ids(self) -> Mapping[str, int]:
        return self._special_ids

    @property
    def vocab_size(self) -> int:
        return 201_089

    @property
    def longest_token_bytes(self) -> int:
        return 128

    def encode(self, text: str) -> list[int]:
        return self.oracle.encode(text, disallowed_special=())

    def encode_trusted(self, text: str) -> list[int]:
        return self.oracle.encode(text, allowed_special="all")

    def token_bytes(self, token_id: int) -> bytes:
        try:
            return bytes(self.oracle._inner.decode_bytes([token_id]))
        except Exception:  # noqa: BLE001  the package raises its own error type for unknown ids
            return b""


@functools.cache
def o200k_codec() -> O200kCodec:
    return O200kCodec()


def numbered_ids() -> Callable[[], str]:
    """A source of call ids 1, 2, 3, …"""
    counter = itertools.count(1)
    return lambda: f"call_{next(counter)}"


def parse(
    codec: TextCodec,
    tokens: Sequence[int],
    reason: FinishReason = FinishReason.STOP,
    sizes: Sequence[int] = (),
    **options: bool,
) -> ChatReply:
    """Parse a whole stream, cut into pieces of the given sizes (the rest in one piece)."""
    parser = HarmonyChat(codec, numbered_ids()).parser((), **options)
    events, at = [], 0
    for size in [*sizes, len(tokens)]:
        events += parser.push(tokens[at : at + size])
        at += size
    events += parser.finish(reason)
    assert [event for event in events if isinstance(event, StreamEnd)] == events[-1:]
    assert parser.finish(reason) == []
    return collect_reply(events)
