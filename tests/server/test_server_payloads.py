"""What Codex and Claude Code really send, in `payloads/`: their own JSON with the words taken out.

Each file holds the second request of a turn with one call: the history brings back reasoning, call and result.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from messages_stream import message_of
from responses_stream import response_of
from server_support import CHAT, TOKENIZER, RunningServer, running

FOLDER = Path(__file__).parent / "payloads"
# The field with the history, how much of it the first request had, the tools that are left out, who reads the stream.
CLIENTS: dict[str, tuple[str, int, str | None, Any]] = {
    "claude_code": ("messages", 2, None, message_of),
    "codex": ("input", 4, "tools of type namespace, web_search are skipped", response_of),
}


@pytest.fixture(scope="module")
def wide() -> Iterator[RunningServer]:
    """Room for the 32,000 tokens that Claude Code asks for."""
    with running() as server:
        server.engine.max_model_len = 131072
        yield server


@pytest.mark.parametrize("name", CLIENTS)
def test_payload_is_served_and_extends_the_prompt_before(name: str, wide: RunningServer) -> None:
    field, num_first, warning, fold = CLIENTS[name]
    payload = json.loads((FOLDER / f"{name}.json").read_text())
    second = payload["body"]
    first = copy.deepcopy(second)
    first[field] = first[field][:num_first]
    if name == "claude_code":
        first["system"][0]["text"] += " cch=another;"
    wide.engine.submitted.clear()
    with wide.http(headers=payload["headers"]) as client:
        for body in (first, second):
            answer = client.post(payload["path"], json=body)
            assert answer.status_code == 200, answer.text
            assert answer.headers.get("x-hlaunch-warning") == warning
            fold(answer.text)
    prompts = [request.prompt_token_ids for request in wide.engine.submitted]
    opening = [CHAT.ids.start, *TOKENIZER.encode("assistant")]
    assert prompts[0][-len(opening) :] == opening
    shared = prompts[0][: -len(opening)]
    assert prompts[1][: len(shared)] == shared, "the prefix that the cache holds serves the next request"
    assert len({request.conversation for request in wide.engine.submitted}) == 1
    assert wide.engine.submitted[0].conversation
