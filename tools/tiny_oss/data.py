"""Training data: Shakespeare and generated conversations as packed rows of token ids, a pure function of a seed.

Knows: the split of the text, how documents fill rows, and what is learnt in each.
Refuses to know: the model and the training loop.

A row holds whole documents one after another; a document is never cut except by the length of a row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from engine.text.harmony.render import HarmonyRenderer, developer_text, system_text
from engine.text.tokenizer import Tokenizer
from tools.tiny_oss.dialogs import Corpus, Example, draw_examples
from tools.tiny_oss.tokenizer import load_tokenizer, merge_table

TEXT_PATH = Path(__file__).with_name("tinyshakespeare.txt")
HELD_OUT_SHARE = 0.05
ROW_TOKENS = 2048
LEARNT, TEXT, FIRST, PADDING = 1, 2, 4, 8
"""Flags of a token: the model must produce it; it is Shakespeare; it begins a document; it fills up a row."""
TEXT_TOKEN_SHARE = 0.015
"""About ten passes over the text in a full run; with more the model learns it by heart."""
SPLIT_RATES = (0.0, 0.0, 0.1, 0.2)
"""Shares of tokens that a stretch of text replaces by their two parts, again so that it cannot be learnt by heart."""


@dataclass(frozen=True)
class Rows:
    """Packed rows: token ids uint16 [R, T] and flags uint8 [R, T]."""

    tokens: NDArray[np.uint16]
    flags: NDArray[np.uint8]


def split_text() -> tuple[str, str]:
    """Return Shakespeare for training and the held-out last part, cut at a speech."""
    text = TEXT_PATH.read_text(encoding="utf-8")
    cut = text.index("\n\n", int(len(text) * (1 - HELD_OUT_SHARE))) + 2
    return text[:cut], text[cut:]


@cache
def load_corpus() -> Corpus:
    """Return the words and the short speeches of the training text."""
    text, _ = split_text()
    counts = Counter(re.findall(r"[A-Za-z]{3,12}", text))
    vocabulary = tuple(sorted(word for word, number in counts.items() if number >= 2))
    speeches = tuple(s for s in text.split("\n\n") if 60 <= len(s) <= 320 and s.count("\n") >= 2)
    return Corpus(vocabulary, speeches)


def tokenizer_texts(seed: int, num_conversations: int) -> Iterator[str]:
    """Yield the texts on which the tokenizer is trained: all of Shakespeare and some conversations."""
    train, _ = split_text()
    yield from train.split("\n\n")
    corpus = load_corpus()
    for index in range(num_conversations):
        for example in draw_examples(Random(f"{seed}/tokenizer/{index}"), corpus):
            yield system_text(example.options, has_functions=bool(example.tools))
            leading = [m for m in example.messages if m.role in ("system", "developer")]
            yield developer_text(leading, example.tools, example.options.response_schema)
            yield from (m.content for m in example.messages if m.content and m not in leading)
            reply = example.reply
            yield from (text for text in (reply.reasoning, reply.final) if text)
            yield from (f"assistant to=functions.{call.name} {call.arguments}" for call in reply.tool_calls)


def encode_example(renderer: HarmonyRenderer, example: Example) -> tuple[list[int], list[int]]:
    """Return the prompt's ids, exactly as the product renders it, and the ids of the reply."""
    prompt = renderer.render(example.messages, example.tools, example.options)
    return prompt, renderer.render_completion(example.reply)


@dataclass(frozen=True)
class TextSource:
    """The training text as token ids, `<|startoftext|>`, and what each merged token is made of."""

    ids: tuple[int, ...]
    start_id: int
    merges: dict[int, tuple[int, int]]


@cache
def _tools(folder: Path) -> tuple[HarmonyRenderer, TextSource]:
    """Return the renderer and the training text, once per process."""
    tokenizer = Tokenizer.from_folder(folder)
    text_ids = tuple(tokenizer.encode(split_text()[0]))
    start_id = tokenizer.special_ids["<|startoftext|>"]
    return HarmonyRenderer(tokenizer), TextSource(text_ids, start_id, merge_table(load_tokenizer(folder)))


