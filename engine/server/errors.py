"""The one place where an error becomes bytes, in OpenAI's shape or in Anthropic's.

Knows: statuses, types and codes of both APIs, and which headers go with them. Refuses to know: exceptions of other
packages; whoever catches one picks a sentence here. `str(exc)` of a foreign exception never reaches a client.

    ApiError                 anything that ends a request with an error body
    ClientDisconnected       the client left; nothing can be sent any more
"""

from __future__ import annotations

import orjson

MAX_MESSAGE_CHARS = 500
# The statuses that Anthropic's API has a type for; others of the 4xx kind are invalid requests.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
ANTHROPIC_OVERLOADED = 529


class ClientDisconnected(Exception):
    """The client closed its connection while the request was worked on."""


class ApiError(Exception):
    """An answer with an error body. `code` is a string; `param` is a path such as `messages[2].content[0].type`.

    `retry_after` (seconds, 1 to 60) adds `Retry-After`; `should_retry` adds `x-should-retry`, which SDKs obey first.
    """

    def __init__(
        self,
        status: int,
        type_: str,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
        should_retry: bool | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type_
        self.code = code
        self.message = message[:MAX_MESSAGE_CHARS]
        self.param = param
        self.retry_after = retry_after
        self.should_retry = should_retry
        self.extra_headers = headers

    def body(self) -> bytes:
        """Encode `{"error": {...}}`."""
        return orjson.dumps(
            {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}
        )

    def sse_event(self) -> bytes:
        """Encode the event that ends a stream which cannot end well; no `[DONE]` follows it."""
        return b"data: " + self.body() + b"\n\n"

    @property
    def anthropic_status(self) -> int:
        """Anthropic's status of being overloaded is its own; the rest are HTTP's."""
        return ANTHROPIC_OVERLOADED if self.status == 503 else self.status

    def anthropic_body(self, request_id: str) -> bytes:
        """Encode `{"type": "error", "error": {...}}`. That shape has no field for the path, so the message names it."""
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        message = self.message if self.param is None or self.param in self.message else f"{self.param}: {self.message}"
        return orjson.dumps({"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id})

    def anthropic_event(self, request_id: str) -> bytes:
        """Encode the event that ends a stream of Anthropic's, whose SDK skips events without a name."""
        return b"event: error\ndata: " + self.anthropic_body(request_id) + b"\n\n"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that belong to this error, without content-type and length."""
        found = list(self.extra_headers)
        if self.retry_after is not None:
            found.append((b"retry-after", str(max(1, min(60, self.retry_after))).encode()))
        if self.should_retry is not None:
            found.append((b"x-should-retry", b"true" if self.should_retry else b"false"))
        return found


def invalid_json(message: str) -> ApiError:
    return ApiError(400, "invalid_request_error", "invalid_json", message)


def invalid_value(param: str | None, message: str) -> ApiError:
    return ApiError(400, "invalid_request_error", "invalid_value", message, param=param)


def unsupported_parameter(param: str, message: str) -> ApiError:
    return ApiError(400, "invalid_request_error", "unsupported_parameter", message, param=param)


def context_length_exceeded(limit: int, num_prompt_tokens: int | None, max_tokens: int, param: str) -> ApiError:
    """The sentence that LangChain and aider match; keep every word. No count: the prompt alone is beyond the limit."""
    more = "more than " if num_prompt_tokens is None else ""
    num_prompt_tokens = limit if num_prompt_tokens is None else num_prompt_tokens
    return ApiError(
        400,
        "invalid_request_error",
        "context_length_exceeded",
        f"This model's maximum context length is {limit} tokens, however you requested "
        f"{more}{num_prompt_tokens + max_tokens} tokens ({more}{num_prompt_tokens} in the messages, "
        f"{max_tokens} in the completion).",
        param=param,
    )


def too_long_to_count(limit: int, param: str) -> ApiError:
    return ApiError(
        400,
        "invalid_request_error",
        "context_length_exceeded",
        f"{param}: more than {limit} tokens; this server counts no further.",
        param=param,
    )


def invalid_api_key() -> ApiError:
    """One body for a missing and for a wrong key."""
    return ApiError(
        401,
        "authentication_error",
        "invalid_api_key",
        "Missing or incorrect API key. Send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
        headers=((b"www-authenticate", b"Bearer"),),
    )


def forbidden(code: str, message: str) -> ApiError:
    return ApiError(403, "permission_error", code, message)


def unknown_route() -> ApiError:
    return ApiError(404, "invalid_request_error", "unknown_route", "There is no such route on this server.")


def model_not_found(name: str) -> ApiError:
    return ApiError(
        404, "invalid_request_error", "model_not_found", f"The model '{name[:200]}' does not exist.", param="model"
    )


def method_not_allowed(allowed: tuple[str, ...]) -> ApiError:
    return ApiError(
        405,
        "invalid_request_error",
        "method_not_allowed",
        f"This route answers {', '.join(allowed)} only.",
        headers=((b"allow", ", ".join(allowed).encode()),),
    )


def request_timeout(message: str) -> ApiError:
    return ApiError(408, "invalid_request_error", "request_timeout", message)


def request_too_large(limit: int) -> ApiError:
    return ApiError(413, "invalid_request_error", "request_too_large", f"The body is larger than {limit} bytes.")


def unsupported_media_type() -> ApiError:
    return ApiError(
        415,
        "invalid_request_error",
        "unsupported_media_type",
        "Send the body as 'Content-Type: application/json', without Content-Encoding.",
    )


def headers_too_large(message: str) -> ApiError:
    return ApiError(431, "invalid_request_error", "headers_too_large", message)


def rate_limited(message: str) -> ApiError:
    return ApiError(429, "rate_limit_error", "rate_limit_exceeded", message, retry_after=1, should_retry=True)


def internal_error() -> ApiError:
    return ApiError(
        500, "server_error", "internal_error", "The server failed to answer. The request id names it in the server log."
    )


def engine_dead() -> ApiError:
    return ApiError(500, "server_error", "engine_dead", "The engine stopped working while it served this request.")


def numerical_error() -> ApiError:
    """A retry meets the same numbers again, hence x-should-retry: false."""
    return ApiError(
        500, "server_error", "numerical_error", "The model produced a value that is not finite.", should_retry=False
    )


def generation_timeout(seconds: float) -> ApiError:
    return ApiError(
        500,
        "server_error",
        "request_timeout",
        f"The request ran longer than the {seconds:g} seconds that this server allows.",
        should_retry=False,
    )


def overloaded(message: str = "The server is overloaded; try again shortly.") -> ApiError:
    return ApiError(503, "overloaded_error", "overloaded", message, retry_after=1, should_retry=True)


def loading(fraction: float) -> ApiError:
    return ApiError(
        503,
        "overloaded_error",
        "loading",
        f"The model is still loading ({int(fraction * 100)} %).",
        retry_after=2,
        should_retry=True,
    )


def draining() -> ApiError:
    return ApiError(
        503, "overloaded_error", "draining", "The server is shutting down.", retry_after=5, should_retry=True
    )


def unavailable(code: str) -> ApiError:
    """Map a code of the engine (`loading`, `draining`, `engine_dead`, `overloaded`, ...) to an answer."""
    if code == "loading":
        return loading(0.0)
    if code == "draining":
        return draining()
    if code == "engine_dead":
        return engine_dead()
    return overloaded()
