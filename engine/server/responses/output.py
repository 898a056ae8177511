"""Pieces of a reply → output items and the events that build them.

Knows the order of events within an item. Refuses to know the response around the items and how events are numbered.

    output_item.added  (content_part.added  …text.delta…  …text.done  content_part.done)  output_item.done
    output_item.added  function_call_arguments.delta  function_call_arguments.done        output_item.done

One item is open at a time; every item of ours has one part.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.server.reply import Piece
from engine.text import ContentDelta, ReasoningDelta, ToolArgumentsDelta, ToolCallStart

Event = dict[str, Any]
Kind = Literal["message", "reasoning", "function_call"]
_PREFIXES: dict[Kind, str] = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}
_PHASES = {"final": "final_answer", "commentary": "commentary"}


@dataclass(slots=True)
class _Open:
    """The item that is being written. `number` is that of the model's message or call."""

    kind: Kind
    number: int
    item: dict[str, Any]
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)


class Items:
    """Pieces in, events out. `output` holds the items that are complete, as the response shows them."""

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []
        self._open: _Open | None = None
        self._pending_logprobs: list[dict[str, Any]] = []

    def feed(self, piece: Piece) -> list[Event]:
        """Return the events of a piece, which may be none. The piece that ends the reply closes the last item."""
        events: list[Event] = []
        self._pending_logprobs += piece.logprobs or ()
        for event in piece.events:
            if isinstance(event, ContentDelta):
                head = {"role": "assistant", "content": [], "phase": _PHASES[event.channel]}
                self._add_text(self._turn_to("message", event.message, head, events), event.text, events)
            elif isinstance(event, ReasoningDelta):
                head = {"summary": [], "content": []}
                self._add_text(self._turn_to("reasoning", event.message, head, events), event.text, events)
            elif isinstance(event, ToolCallStart):
                head = {"call_id": event.id, "name": event.name, "arguments": ""}
                self._turn_to("function_call", event.index, head, events)
            elif isinstance(event, ToolArgumentsDelta) and self._open is not None:
                self._open.texts.append(event.text)
                events.append(self._event("response.function_call_arguments.delta", delta=event.text))
        if piece.finish_reason is not None:
            self._close(events, "incomplete" if piece.finish_reason == "length" else "completed")
        return events

    def _turn_to(self, kind: Kind, number: int, head: dict[str, Any], events: list[Event]) -> _Open:
        """Return the open item, which is a new one unless the last is still going on."""
        if self._open is not None and (self._open.kind, self._open.number) == (kind, number):
            return self._open
        self._close(events, "completed")
        item = {"id": _PREFIXES[kind] + secrets.token_hex(12), "type": kind, "status": "in_progress", **head}
        self._open = _Open(kind, number, item)
        events.append({"type": "response.output_item.added", "output_index": len(self.output), "item": dict(item)})
        if kind != "function_call":
            events.append(self._event("response.content_part.added", content_index=0, part=self._part(self._open)))
        return self._open

    def _add_text(self, item: _Open, text: str, events: list[Event]) -> None:
        item.texts.append(text)
        if item.kind == "reasoning":
            events.append(self._event("response.reasoning_text.delta", content_index=0, delta=text))
        else:
            logprobs = self._take_logprobs(item)
            events.append(self._event("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs))

    def _take_logprobs(self, item: _Open) -> list[dict[str, Any]]:
        logprobs, self._pending_logprobs = self._pending_logprobs, []
        item.logprobs += logprobs
        return logprobs

    def _close(self, events: list[Event], status: str) -> None:
        item = self._open
        if item is None:
            return
        text = "".join(item.texts)
        if item.kind == "function_call":
            # The parser lets a call through only when its arguments are whole.
            status = "completed"
            item.item["arguments"] = text
            events.append(self._event("response.function_call_arguments.done", arguments=text))
        elif item.kind == "reasoning":
            events.append(self._event("response.reasoning_text.done", content_index=0, text=text))
        else:
            self._take_logprobs(item)
            done = self._event("response.output_text.done", content_index=0, text=text, logprobs=item.logprobs)
            events.append(done)
        if item.kind != "function_call":
            part = self._part(item)
            item.item["content"] = [part]
            events.append(self._event("response.content_part.done", content_index=0, part=part))
        item.item["status"] = status
        events.append({"type": "response.output_item.done", "output_index": len(self.output), "item": item.item})
        self.output.append(item.item)
        self._open = None

    def _part(self, item: _Open) -> dict[str, Any]:
        text = "".join(item.texts)
        if item.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": item.logprobs}

    def _event(self, kind: str, **fields: Any) -> Event:
        assert self._open is not None
        return {"type": kind, "item_id": self._open.item["id"], "output_index": len(self.output), **fields}
