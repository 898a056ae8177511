"""A stream says what the whole answer says, whatever the tokens are and however they are split."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from fake_engine import Script
from server_support import CHAT, TOKENIZER, running

from engine.core.request import EngineRequest
from engine.text import AssistantReply, ToolCall

SPECIAL = list(TOKENIZER.special_ids.values())
TEXT = "Grüße, 日本 👋 naïve café — the king's crown; to be or not to be. STOP! \n\n"
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def random_reply(rng: random.Random) -> list[int]:
    """Well-formed Harmony, text without headers, or noise of any tokens."""
    kind = rng.random()
    if kind < 0.35:
        calls = tuple(ToolCall("", "add", json.dumps({"a": i})) for i in range(rng.randint(1, 3)))
        reply = AssistantReply(
            reasoning=rng.choice([None, "thinking 日本"]),
            preamble=rng.choice([None, "Let me see."]),
            tool_calls=calls if rng.random() < 0.5 else (),
        )
        if not reply.tool_calls:
            reply = AssistantReply(reasoning=reply.reasoning, preamble=reply.preamble, final=TEXT)
        return CHAT.render_completion(reply)
    if kind < 0.6:
        return [*TOKENIZER.encode(TEXT * rng.randint(1, 3)), CHAT.ids.return_]
    return [
        rng.choice(SPECIAL) if rng.random() < 0.15 else rng.randrange(TOKENIZER.vocab_size)
        for _ in range(rng.randint(1, 60))
    ]


def split(ids: list[int], rng: random.Random) -> list[list[int]]:
    """Cut the tokens into outputs of random sizes."""
    chunks: list[list[int]] = []
    while ids:
        size = rng.choice([1, 1, 1, 2, 3, 7])
        chunks.append(ids[:size])
        ids = ids[size:]
    return chunks


def random_options(rng: random.Random, *, is_chat: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"max_tokens": rng.randint(1, 80), "n": rng.choice([1, 1, 2, 3])}
    if rng.random() < 0.4:
        options["stop"] = rng.sample(["STOP", "king", "日", "to be or", "zzz", "é"], 2)
        options["include_stop_str_in_output"] = rng.random() < 0.3
    if rng.random() < 0.4:
        options |= {"logprobs": True, "top_logprobs": rng.randint(0, 4)} if is_chat else {"logprobs": rng.randint(0, 4)}
    if rng.random() < 0.3:
        options["return_token_ids"] = True
    if is_chat and rng.random() < 0.5:
        options["tools"] = [TOOL]
        options["tool_choice"] = rng.choice(["auto", "none", "required"])
        options["parallel_tool_calls"] = rng.random() < 0.7
    if not is_chat:
        options["echo"] = "logprobs" not in options and rng.random() < 0.3
        options["skip_special_tokens"] = rng.random() < 0.7
    return options


def merge_stream(text: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Concatenate the chunks of a stream into choices of the whole form, without their ids."""
    choices: dict[int, dict[str, Any]] = {}
    usage: dict[str, Any] = {}
    lines = [line[6:] for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    for line in lines[:-1]:
        chunk = json.loads(line)
        assert "error" not in chunk
        if not chunk["choices"]:
            usage = chunk["usage"]
        for part in chunk["choices"]:
            choice = choices.setdefault(part["index"], {"text": "", "delta": {}, "logprobs": [], "token_ids": []})
            assert choice.get("finish_reason") is None, "nothing follows the finish reason"
            choice["finish_reason"] = part["finish_reason"]
            choice["token_ids"] += part.get("token_ids") or []
            choice["text"] += part.get("text", "")
            if part["logprobs"] is not None:
                found = part["logprobs"]
                columns = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
                rows = found["content"] if "content" in found else zip(*(found[key] for key in columns), strict=True)
                choice["logprobs"] += [row if isinstance(row, dict) else list(row) for row in rows]
            for key, value in part.get("delta", {}).items():
                if key == "tool_calls":
                    calls = choice["delta"].setdefault("tool_calls", [])
                    for call in value:
                        if "id" in call:
                            assert call["index"] == len(calls)
                            calls.append([call["function"]["name"], ""])
                        calls[call["index"]][1] += call["function"]["arguments"]
                elif key != "role":
                    choice["delta"][key] = choice["delta"].get(key, "") + value
    return [choices[index] for index in sorted(choices)], usage


def merge_whole(answer: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    choices = []
    for part in answer["choices"]:
        logprobs: list[Any] = []
        if part["logprobs"] is not None:
            found = part["logprobs"]
            columns = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            rows = found["content"] if "content" in found else zip(*(found[key] for key in columns), strict=True)
            logprobs = [row if isinstance(row, dict) else list(row) for row in rows]
        choice: dict[str, Any] = {
            "text": part.get("text", ""),
            "delta": {},
            "logprobs": logprobs,
            "token_ids": part.get("token_ids") or [],
            "finish_reason": part["finish_reason"],
        }
        message = part.get("message", {})
        for key in ("reasoning", "reasoning_content"):
            if key in message:
                choice["delta"][key] = message[key]
        if message:
            choice["delta"]["content"] = message["content"] or ""
        if "tool_calls" in message:
            calls = [[c["function"]["name"], c["function"]["arguments"]] for c in message["tool_calls"]]
            choice["delta"]["tool_calls"] = calls
            for _, arguments in calls:
                json.loads(arguments)
        choices.append(choice)
    return choices, answer["usage"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_stream_equals_whole(path: str) -> None:
    is_chat = path.endswith("chat/completions")
    seed = 20261121
    rng = random.Random(seed)
    replies: list[list[int]] = []

    def write(request: EngineRequest) -> Script:
        # The same tokens for the same choice, split differently every time.
        ids = replies[int(request.request_id.rpartition("-")[2])]
        return Script([*split(ids, rng), [CHAT.ids.return_]])

    with running(write) as server, server.http() as client:
        for number in range(250):
            replies[:] = [random_reply(rng) for _ in range(3)]
            body = {"model": "tiny-oss"} | random_options(rng, is_chat=is_chat)
            body |= {"messages": [{"role": "user", "content": "hi"}]} if is_chat else {"prompt": "héllo"}
            whole = client.post(path, json=body)
            streamed = client.post(path, json=body | {"stream": True, "stream_options": {"include_usage": True}})
            where = f"seed {seed}, case {number}: {body} {replies}"
            assert whole.status_code == streamed.status_code == 200, f"{where} {whole.text}"
            assert merge_stream(streamed.text) == merge_whole(whole.json()), where
            reasons = {choice["finish_reason"] for choice in whole.json()["choices"]}
            assert reasons <= {"stop", "length", "tool_calls"}
            if body.get("tool_choice") == "none" or "tools" not in body:
                assert "tool_calls" not in whole.text
            _check_visible_text(whole.json(), body)


def _check_visible_text(answer: dict[str, Any], body: dict[str, Any]) -> None:
    """No control token and no stop string reaches the client."""
    for choice in answer["choices"]:
        text = choice.get("text") if "text" in choice else choice["message"]["content"]
        text = text or ""
        if body.get("skip_special_tokens", True):
            assert not any(literal in text for literal in TOKENIZER.special_ids)
        if not body.get("include_stop_str_in_output") and "text" in choice and not body.get("echo"):
            assert not any(stop in text for stop in body.get("stop", []))
