"""The unmodified `openai` client, `hlaunch chat` and `hlaunch bench` against the real tiny-oss server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from e2e_support import Running
from scenarios import SCENARIOS, Target

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_openai_client(scenario: Callable[[Target], None], running: Running) -> None:
    scenario(Target(running.url, "tiny-oss"))


@pytest.mark.parametrize("left", range(0, 10, 3))
def test_it_adds_digits(client: openai.OpenAI, left: int) -> None:
    for right in (1, 5, 8):
        answer = client.chat.completions.create(
            model="tiny-oss", messages=[{"role": "user", "content": f"What is {left} + {right}?"}], temperature=0
        )
        assert str(left + right) in (answer.choices[0].message.content or "")


def test_it_greets(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny-oss", messages=[{"role": "user", "content": "Hello!"}], temperature=0
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content


def test_it_calls_the_tool_that_is_offered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny-oss",
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[WEATHER],  # type: ignore[list-item]
        temperature=0,
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    calls = answer.choices[0].message.tool_calls or []
    assert [call.function.name for call in calls] == ["get_weather"]  # type: ignore[union-attr]
    assert json.loads(calls[0].function.arguments) == {"city": "Paris"}  # type: ignore[union-attr]


def test_chat_in_the_terminal_streams_an_answer(running: Running) -> None:
    done = running.hlaunch("chat", "tiny-oss", "--temperature", "0", "-m", "What is 2 + 2?")
    assert "4" in done.stdout
    piped = running.hlaunch("chat", "tiny-oss", "--temperature", "0", stdin="What is 2 + 2?\n")
    assert piped.stdout == done.stdout


def test_bench_measures_and_draws(running: Running, tmp_path: Path) -> None:
    picture, document = tmp_path / "bench.png", tmp_path / "bench.json"
    done = running.hlaunch(
        *("bench", "tiny-oss", "-c", "1,2", "-r", "2", "--input", "16", "--output", "8"),
        *("--json", "--out", str(document), "--plot", str(picture)),
    )
    data = json.loads(done.stdout)
    assert data == json.loads(document.read_text())
    assert data["workload"]["vocab_size"] > 2000, "prompts are drawn from the whole vocabulary, as the server tells it"
    assert [level["requests"] for level in data["levels"]] == [2, 4]
    assert all(level["errors"] == 0 and level["output_tokens_per_second"] > 0 for level in data["levels"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bench_refuses_a_bad_concurrency_in_one_line(running: Running) -> None:
    done = running.hlaunch("bench", "tiny-oss", "-c", "0", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --concurrency 0")
