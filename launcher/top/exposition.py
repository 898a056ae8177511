"""Prometheus text → samples: a small strict parser with limits.

Knows: the text format 0.0.4, line by line. Refuses to know: what any metric means. The text comes from whatever answers
at an address, so every number of it is bounded, and a line that is not of the format refuses the whole text: half a
reading shows wrong rates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from launcher.errors import HlaunchError

MAX_TEXT_BYTES = 8 << 20
MAX_LINE_CHARS = 16 << 10
MAX_SAMPLES = 100_000
MAX_LABELS = 64

# Each alternative begins with another character, so both patterns run in linear time.
_SAMPLE = re.compile(
    r'([a-zA-Z_:][a-zA-Z0-9_:]*)[ \t]*(?:\{((?:[^"{}]|"(?:[^"\\]|\\.)*")*)\})?[ \t]*(\S+)(?:[ \t]+(-?\d{1,20}))?[ \t]*',
    re.ASCII,
)
_LABEL = re.compile(r'[ \t]*([a-zA-Z_][a-zA-Z0-9_]*)[ \t]*=[ \t]*"((?:[^"\\]|\\.)*)"[ \t]*(,|$)')
_NUMBER = re.compile(r"[+-]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})(?:[eE][+-]?\d{1,4})?|[+-]?Inf|NaN", re.ASCII)
_ESCAPES = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}
_ESCAPE = re.compile(r"\\.")


class MetricsInvalid(HlaunchError):
    """The text is no Prometheus text, or beyond a limit; `line` counts from 1."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line} of the metrics: {reason}", hint="is this the address of a model server?")
        self.line = line


@dataclass(frozen=True, slots=True)
class Sample:
    """One value and its labels."""

    labels: Mapping[str, str]
    value: float


def parse(text: str) -> dict[str, list[Sample]]:
    """Read an exposition text; samples by name, in order. Comments are skipped.

    Raises: MetricsInvalid for a malformed line, a repeated sample, or a text beyond a limit.
    """
    found: dict[str, list[Sample]] = {}
    seen: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
    # Not splitlines(): a label may hold U+2028 and other characters that Python, unlike the format, takes as line ends.
    for number, raw in enumerate(text.split("\n"), start=1):
        if len(raw) > MAX_LINE_CHARS:
            raise MetricsInvalid(number, f"longer than {MAX_LINE_CHARS} characters")
        line = raw.strip(" \t\r")
        if not line or line.startswith("#"):
            continue
        matched = _SAMPLE.fullmatch(line)
        if matched is None:
            raise MetricsInvalid(number, f"{_shown(line)} is no sample")
        name, labels_text, value_text = matched[1], matched[2], matched[3]
        if not _NUMBER.fullmatch(value_text):
            raise MetricsInvalid(number, f"{_shown(value_text)} is no number")
        labels = _labels(labels_text or "", number)
        key = (name, tuple(sorted(labels.items())))
        if key in seen:
            raise MetricsInvalid(number, f"{name} with these labels is there twice")
        if len(seen) == MAX_SAMPLES:
            raise MetricsInvalid(number, f"more than {MAX_SAMPLES:,} samples")
        seen.add(key)
        found.setdefault(name, []).append(Sample(labels, float(value_text)))
    return found


def natural(labels: Iterable[str]) -> tuple[tuple[int, str], ...]:
    """Order label values as people count: engine 2 before engine 10. A number of ten digits or more is a word."""
    return tuple(
        (int(word) if word.isascii() and word.isdigit() and len(word) < 10 else -1, word)
        for label in labels
        for word in label.split()
    )


def _labels(text: str, number: int) -> dict[str, str]:
    labels: dict[str, str] = {}
    position = 0
    # A comma after the last label is legal.
    while text[position:].strip(" \t"):
        matched = _LABEL.match(text, position)
        if matched is None:
            raise MetricsInvalid(number, f"{_shown(text[position:])} is no label")
        name = matched[1]
        if name in labels:
            raise MetricsInvalid(number, f"the label {name} is there twice")
        if len(labels) == MAX_LABELS:
            raise MetricsInvalid(number, f"more than {MAX_LABELS} labels")
        labels[name] = _ESCAPE.sub(lambda found: _ESCAPES.get(found[0], found[0]), matched[2])
        position = matched.end()
    return labels


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:59] + "…")
