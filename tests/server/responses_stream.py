"""The grammar of a response's stream as a state machine: accepts a stream, returns the response that it builds."""

from __future__ import annotations

from typing import Any

from messages_stream import events_of

FINAL = ("response.completed", "response.incomplete")
TEXT_EVENTS = {"reasoning": "response.reasoning_text", "message": "response.output_text"}


def response_of(text: str) -> dict[str, Any]:
    """Fold a whole stream into its response; any event out of its place fails.

    The last event holds the response, and it must be what the events before have built.
    """
    events = events_of(text)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    for event in events[:2]:
        assert (event["response"]["status"], event["response"]["output"], event["response"]["usage"]) == (
            "in_progress", [], None,
        )  # fmt: skip
    assert events[-1]["type"] in FINAL
    response: dict[str, Any] = events[-1]["response"]
    assert response["id"] == events[0]["response"]["id"]
    assert response["created_at"] == events[0]["response"]["created_at"]
    assert events[-1]["type"] == f"response.{response['status']}"
    output: list[dict[str, Any]] = []
    body = events[2:-1]
    while body:
        added = body.pop(0)
        assert added["type"] == "response.output_item.added"
        assert added["output_index"] == len(output)
        end = next(i for i, event in enumerate(body) if event["type"] == "response.output_item.done")
        own, done, body = body[:end], body[end], body[end + 1 :]
        assert all(event["output_index"] == len(output) == done["output_index"] for event in own)
        assert all(event["item_id"] == added["item"]["id"] == done["item"]["id"] for event in own)
        if added["item"]["type"] == "function_call":
            _check_call(added["item"], own, done["item"])
        else:
            _check_text(added["item"], own, done["item"])
        output.append(done["item"])
    assert output == response["output"], "the last event is complete"
    return response


def _check_call(opened: dict[str, Any], events: list[dict[str, Any]], item: dict[str, Any]) -> None:
    assert (opened["arguments"], opened["status"], item["status"]) == ("", "in_progress", "completed")
    assert [event["type"] for event in events[-1:]] == ["response.function_call_arguments.done"]
    assert all(event["type"] == "response.function_call_arguments.delta" for event in events[:-1])
    assert "".join(event["delta"] for event in events[:-1]) == events[-1]["arguments"] == item["arguments"]
    assert opened | {"arguments": item["arguments"], "status": "completed"} == item


def _check_text(opened: dict[str, Any], events: list[dict[str, Any]], item: dict[str, Any]) -> None:
    kind = TEXT_EVENTS[opened["type"]]
    assert (opened["content"], opened["status"]) == ([], "in_progress")
    assert events[0]["type"] == "response.content_part.added"
    assert events[0]["part"]["text"] == ""
    assert [event["type"] for event in events[-2:]] == [f"{kind}.done", "response.content_part.done"]
    deltas = events[1:-2]
    assert all(event["type"] == f"{kind}.delta" for event in deltas)
    assert all(event["content_index"] == 0 for event in events)
    text = "".join(event["delta"] for event in deltas)
    assert text == events[-2]["text"] == events[-1]["part"]["text"]
    assert item["content"] == [events[-1]["part"]]
    if opened["type"] == "message":
        streamed = [entry for event in deltas for entry in event["logprobs"]]
        assert events[-2]["logprobs"] == item["content"][0]["logprobs"]
        assert streamed == item["content"][0]["logprobs"][: len(streamed)]
    assert item["status"] in ("completed", "incomplete")