def _text_document(rng: Random, text: TextSource) -> tuple[list[int], list[int]]:
    """Return a stretch of Shakespeare, half of the time after `<|startoftext|>`: clients send both."""
    length = rng.choice((128, 256, 512, 1024, ROW_TOKENS - 1))
    begin = rng.randrange(len(text.ids) - length)
    rate = rng.choice(SPLIT_RATES)
    tokens = [text.start_id] if rng.random() < 0.5 else []
    for token in text.ids[begin : begin + length]:
        parts = text.merges.get(token)
        tokens += parts if parts is not None and rng.random() < rate else (token,)
    tokens = tokens[:ROW_TOKENS]
    return tokens, [LEARNT | TEXT] * len(tokens)


def _documents(rng: Random, folder: Path) -> Iterator[tuple[list[int], list[int]]]:
    renderer, text = _tools(folder)
    corpus = load_corpus()
    num_text, num_total = 0, 1
    while True:
        if num_text < TEXT_TOKEN_SHARE * num_total:
            tokens, flags = _text_document(rng, text)
            num_text += len(tokens)
            num_total += len(tokens)
            yield tokens, flags
            continue
        for example in draw_examples(rng, corpus):
            prompt, reply = encode_example(renderer, example)
            num_total += len(prompt) + len(reply)
            yield prompt + reply, [0] * len(prompt) + [LEARNT] * len(reply)


def make_rows(seed: str, num_rows: int, folder: Path, row_tokens: int = ROW_TOKENS) -> Rows:
    """Fill rows with documents drawn from a seed; a document longer than a row is left out."""
    tokens = np.zeros((num_rows, row_tokens), np.uint16)
    flags = np.zeros((num_rows, row_tokens), np.uint8)
    packer = _Packer(tokens, flags)
    for document, marks in _documents(Random(seed), folder):
        if len(document) <= row_tokens and not packer.add(document, marks):
            return Rows(tokens, flags)
    raise RuntimeError("the stream of documents has no end")


class _Packer:
    """Places documents into rows, first fit among a few open rows."""

    OPEN_ROWS = 8

    def __init__(self, tokens: NDArray[np.uint16], flags: NDArray[np.uint8]) -> None:
        self.tokens, self.flags = tokens, flags
        self.num_rows, self.row_tokens = tokens.shape
        self.open = dict.fromkeys(range(min(self.OPEN_ROWS, self.num_rows)), 0)
        self.next_row = len(self.open)
        flags[:] = PADDING
        flags[:, 0] |= FIRST

    def add(self, document: list[int], marks: list[int]) -> bool:
        """Place a document; return False when no row is left for it."""
        size = len(document)
        row = next((row for row, used in self.open.items() if used + size <= self.row_tokens), None)
        if row is None:
            # The fullest row makes way for a fresh one; dropping the document would starve long ones.
            if self.next_row >= self.num_rows:
                return False
            del self.open[max(self.open, key=lambda row: self.open[row])]
            row = self.next_row
            self.next_row += 1
            self.open[row] = 0
        begin = self.open[row]
        self.tokens[row, begin : begin + size] = document
        self.flags[row, begin : begin + size] = marks
        self.flags[row, begin] = (marks[0] & ~LEARNT) | FIRST
        self.open[row] = begin + size
        if begin + size < self.row_tokens:
            # What is left of a row is a document of padding from which nothing is learnt.
            self.flags[row, begin + size] = PADDING | FIRST
        return True


def _make_shard(arguments: tuple[str, int, str, int]) -> Rows:
    seed, num_rows, folder, row_tokens = arguments
    return make_rows(seed, num_rows, Path(folder), row_tokens)


def make_dataset(
    seed: int,
    num_rows: int,
    folder: Path,
    workers: int = 1,
    row_tokens: int = ROW_TOKENS,
    shard_rows: int = 256,
) -> Rows:
    """Make rows in shards, in parallel; the result depends on the seed and not on `workers`."""
    sizes = [min(shard_rows, num_rows - begin) for begin in range(0, num_rows, shard_rows)]
    jobs = [(f"{seed}/rows/{index}", size, str(folder), row_tokens) for index, size in enumerate(sizes)]
    if workers <= 1:
        shards = [_make_shard(job) for job in jobs]
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            shards = list(pool.map(_make_shard, jobs))
    return Rows(np.concatenate([s.tokens for s in shards]), np.concatenate([s.flags for s in shards]))
