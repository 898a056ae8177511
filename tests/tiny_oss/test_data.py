"""The data generator: reproducible, well-formed, and what the product would render and read."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from engine.core.request import FinishReason
from engine.text import HarmonyChat, collect_reply
from engine.text.harmony import HarmonyRenderer
from engine.text.tokenizer import Tokenizer
from tools.tiny_oss import skills
from tools.tiny_oss.data import FIRST, LEARNT, PADDING, TEXT, encode_example, load_corpus, make_dataset, split_text
from tools.tiny_oss.dialogs import Example, draw_examples, tool_conversation
from tools.tiny_oss.evaluate import parse_reply
from tools.tiny_oss.families import FAMILIES
from tools.tiny_oss.words import is_held_out


def _examples(count: int) -> list[Example]:
    corpus = load_corpus()
    return [example for seed in range(count) for example in draw_examples(Random(seed), corpus)]


def test_rows_depend_on_the_seed_and_not_on_the_workers(folder: Path) -> None:
    one = make_dataset(3, 8, folder, workers=1, row_tokens=512, shard_rows=4)
    two = make_dataset(3, 8, folder, workers=2, row_tokens=512, shard_rows=4)
    other = make_dataset(4, 8, folder, workers=1, row_tokens=512, shard_rows=4)
    assert np.array_equal(one.tokens, two.tokens)
    assert np.array_equal(one.flags, two.flags)
    assert not np.array_equal(one.tokens, other.tokens)


def test_rows_are_marked(folder: Path, tokenizer: Tokenizer) -> None:
    rows = make_dataset(5, 32, folder)
    is_first, is_learnt = (rows.flags & FIRST) > 0, (rows.flags & LEARNT) > 0
    assert is_first[:, 0].all()
    assert not (is_first & is_learnt).any()
    assert not ((rows.flags & PADDING) > 0)[is_learnt].any()
    assert ((rows.flags & PADDING) > 0).mean() < 0.05
    assert 0.003 < ((rows.flags & TEXT) > 0).mean() < 0.1
    # Every reply is learnt to its end: the stop tokens are.
    stop_ids = HarmonyRenderer(tokenizer).ids.stop_ids
    assert is_learnt[rows.tokens == stop_ids[0]].all()


def test_replies_are_well_formed(tokenizer: Tokenizer) -> None:
    renderer = HarmonyRenderer(tokenizer)
    for example in _examples(400):
        prompt, reply = encode_example(renderer, example)
        assert tokenizer.decode(prompt[-2:], skip_special_tokens=False) == "<|start|>assistant"
        parsed = parse_reply(tokenizer.decode(reply, skip_special_tokens=False))
        assert parsed is not None
        if example.reply.tool_calls:
            call = example.reply.tool_calls[0]
            assert parsed.name == call.name
            tool = next(tool for tool in example.tools if tool.name == call.name)
            properties = (tool.parameters or {}).get("properties", {})
            assert set(json.loads(call.arguments)) <= set(properties)
        else:
            assert parsed.final == example.reply.final


def test_the_product_reads_a_reply_back(tokenizer: Tokenizer) -> None:
    chat = HarmonyChat(tokenizer)
    for example in _examples(150):
        parser = chat.parser(example.tools)
        reply = chat.render_completion(example.reply)
        read = collect_reply([*parser.push(reply), *parser.finish(FinishReason.STOP)])
        assert read.content == (example.reply.final or "")
        assert read.reasoning == (example.reply.reasoning or "")
        calls = [(call.name, call.arguments) for call in read.tool_calls]
        assert calls == [(call.name, call.arguments) for call in example.reply.tool_calls]


def test_arguments_follow_the_schema() -> None:
    kinds: dict[str, Any] = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list}
    for example in _examples(400):
        for call in example.reply.tool_calls:
            tool = next(tool for tool in example.tools if tool.name == call.name)
            schema = tool.parameters or {}
            arguments = json.loads(call.arguments)
            assert set(schema.get("required", ())) <= set(arguments)
            for key, value in arguments.items():
                assert isinstance(value, kinds[schema["properties"][key]["type"]])


def test_held_out_names_and_wordings_stay_out_of_training() -> None:
    usual = {name for family in FAMILIES for name in family.names}
    for example in _examples(600):
        assert all(tool.name in usual or not is_held_out(tool.name) for tool in example.tools)
    assert not set(skills.HELD_OUT_SUM_PHRASINGS) & set(skills.SUM_PHRASINGS)
    corpus = load_corpus()
    drawn = [tool_conversation(Random(seed), corpus, held_out=True)[0] for seed in range(50)]
    assert all(is_held_out(example.reply.tool_calls[0].name) for example in drawn)


def test_every_one_digit_sum_is_asked() -> None:
    answers = {skills.sums(Random(seed)).answer for seed in range(6000)}
    assert not [(a, b) for a in range(10) for b in range(10) if f"{a} + {b} = {a + b}" not in answers]


def test_reasoning_follows_the_effort() -> None:
    thinks: dict[str | None, list[bool]] = {None: [], "low": [], "medium": [], "high": []}
    for example in _examples(1500):
        if example.skill != "tool_answer":
            thinks[example.options.reasoning_effort].append(example.reply.reasoning is not None)
    assert np.mean(thinks["low"]) < 0.1
    assert 0.3 < np.mean(thinks[None]) < 0.8
    assert np.mean(thinks["high"]) == 1.0


def test_held_out_text_is_the_last_part() -> None:
    train, held_out = split_text()
    assert 0.03 < len(held_out) / len(train) < 0.06
    assert held_out not in train
    assert all(speech in train for speech in load_corpus().speeches[:20])
