"""Judge a tiny-oss folder: `python -m tools.tiny_oss.evaluate [--folder F] [--device cuda] [--json]`.

Knows: which replies are right, on requests that training never saw: new draws, names and wordings kept out of it.
Refuses to know: the training code. It generates greedily in float32 with `transformers`, the reference.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from engine.text.harmony.render import AssistantReply, HarmonyRenderer
from engine.text.messages import ChatMessage, RenderOptions
from engine.text.tokenizer import Tokenizer
from tools.tiny_oss import skills, smalltalk
from tools.tiny_oss.data import load_corpus, split_text
from tools.tiny_oss.dialogs import (
    Corpus,
    Example,
    draw_effort,
    formatted,
    offered_but_not_needed,
    plain,
    tool_conversation,
)

ASSET_FOLDER = Path(__file__).resolve().parents[2] / "engine" / "assets" / "tiny_oss"
MAX_NEW_TOKENS = 160
_TURN = re.compile(
    r"(?:<\|channel\|>analysis<\|message\|>(?P<analysis>[^<]*)<\|end\|><\|start\|>assistant)?"
    r"(?:<\|channel\|>final<\|message\|>(?P<final>.*)<\|return\|>"
    r"| to=functions\.(?P<name>[\w.-]+)<\|channel\|>commentary json<\|message\|>(?P<arguments>.*)<\|call\|>)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Reply:
    """A well-formed turn: either a final text or a call."""

    final: str | None
    name: str | None
    arguments: str | None


def parse_reply(text: str) -> Reply | None:
    """Read a whole reply strictly; None when it is not well-formed Harmony."""
    match = _TURN.fullmatch(text)
    if match is None or "<|" in (match["final"] or "") + (match["arguments"] or ""):
        return None
    return Reply(match["final"], match["name"], match["arguments"])


def load_oracle(folder: Path, device: str = "cpu") -> Any:
    """Load the folder with `transformers` in float32, experts expanded."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True), attn_implementation="eager"
    )
    # Some versions expand the experts to bf16 whatever dtype was asked for.
    oracle: Any = model
    return oracle.to(dtype=torch.float32, device=device).eval()


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[list[int]], stop_ids: Sequence[int], pad_id: int, temperature: float = 0.0
) -> list[list[int]]:
    """Return completions of a batch of prompts, each up to and with its stop token; temperature 0 is greedy."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    out: Tensor = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=list(stop_ids),
        pad_token_id=pad_id,
        **sampling,
    )
    completions = []
    for row in out[:, longest:].tolist():
        end = next((index for index, token in enumerate(row) if token in stop_ids), len(row) - 1)
        completions.append(row[: end + 1])
    return completions


def _says_hello(example: Example, reply: Reply) -> bool:
    return reply.final is not None and re.match(r"(Hello|Good \w+)\b.*[.!?]$", reply.final) is not None


def _same_final(example: Example, reply: Reply) -> bool:
    return reply.final == example.reply.final


def _same_number(example: Example, reply: Reply) -> bool:
    """Compare the last number of the answer."""
    numbers = re.findall(r"-?\d+", reply.final or "")
    return bool(numbers) and numbers[-1] == re.findall(r"-?\d+", example.reply.final or "")[-1]


def _same_json(example: Example, reply: Reply) -> bool:
    try:
        return bool(json.loads(reply.final or "") == json.loads(example.reply.final or ""))
    except ValueError:
        return False


def right_function(example: Example, reply: Reply) -> bool:
    """Say whether the call names the expected function and its arguments are a JSON object."""
    try:
        is_object = isinstance(json.loads(reply.arguments or ""), dict)
    except ValueError:
        return False
    return is_object and reply.name == example.reply.tool_calls[0].name


def _right_call(example: Example, reply: Reply) -> bool:
    if not right_function(example, reply):
        return False
    return bool(json.loads(reply.arguments or "") == json.loads(example.reply.tool_calls[0].arguments))


def _no_call(example: Example, reply: Reply) -> bool:
    return reply.final is not None


Check = Callable[[Example, Reply], bool]


@dataclass(frozen=True)
class Suite:
    """Requests of one kind and the checks on their replies, by name."""

    name: str
    examples: Sequence[Example]
    checks: Mapping[str, Check]


def _ask(user: str, answer: str, effort: str | None, skill: str, date: str = "2026-03-14") -> Example:
    options = RenderOptions(date, effort)
    return Example((ChatMessage("user", user),), (), options, AssistantReply(final=answer), skill)


def _sums(phrasings: Iterable[str], effort: str | None) -> list[Example]:
    return [
        _ask(phrasing.format(a=a, b=b), f"{a} + {b} = {a + b}", effort, "sum")
        for phrasing in phrasings
        for a in range(10)
        for b in range(10)
    ]


def _draw(name: str, count: int, make: Callable[[Random, Corpus], Example]) -> list[Example]:
    corpus = load_corpus()
    return [make(Random(f"evaluate/{name}/{index}"), corpus) for index in range(count)]


def make_suites(scale: float = 1.0) -> list[Suite]:
    """Return the suites; `scale` shrinks the drawn ones for quick looks."""
    count = max(1, round(200 * scale))
    greetings = [
        _ask(form.format(opening), "", draw_effort(Random(f"{form}{opening}")), "greeting")
        for opening in smalltalk.OPENINGS
        for form in ("{}", "{}!", "{}.", "{} :)")
    ]
    held_out = _draw("held-out", count, lambda rng, c: tool_conversation(rng, c, held_out=True)[0])
    known = _draw("known", count, lambda rng, c: tool_conversation(rng, c)[0])
    answers = _draw("answers", 2 * count, lambda rng, c: tool_conversation(rng, c)[-1])
    answers = [example for example in answers if example.skill == "tool_answer"][:count]
    call: dict[str, Check] = {"function": right_function, "function and arguments": _right_call}
    pick_sums = skills.SUM_PHRASINGS[:: max(1, round(6 / scale))]
    return [
        Suite("greeting", greetings, {"sensible": _says_hello}),
        Suite("one-digit sums, known wordings", _sums(pick_sums, None), {"right": _same_number}),
        Suite("one-digit sums, new wordings", _sums(skills.HELD_OUT_SUM_PHRASINGS, None), {"right": _same_number}),
        Suite("one-digit sums, low effort", _sums(("What is {a} + {b}?",), "low"), {"right": _same_number}),
        Suite("tool calls, names never seen", held_out, call),
        Suite("tool calls, other", known, call),
        Suite("answers after tool results", answers, {"exact": _same_final}),
        Suite("tools offered, none needed", _draw("unused", count, offered_but_not_needed), {"no call": _no_call}),
        Suite("JSON objects", _draw("json", count, lambda r, c: plain(r, c, ("json",))), {"equal": _same_json}),
        Suite("JSON by schema", _draw("schema", count, formatted), {"equal": _same_json}),
        Suite("copying", _draw("copy", count, lambda r, c: plain(r, c, ("copy",))), {"exact": _same_final}),
        Suite("letters", _draw("letters", count, lambda r, c: plain(r, c, ("letters",))), {"exact": _same_final}),
        Suite("facts", _draw("fact", count, lambda r, c: plain(r, c, ("fact",))), {"exact": _same_final}),
        Suite("all sums and products", _draw("sum", count, lambda r, c: plain(r, c, ("sum",))), {"exact": _same_final}),
    ]


@dataclass(frozen=True)
class Score:
    """How many of a suite's replies passed a check; `failures` are a few that did not."""

    suite: str
    check: str
    passed: int
    total: int
    failures: tuple[str, ...] = ()


