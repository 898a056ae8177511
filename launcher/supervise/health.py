"""What a server says of itself on `GET /health`, which needs no key.

Knows: one short question. Refuses to know: who asks, and what is done about the answer.
"""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from urllib.parse import urlsplit

HEALTH_SECONDS = 3.0
_MAX_BODY_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Health:
    """`status` is that of HTTP, 0 without an answer; `word` the server's own for its state; `problem` says why none."""

    status: int
    word: str = ""
    problem: str = ""

    @property
    def is_serving(self) -> bool:
        return self.status == http.client.OK


def ask_health(url: str, seconds: float = HEALTH_SECONDS) -> Health:
    """Ask `url`/health. Blocks for `seconds` at most per step; never raises."""
    try:
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=seconds)
    except ValueError as error:
        return Health(0, problem=str(error))
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        body = answer.read(_MAX_BODY_BYTES)
    except (OSError, http.client.HTTPException) as error:
        return Health(0, problem=str(error))
    finally:
        connection.close()
    try:
        word = json.loads(body).get("status", "")
    except (ValueError, AttributeError):
        word = ""
    return Health(answer.status, word if isinstance(word, str) and word.isascii() and word.isprintable() else "")
