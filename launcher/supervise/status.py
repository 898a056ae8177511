"""The engine's status pipe: one JSON object per line -> phase, ready, leaving or fatal.

Knows: these records and their limits. Refuses to know: pipes and processes. A line that is none of them is dropped: a
newer engine may say more than this launcher understands.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

MAX_LINE_BYTES = 64 << 10
RESTART_PHASE = "restart"
"""What an engine reports that starts its ranks anew, without ending."""
LAST_WORDS_SECONDS = 5.0
"""How long an engine may live after its `fatal` record."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase began, moved or ended. `at` is CLOCK_MONOTONIC in seconds; `fraction` is 0 to 1 or None."""

    name: str
    state: str
    fraction: float | None
    detail: str
    at: float

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "phase",
            "phase": self.name,
            "state": self.state,
            "fraction": self.fraction,
            "detail": self.detail,
            "at": self.at,
        }


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine serves. `facts` are figures for people."""

    url: str
    model: str
    at: float
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def context_tokens(self) -> int | None:
        """The longest context, None where the engine does not tell."""
        told = self.facts.get("max_model_len")
        return told if isinstance(told, int) and told > 0 else None

    def to_json(self) -> dict[str, Any]:
        return {"kind": "ready", "url": self.url, "model": self.model, "facts": self.facts, "at": self.at}


@dataclass(frozen=True, slots=True)
class Fatal:
    """The one explanation of an exit."""

    phase: str
    error_type: str
    message: str
    hint: str
    exit_code: int

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "fatal",
            "phase": self.phase,
            "type": self.error_type,
            "message": self.message,
            "hint": self.hint,
            "exit_code": self.exit_code,
        }


@dataclass(frozen=True, slots=True)
class Leaving:
    """The end that comes is no failure, though nobody here asked for it: a node's head has ended."""

    def to_json(self) -> dict[str, Any]:
        return {"kind": "leaving"}


Record = Phase | Ready | Leaving | Fatal


def parse_record(line: bytes, now: float) -> Record | None:
    """Read one line; None when it is not a record we know. `now` stands in for a missing time."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    kind = data.get("kind")
    at = data.get("at")
    moment = float(at) if isinstance(at, (int, float)) else now
    if kind == "phase":
        fraction = data.get("fraction")
        known = min(1.0, max(0.0, float(fraction))) if isinstance(fraction, (int, float)) else None
        return Phase(_text(data, "phase"), _text(data, "state"), known, _text(data, "detail"), moment)
    if kind == "ready":
        facts = data.get("facts")
        return Ready(_text(data, "url"), _text(data, "model"), moment, facts if isinstance(facts, dict) else {})
    if kind == "leaving":
        return Leaving()
    if kind == "fatal":
        code = data.get("exit_code")
        exit_code = code if isinstance(code, int) and 1 <= code <= 255 else 1
        return Fatal(_text(data, "phase"), _text(data, "type"), _text(data, "message"), _text(data, "hint"), exit_code)
    return None


def _text(data: dict[str, Any], key: str) -> str:
    """One line of printable text: the engine's words end up on a terminal."""
    value = data.get(key)
    return one_line(value) if isinstance(value, str) else ""


def one_line(text: str, limit: int = 2000) -> str:
    """Fold text onto one line and replace control characters."""
    return "".join(ch if ch.isprintable() else "?" for ch in " ".join(text.split()))[:limit]


class LineSplitter:
    """Bytes in, whole lines out; a line above the limit is dropped, never held."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._is_skipping = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the lines that `data` completes, without their newline."""
        for part in data.splitlines(keepends=True):
            if not self._is_skipping:
                self._buffer += part
            if part.endswith(b"\n"):
                if not self._is_skipping:
                    yield bytes(self._buffer).rstrip(b"\r\n")
                self._buffer.clear()
                self._is_skipping = False
            elif len(self._buffer) > MAX_LINE_BYTES:
                self._buffer.clear()
                self._is_skipping = True