class Judge:
    """Runs suites on one model."""

    def __init__(self, folder: Path, device: str = "cpu", batch_size: int = 64, temperature: float = 0.0) -> None:
        self.tokenizer = Tokenizer.from_folder(folder)
        self.renderer = HarmonyRenderer(self.tokenizer)
        self.model = load_oracle(folder, device)
        self.batch_size, self.temperature = batch_size, temperature

    def replies(self, examples: Sequence[Example]) -> list[str]:
        """Return the replies as text with control tokens."""
        prompts = [self.renderer.render(e.messages, e.tools, e.options) for e in examples]
        ids = self.renderer.ids
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        texts = [""] * len(prompts)
        for begin in range(0, len(order), self.batch_size):
            chosen = order[begin : begin + self.batch_size]
            completions = generate(
                self.model, [prompts[i] for i in chosen], ids.stop_ids, ids.endoftext, self.temperature
            )
            for index, completion in zip(chosen, completions, strict=True):
                texts[index] = self.tokenizer.decode(completion, skip_special_tokens=False)
        return texts

    def run(self, suite: Suite) -> list[Score]:
        """Return one score for each check, and one for well-formedness."""
        texts = self.replies(suite.examples)
        replies = [parse_reply(text) for text in texts]
        checks: dict[str, Check] = {"well-formed": lambda example, reply: True, **suite.checks}
        scores = []
        for name, check in checks.items():
            passes = [r is not None and check(e, r) for e, r in zip(suite.examples, replies, strict=True)]
            failures = [
                f"{example.messages[-1].content!r} -> {text!r}, expected {example.reply!r}"
                for example, text, is_right in zip(suite.examples, texts, passes, strict=True)
                if not is_right
            ]
            scores.append(Score(suite.name, name, sum(passes), len(passes), tuple(failures[:4])))
        return scores

    @torch.no_grad()
    def held_out_loss(self, window: int = 512) -> tuple[float, float]:
        """Return nats per token and bits per byte on the held-out text, each token with 256 or more before it."""
        text = split_text()[1]
        ids = torch.tensor(self.tokenizer.encode(text), device=self.model.device)
        total, count = 0.0, 0
        for part in torch.split(ids.unfold(0, window + 1, window // 2), 8):
            logits = self.model(part[:, :-1]).logits[:, window // 2 :]
            targets = part[:, 1 + window // 2 :]
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
            count += targets.numel()
        nats = total / count
        return nats, nats / math.log(2) * len(ids) / len(text.encode())

    def complete(self, prompt: str, num_tokens: int = 120, seed: int = 0) -> str:
        """Continue plain text at temperature 0.8, for a look."""
        torch.manual_seed(seed)
        ids = torch.tensor([self.tokenizer.encode(prompt)], device=self.model.device)
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.8, top_p=0.95,
            max_new_tokens=num_tokens, pad_token_id=self.renderer.ids.endoftext,
        )  # fmt: skip
        return self.tokenizer.decode(out[0].tolist())


def main(argv: list[str]) -> int:
    """Print a table of scores."""
    parser = argparse.ArgumentParser(prog="python -m tools.tiny_oss.evaluate", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ASSET_FOLDER)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the drawn requests to run")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--batch", type=int, default=64, help="requests at once")
    parser.add_argument("--failures", action="store_true", help="print a few failures of each check")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    judge = Judge(arguments.folder, arguments.device, arguments.batch, arguments.temperature)
    nats, bits = judge.held_out_loss()
    print(f"| held-out Shakespeare | loss | {nats:.3f} nats per token, {bits:.3f} bits per byte |", flush=True)
    for suite in make_suites(arguments.scale):
        for score in judge.run(suite):
            share = 100 * score.passed / score.total
            print(f"| {score.suite} | {score.check} | {score.passed} of {score.total} ({share:.1f} %) |", flush=True)
            if arguments.failures:
                print("".join(f"    {failure}\n" for failure in score.failures), end="")
    print(judge.complete("ROMEO:\n"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
