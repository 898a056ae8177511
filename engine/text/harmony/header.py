"""Message headers as gpt-oss writes them, and as it miswrites them.

Knows how to find role, channel and recipient in the text between control tokens, and where a message goes that has
such a header. Knows no tokens and keeps no state. Nothing here raises: any text has a reading.

A header is a list of segments: the text before the first `<|channel|>`, the text after each one, and the text after
each `<|constrain|>`.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass

KNOWN_CHANNELS = ("analysis", "commentary", "final")
_FUNCTIONS = "functions."
_ROLES = ("assistant", "system", "developer", "user", "tool")
# Words that open no answer in practice and are left over when the control token before them is lost.
_HEADER_WORDS = ("assistant", *KNOWN_CHANNELS, "json", "code")
_RECIPIENT = re.compile(r"to=([A-Za-z0-9_.:/-]+)")
_UNKNOWN_CHANNEL = re.compile(r"\S*?(?=to=|\s|$)")
_CONTENT_TYPE = re.compile(r"\s*(?:json|code)?\s*")


class Part(enum.Enum):
    """Which control token a segment of the header follows."""

    ROLE = "start"
    CHANNEL = "channel"
    CONSTRAIN = "constrain"


class Route(enum.Enum):
    """Where the content of a message goes."""

    REASONING = "reasoning"
    CONTENT = "content"
    TOOL = "tool"
    NOWHERE = "nowhere"


@dataclass(frozen=True, slots=True)
class Header:
    """A header that was read. `tool` is the function's name on the route TOOL.

    `rest` is what the last segment holds beyond the header: the body of a message whose `<|message|>` got lost.
    """

    route: Route
    channel: str | None
    tool: str
    rest: str


def read_header(segments: Sequence[tuple[Part, str]], *, has_start: bool) -> Header:
    """Read the segments; `has_start` says that `<|start|>` opened the header, so that its first word is a role.

    The last channel and the last recipient win; words that mean nothing are ignored.
    """
    channel: str | None = None
    recipient = rest = ""
    for part, text in segments:
        end = 0
        if part is Part.CHANNEL:
            name, end = _read_channel(text)
            channel = name or channel
        elif part is Part.ROLE:
            end = _role_end(text)
            if text[end:].lstrip().startswith(KNOWN_CHANNELS):  # its <|channel|> got lost
                start = len(text) - len(text[end:].lstrip())
                channel, length = _read_channel(text[start:])
                end = start + length
        for found in _RECIPIENT.finditer(text):
            recipient, end = found[1], max(end, found.end())
        content_type = _CONTENT_TYPE.match(text, end)
        rest = text[content_type.end() if content_type else end :]
    role = segments[0][1].split(maxsplit=1)[:1] if has_start and segments else []
    route, tool = _route(role[0] if role else "", channel, recipient)
    return Header(route, channel, tool, rest)


def may_be_header(text: str) -> bool:
    """Whether text with no control token before it may be a header that lost one; else it is content.

    Answers False as soon as possible, so that plain text streams at once, and never turns from False to True when
    the text grows.
    """
    words = text.split()
    for index, word in enumerate(words):
        left = _strip_header_words(word)
        if left.startswith("to="):
            return True
        is_whole = index < len(words) - 1 or text[-1].isspace()
        if left and (is_whole or not any(known.startswith(left) for known in (*_HEADER_WORDS, "to="))):
            return False
    return True


def _strip_header_words(word: str) -> str:
    """Drop header words glued together from the front: `assistantcommentaryto=f` → `to=f`."""
    while known := next((known for known in _HEADER_WORDS if word.startswith(known)), None):
        word = word[len(known) :]
    return word


def _read_channel(text: str) -> tuple[str, int]:
    """Return the channel at the start of a segment and where it ends: the known one that fits, else the first word."""
    start = len(text) - len(text.lstrip())
    for known in KNOWN_CHANNELS:
        if text.startswith(known, start):
            return known, start + len(known)
    found = _UNKNOWN_CHANNEL.match(text, start)
    end = found.end() if found else len(text)
    return text[start:end], end


def _role_end(text: str) -> int:
    start = len(text) - len(text.lstrip())
    return next((start + len(role) for role in _ROLES if text.startswith(role, start)), 0)


def _route(role: str, channel: str | None, recipient: str) -> tuple[Route, str]:
    """Decide by recipient first, then by channel.

    A turn that the model plays for somebody else (a user, the result of a tool) is no part of its reply.
    """
    if role in _ROLES[1:] or (role.startswith(_FUNCTIONS) and recipient == "assistant"):
        return Route.NOWHERE, ""
    if recipient == "python" or recipient == "browser" or recipient.startswith("browser."):
        return Route.REASONING, ""
    tool = recipient.removeprefix(_FUNCTIONS)
    if tool and recipient not in _ROLES:
        return Route.TOOL, tool
    return (Route.REASONING if channel == "analysis" else Route.CONTENT), ""
