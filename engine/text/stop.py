"""Stop strings in a stream of text pieces.

Knows strings only. The text is cut at the first stop string to *end*; among several that end together, at the
longest. Whatever may still turn out to be the start of a stop string is held back, and nothing else is, so the
output does not depend on how the text was split into pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Node:
    """A state of the Aho-Corasick automaton: the longest suffix of the text that begins some stop string."""

    depth: int
    next: dict[str, _Node] = field(default_factory=dict)
    fallback: _Node | None = None
    match: str | None = None


class StopMatcher:
    """Watches one stream for stop strings; linear in the text, whatever the strings are.

    `include_stop` leaves the stop string in the output. After a match `matched` names it and `push` returns nothing.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        """Raises: ValueError for an empty stop string, which would match everywhere."""
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        self.matched: str | None = None
        self._include_stop = include_stop
        self._root = _build(stops)
        self._node = self._root
        self._held = ""

    def push(self, text: str) -> str:
        """Take a piece and return the text that is now certain to precede any stop string."""
        if self.matched is not None:
            return ""
        if not self._root.next:
            return text
        node = self._node
        for index, char in enumerate(text):
            node = _step(node, char)
            if node.match is not None:
                return self._cut(self._held + text[: index + 1], node.match)
        self._node = node
        text = self._held + text
        end = len(text) - node.depth
        self._held = text[end:]
        return text[:end]

    def finish(self) -> str:
        """Return the text held back, now that no more will follow."""
        held, self._held, self._node = self._held, "", self._root
        return held

    def _cut(self, text: str, stop: str) -> str:
        self.matched = stop
        self._held = ""
        return text if self._include_stop else text[: len(text) - len(stop)]


def _step(node: _Node, char: str) -> _Node:
    """Follow one character; amortised constant, because each fallback undoes an earlier step down."""
    while True:
        child = node.next.get(char)
        if child is not None:
            return child
        if node.fallback is None:
            return node
        node = node.fallback


def _build(stops: Sequence[str]) -> _Node:
    root = _Node(depth=0)
    for stop in stops:
        node = root
        for char in stop:
            node = node.next.setdefault(char, _Node(depth=node.depth + 1))
        node.match = stop
    queue = deque(root.next.values())
    for node in queue:
        node.fallback = root
    while queue:  # breadth first: a node's fallback is shallower and already complete
        node = queue.popleft()
        for char, child in node.next.items():
            child.fallback = _step(node.fallback, char) if node.fallback is not None else root
            if child.match is None:
                child.match = child.fallback.match
            queue.append(child)
    return root
