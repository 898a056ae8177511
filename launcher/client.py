"""A small client of OpenAI-compatible servers, for `hlaunch chat` and `hlaunch bench`.

Knows: one request at a time over `http.client`, server-sent events, errors in OpenAI's shape. Refuses to know:
terminals, statistics, how the server was started.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from launcher.errors import EngineFailed, HlaunchError, UsageError

MAX_EVENT_BYTES = 4 << 20
CONNECT_TIMEOUT_SECONDS = 10.0
READ_TIMEOUT_SECONDS = 600.0
EXAMPLE_URL = "for example: http://127.0.0.1:8000"


class ApiError(HlaunchError):
    """The server answered with an error; `status` is the HTTP status, `code` OpenAI's code."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"the server answered {status} {code}: {message}")
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event and when it arrived (`at`: seconds of `time.perf_counter`)."""

    at: float
    data: Mapping[str, Any]


class Client:
    """Talk to the server at `base_url` (`http://host:port`); keeps one connection open between requests."""

    def __init__(
        self, base_url: str, api_key: str | None = None, *, read_timeout_seconds: float = READ_TIMEOUT_SECONDS
    ) -> None:
        try:
            parts = urlsplit(base_url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise UsageError(f"{base_url!r} is no address: {error}", hint=EXAMPLE_URL) from error
        if parts.scheme not in ("http", "https") or not host:
            raise UsageError(f"{base_url!r} is no http:// or https:// address", hint=EXAMPLE_URL)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(host, port, timeout=min(CONNECT_TIMEOUT_SECONDS, read_timeout_seconds))
        self._read_timeout_seconds = read_timeout_seconds
        self._prefix = parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/json", "User-Agent": "hlaunch"}
        if api_key is not None:
            key = api_key.strip()
            if not (key.isascii() and key.isprintable()):
                # http.client would name the value in its own complaint.
                raise UsageError("the API key holds characters that no HTTP header can carry")
            self._headers["Authorization"] = f"Bearer {key}"
        self.base_url = base_url

    def close(self) -> None:
        self._connection.close()

    def get(self, path: str) -> Any:
        """Fetch a JSON document.

        Raises: ApiError for an error status, EngineFailed when the server cannot be reached.
        """
        return json.loads(self._open("GET", path, None).read())

    def text(self, path: str, max_bytes: int) -> str:
        """Fetch UTF-8 text of at most `max_bytes`, within the read timeout as a whole.

        Raises: as `get`, and EngineFailed for a body that is longer, slower, or no UTF-8.
        """
        response = self._open("GET", path, None)
        deadline = time.monotonic() + self._read_timeout_seconds
        body = bytearray()
        try:
            while part := response.read1(64 << 10):
                body += part
                if len(body) > max_bytes:
                    raise EngineFailed(f"{self.base_url}{path} is longer than {max_bytes >> 20} MiB")
                if time.monotonic() > deadline:
                    raise EngineFailed(f"{self.base_url}{path} took longer than {self._read_timeout_seconds:.0f} s")
            # read1() ends quietly where the connection broke; a text cut in its last number would still be one.
            if response.length:
                raise EngineFailed(f"{self.base_url} broke off {response.length} bytes before the end")
            return body.decode("utf-8")
        except UnicodeDecodeError as error:
            raise EngineFailed(f"{self.base_url}{path} is no UTF-8 text") from error
        except (OSError, http.client.HTTPException) as error:
            raise EngineFailed(f"{self.base_url} broke off: {error}") from error
        finally:
            if not response.isclosed():
                self._connection.close()

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Post JSON and return the JSON answer; raises as `get`."""
        return json.loads(self._open("POST", path, body).read())

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[Event]:
        """Post JSON and yield the events of the answer until `[DONE]`.

        Closing the iterator early closes the connection, which tells the server to stop.
        Raises: as `get`, and ApiError for an error event in the stream.
        """
        response = self._open("POST", path, body)
        try:
            while line := response.readline(MAX_EVENT_BYTES):
                if not line.startswith(b"data:"):
                    continue
                payload = line[5:].strip()
                if payload == b"[DONE]":
                    response.read()
                    return
                data = json.loads(payload)
                if "error" in data:
                    raise _api_error(200, data)
                yield Event(time.perf_counter(), data)
            raise EngineFailed(f"{self.base_url} closed the stream before its end")
        except (OSError, http.client.HTTPException) as error:
            raise EngineFailed(f"{self.base_url} broke off: {error}") from error
        finally:
            if not response.isclosed():
                self._connection.close()

    def _open(self, method: str, path: str, body: Mapping[str, Any] | None) -> http.client.HTTPResponse:
        payload = None if body is None else json.dumps(body).encode()
        for attempt in (1, 2):
            try:
                self._connection.request(method, self._prefix + path, payload, self._headers)
                if self._connection.sock is not None:
                    self._connection.sock.settimeout(self._read_timeout_seconds)
                response = self._connection.getresponse()
                break
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                # A kept connection that the server closed meanwhile fails on first use: one fresh try.
                if attempt == 2 or isinstance(error, ConnectionRefusedError):
                    raise EngineFailed(
                        f"no answer from {self.base_url}: {getattr(error, 'strerror', None) or error}",
                        hint="is it running? see: hlaunch ps",
                    ) from error
        if response.status >= 400:
            raw = response.read()
            try:
                data = json.loads(raw)
            except ValueError:
                data = {"error": {"message": raw[:200].decode(errors="replace"), "code": response.reason}}
            raise _api_error(response.status, data)
        return response


def _api_error(status: int, data: Any) -> ApiError:
    error = data.get("error", {}) if isinstance(data, dict) else {}
    if not isinstance(error, dict):
        error = {"message": str(error)}
    return ApiError(status, str(error.get("code") or error.get("type") or "error"), str(error.get("message", "")))


def served_model(client: Client) -> str:
    """Name of the first model that the server lists."""
    models: Sequence[Mapping[str, Any]] = client.get("/v1/models").get("data", [])
    if not models:
        raise EngineFailed(f"{client.base_url} lists no model")
    return str(models[0]["id"])
