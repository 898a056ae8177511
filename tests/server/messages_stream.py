"""The grammar of Anthropic's stream as a state machine: it accepts a stream and returns the message that it builds."""

from __future__ import annotations

import json
from typing import Any

DELTAS = {
    "text": {"text_delta": "text"},
    "thinking": {"thinking_delta": "thinking", "signature_delta": "signature"},
    "tool_use": {"input_json_delta": "partial_json"},
}


def events_of(text: str) -> list[dict[str, Any]]:
    """Read server-sent events; every one has a name, and it is the type of its data."""
    found = []
    for frame in text.split("\n\n")[:-1]:
        name, data = frame.split("\n")
        assert name.startswith("event: "), frame
        assert data.startswith("data: "), frame
        event = json.loads(data[6:])
        assert event["type"] == name[7:]
        found.append(event)
    assert text.endswith("\n\n")
    return found


def message_of(text: str) -> dict[str, Any]:
    """Fold a whole stream into its message; any event out of its place fails."""
    events = events_of(text)
    assert [event["type"] for event in events[:2]] == ["message_start", "ping"]
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    message: dict[str, Any] = events[0]["message"]
    assert (message["content"], message["stop_reason"], message["stop_sequence"]) == ([], None, None)
    assert message["usage"]["output_tokens"] >= 1
    block: dict[str, Any] | None = None
    arguments = ""
    for event in events[2:-2]:
        if event["type"] == "ping":
            continue
        assert event["index"] == len(message["content"])
        if event["type"] == "content_block_start":
            assert block is None, "one block is open at a time"
            block, arguments = event["content_block"], ""
            empty = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}, "tool_use": {"input": {}}}
            assert {key: block[key] for key in empty[block["type"]]} == empty[block["type"]]
        elif event["type"] == "content_block_delta":
            assert block is not None
            delta = event["delta"]
            key = DELTAS[block["type"]][delta["type"]]
            if key == "partial_json":
                arguments += delta[key]
            else:
                block[key] += delta[key]
        else:
            assert event["type"] == "content_block_stop"
            assert block is not None
            if block["type"] == "tool_use":
                block["input"] = json.loads(arguments)
                assert isinstance(block["input"], dict)
            assert block.get("signature") != ""
            message["content"].append(block)
            block = None
    assert block is None
    message |= events[-2]["delta"]
    message["usage"] = events[-2]["usage"]
    return message
