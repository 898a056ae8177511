"""The bundled model: its traits, its size, and that it does what its card says."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import safe_open

from engine.text.harmony.render import AssistantReply
from engine.text.messages import ChatMessage, RenderOptions, ToolDefinition
from tools.tiny_oss.data import load_corpus
from tools.tiny_oss.dialogs import Example, tool_conversation
from tools.tiny_oss.evaluate import Judge, Reply, parse_reply, right_function

WEATHER = ToolDefinition(
    "get_weather",
    "Get the current weather for a city",
    {"type": "object", "properties": {"city": {"type": "string", "description": "City name"}}, "required": ["city"]},
)


def _ask(user: str, tools: tuple[ToolDefinition, ...] = (), effort: str | None = None, system: str = "") -> Example:
    leading = (ChatMessage("system", system),) if system else ()
    messages = (*leading, ChatMessage("user", user))
    return Example(messages, tools, RenderOptions("2026-03-14", effort), AssistantReply(final=""), "test")


def test_folder_is_small_and_complete(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12_000_000


def test_config_keeps_the_traits_of_gpt_oss(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    assert config["head_dim"] != hidden / heads
    assert heads == 8 * config["num_key_value_heads"]
    assert config["layer_types"].count("sliding_attention") >= 2
    assert config["layer_types"].count("full_attention") >= 2
    assert config["layer_types"][0] == "sliding_attention"
    for size in (hidden, config["intermediate_size"]):
        assert size % 32 == 0
        assert size // 32 % 2 == 1
    assert config["num_local_experts"] > config["num_experts_per_tok"] > 1
    rope = config["rope_scaling"]
    assert rope["factor"] > 1
    assert rope["truncate"] is False
    assert not config["tie_word_embeddings"]
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    assert config["vocab_size"] % 64 != 0


def test_tensors_are_named_and_shaped_as_in_gpt_oss(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    experts, hidden, inner = config["num_local_experts"], config["hidden_size"], config["intermediate_size"]
    with safe_open(str(folder / "model.safetensors"), "pt") as file:
        names = set(file.keys())
        assert len(names) == 19 * config["num_hidden_layers"] + 3
        layer = "model.layers.0."
        expected = {
            "self_attn.q_proj.weight": ([heads_size(config), hidden], torch.bfloat16),
            "self_attn.sinks": ([config["num_attention_heads"]], torch.bfloat16),
            "mlp.router.weight": ([experts, hidden], torch.bfloat16),
            "mlp.experts.gate_up_proj_blocks": ([experts, 2 * inner, hidden // 32, 16], torch.uint8),
            "mlp.experts.gate_up_proj_scales": ([experts, 2 * inner, hidden // 32], torch.uint8),
            "mlp.experts.down_proj_blocks": ([experts, hidden, inner // 32, 16], torch.uint8),
        }
        for name, (shape, dtype) in expected.items():
            tensor = file.get_tensor(layer + name)
            assert list(tensor.shape) == shape
            assert tensor.dtype == dtype
        for name in names:
            tensor = file.get_tensor(name)
            if name.endswith("_scales"):
                assert int(tensor.max()) <= 252
            elif tensor.is_floating_point():
                assert bool(torch.isfinite(tensor).all())
            if name.endswith(("sinks", "bias")):
                assert bool((tensor != 0).any()), name


def heads_size(config: dict[str, int]) -> int:
    return config["num_attention_heads"] * config["head_dim"]


GREETINGS = (
    _ask("Hello!"),
    _ask("hi", effort="low"),
    _ask("Good morning", system="Be brief."),
    _ask("Hello", (WEATHER,)),
)
PAIRS = ((2, 2), (7, 8), (9, 9), (0, 5))
SUMS = tuple(_ask(f"What is {a} + {b}?") for a, b in PAIRS)
CALLS = (_ask("What is the weather in Paris?", (WEATHER,)), _ask("How warm is it in Zürich?", (WEATHER,), "high"))
NEW_NAMES = tuple(tool_conversation(Random(f"test/{seed}"), load_corpus(), held_out=True)[0] for seed in range(6))


@pytest.fixture(scope="module")
def replies(judge: Judge) -> dict[int, Reply | None]:
    """Generate all replies in one batch, which is what takes the time; keys are identities of examples."""
    examples = (*GREETINGS, *SUMS, *CALLS, *NEW_NAMES)
    texts = judge.replies(examples)
    return {id(example): parse_reply(text) for example, text in zip(examples, texts, strict=True)}


def test_every_reply_is_well_formed(replies: dict[int, Reply | None]) -> None:
    assert all(reply is not None for reply in replies.values())


@pytest.mark.parametrize("example", GREETINGS, ids=lambda e: e.messages[-1].content)
def test_greets(example: Example, replies: dict[int, Reply | None]) -> None:
    reply = replies[id(example)]
    assert reply is not None
    assert (reply.final or "").startswith(("Hello", "Good morning"))


@pytest.mark.parametrize(("pair", "example"), list(zip(PAIRS, SUMS, strict=True)))
def test_adds(pair: tuple[int, int], example: Example, replies: dict[int, Reply | None]) -> None:
    reply = replies[id(example)]
    assert reply is not None
    assert reply.final == f"{pair[0]} + {pair[1]} = {sum(pair)}"


@pytest.mark.parametrize(("city", "example"), list(zip(("Paris", "Zürich"), CALLS, strict=True)))
def test_calls_the_weather_tool(city: str, example: Example, replies: dict[int, Reply | None]) -> None:
    reply = replies[id(example)]
    assert reply is not None
    assert reply.name == "get_weather"
    assert json.loads(reply.arguments or "") == {"city": city}


def test_calls_tools_it_never_saw(replies: dict[int, Reply | None]) -> None:
    passes = [(r := replies[id(example)]) is not None and right_function(example, r) for example in NEW_NAMES]
    assert sum(passes) >= 5


@pytest.mark.slow
def test_held_out_loss(judge: Judge) -> None:
    _, bits = judge.held_out_loss()
    assert bits < 2.4
