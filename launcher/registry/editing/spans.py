"""Where each node of a YAML text begins and ends, as offsets into the text.

Knows: the parser's events and their marks. Refuses to know: keys, values. Only for text that the loader accepted: its
guards have passed, so depth and size are bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import yaml

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(slots=True)
class Span:
    """One node. `end` of a block collection is that of its last leaf: the parser's own lies after the comments below.

    `text` is a scalar's value; `is_block`: a collection by indentation, or a scalar with `|` or `>`.
    """

    kind: Literal["scalar", "mapping", "sequence", "alias"]
    start: int
    end: int
    text: str = ""
    is_block: bool = False
    is_quoted: bool = False
    anchor: str = ""
    pairs: list[tuple[Span, Span]] = field(default_factory=list)
    items: list[Span] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Nothing is written: `key:` without a value."""
        return self.kind == "scalar" and self.start == self.end

    def leaf(self) -> Span:
        """The node whose text ends this one."""
        node = self
        while node.is_block and node.kind != "scalar":
            node = node.pairs[-1][1] if node.pairs else node.items[-1]
        return node


def read_spans(text: str) -> Span | None:
    """Return the root of the only document; None for an empty one."""
    events = yaml.parse(text, Loader=_LOADER)
    for event in events:
        if isinstance(event, yaml.NodeEvent):
            return _node(event, events)
    return None


def _node(event: yaml.Event, events: Iterator[yaml.Event]) -> Span:
    start, end = _offsets(event)
    if isinstance(event, yaml.AliasEvent):
        return Span("alias", start, end, text=event.anchor or "")
    if isinstance(event, yaml.ScalarEvent):
        is_block, is_quoted = event.style in ("|", ">"), event.style in ("'", '"')
        return Span("scalar", start, end, str(event.value), is_block, is_quoted, anchor=event.anchor or "")
    if not isinstance(event, yaml.CollectionStartEvent):
        raise AssertionError(f"{event} begins no node")
    is_mapping = isinstance(event, yaml.MappingStartEvent)
    span = Span("mapping" if is_mapping else "sequence", start, end, is_block=not event.flow_style)
    span.anchor = event.anchor or ""
    while not isinstance(event := next(events), yaml.CollectionEndEvent):
        node = _node(event, events)
        if is_mapping:
            span.pairs.append((node, _node(next(events), events)))
        else:
            span.items.append(node)
    span.end = span.leaf().end if span.is_block else _offsets(event)[1]
    return span


def _offsets(event: yaml.Event) -> tuple[int, int]:
    if event.start_mark is None or event.end_mark is None:
        raise AssertionError("parsed events have marks")
    return event.start_mark.index, event.end_mark.index
