"""Who gets in: keys on every route, Host and Origin without keys, and what errors never say."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from server_support import SERVER, RunningServer, running

from engine.server.guard import PUBLIC_PATHS, host_name
from engine.server.routes import ROUTES

KEY = "sk-test-0123456789"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()
PRIVATE = sorted(set(ROUTES) - PUBLIC_PATHS) + ["/v1/models/tiny-oss", "/nope", "/docs", "/openapi.json"]
CANARIES = re.compile(r"Traceback|site-packages|\.py\b|0x[0-9a-f]{6}|File \"|/usr/|/home/|object at")


@pytest.fixture(scope="module")
def locked() -> Iterator[RunningServer]:
    config = replace(SERVER, api_key_sha256=(hashlib.sha256(b"other").hexdigest(), DIGEST))
    with running(server=config) as server:
        yield server


@pytest.mark.parametrize("path", PRIVATE)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD", "DELETE"])
def test_private_routes_need_the_key(locked: RunningServer, path: str, method: str) -> None:
    wrong: list[dict[str, str]] = [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": KEY},
        {"x-api-key": "wrong"},
        {"x-api-key": ""},
        {"authorization": f"Bearer {DIGEST}"},
        {"x-forwarded-for": "127.0.0.1", "host": "localhost"},
        {"x-original-url": "/health"},
    ]
    with locked.http() as client:
        bodies = set()
        for headers in wrong:
            answer = client.request(method, path, headers=headers)
            assert answer.status_code == 401, headers
            # Anthropic's shape holds the request's id, and nothing else that differs.
            bodies.add(answer.text.replace(answer.headers["x-request-id"], "id"))
        assert len(bodies) == 1
        for headers in (
            {"authorization": f"Bearer {KEY}"},
            {"authorization": f"bearer  {KEY}"},
            {"x-api-key": KEY},
            {"authorization": "Bearer wrong", "x-api-key": KEY},
        ):
            assert client.request(method, path, headers=headers).status_code != 401


@pytest.mark.parametrize("path", sorted(PUBLIC_PATHS))
def test_public_routes_are_open_for_reading_only(locked: RunningServer, path: str) -> None:
    with locked.http() as client:
        assert client.get(path).status_code == 200
        assert client.head(path).status_code == 200
        assert client.post(path).status_code == 401


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models",
        "/v1//models",
        "/./v1/models",
        "/health/../v1/models",
        "/health/%2e%2e/v1/models",
        "/%76%31/models",
        "/V1/MODELS",
        "/v1/models/",
        "/v1/models?x=/health",
        "/v1/models#/health",
        "/health/v1/models",
        "/metrics/",
        "http://localhost/v1/models",
        "/v1/models;/health",
        "/v1/models%00/health",
    ],
)
def test_path_tricks_do_not_get_in(locked: RunningServer, target: str) -> None:
    with locked.connect() as sock:
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost/health\r\nConnection: close\r\n\r\n".encode())
        raw = b""
        while part := sock.recv(65536):
            raw += part
    status = int(raw.split(b" ")[1])
    assert status in (400, 401), target
    assert b"owned_by" not in raw


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("127.0.0.1:9", 200),
        ("[::1]:8000", 200),
        ("192.168.1.7:8000", 200),
        ("head-node:8000", 200),
        ("llm.localhost", 200),
        ("box.local", 200),
        ("evil.example.com", 403),
        ("127.0.0.1.nip.io:8000", 403),
        ("localhost.evil.com", 403),
        ("localhost:80@evil.com", 403),
        ("localhost:x", 403),
        ("[::1].evil.com", 403),
        ("evil.com\\@localhost", 403),
    ],
)
def test_host_without_keys(shared_server: RunningServer, host: str, status: int) -> None:
    with shared_server.http() as client:
        assert client.get("/v1/models", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("http://127.0.0.1", 200),
        ("https://box.local", 200),
        ("https://evil.example.com", 403),
        ("null", 403),
        ("http://localhost.evil.com", 403),
        ("file://", 403),
        ("", 403),
    ],
)
def test_origin_without_keys(shared_server: RunningServer, origin: str, status: int) -> None:
    with shared_server.http() as client:
        answer = client.get("/v1/models", headers={"host": "box.local", "origin": origin})
        assert answer.status_code == status


def test_host_name() -> None:
    assert host_name(b"A.Example:80") == "a.example"
    assert host_name(b"[::1]:80") == "::1"
    assert host_name(b"[::1") == ""
    assert host_name(b"localhost.") == "localhost"
    assert host_name(b"\xff\xfe:1") == "\xff\xfe"


def test_methods_types_and_routes(http: httpx.Client) -> None:
    for path, methods in ROUTES.items():
        answer = http.request("PATCH", path)
        assert answer.status_code == 405
        assert answer.headers["allow"] == ", ".join(methods)
        error = answer.json()["error"]
        if path.startswith("/v1/messages"):
            assert error == {"type": "invalid_request_error", "message": "This route answers POST only."}
        else:
            assert error["code"] == "method_not_allowed"
    for headers in (
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {},
    ):
        answer = http.post("/v1/completions", content=b"{}", headers=headers)
        assert answer.status_code == 415
        assert answer.json()["error"]["code"] == "unsupported_media_type"
    answer = http.post(
        "/tokenize", content=b'{"prompt":"x"}', headers={"content-type": "application/json; charset=utf-8"}
    )
    assert answer.status_code == 200


def test_request_id_is_echoed_when_well_formed(http: httpx.Client) -> None:
    assert http.get("/live", headers={"x-request-id": "abc-1.2_3"}).headers["x-request-id"] == "abc-1.2_3"
    for odd in (b"a b", b"x" * 200, "é".encode(), b"<script>", b""):
        found = http.get("/live", headers={b"x-request-id": odd}).headers["x-request-id"]
        assert re.fullmatch(r"req_[0-9a-f]{24}", found)
    answer = http.get("/nope")
    assert answer.headers["x-request-id"]
    assert answer.headers["openai-processing-ms"].isdigit()


def test_an_unexpected_failure_says_nothing_about_us() -> None:
    def explode(*_: object) -> Any:
        raise RuntimeError("secret at /home/user/secret.py 0xdeadbeef")

    with running(explode) as server, server.http() as client:
        server.engine.write = explode
        body = {"model": "tiny-oss", "prompt": "x", "max_tokens": 2}
        for options in ({}, {"stream": True}):
            answer = client.post("/v1/completions", json=body | options, headers={"x-request-id": "find-me"})
            assert answer.status_code == 500
            error = answer.json()["error"]
            assert error["code"] == "internal_error"
            assert error["type"] == "server_error"
            assert answer.headers["x-request-id"] == "find-me"
            assert not CANARIES.search(answer.text)
            assert "secret" not in answer.text


def test_no_error_body_leaks(http: httpx.Client) -> None:
    bodies: list[bytes] = [
        b"",
        b"[]",
        b"{",
        b'{"model":1}',
        b'{"model":"tiny-oss","prompt":{"a":1}}',
        json.dumps({"model": "../../etc/passwd", "prompt": "x"}).encode(),
        json.dumps({"model": "tiny-oss", "prompt": "x", "stop": [""]}).encode(),
        json.dumps({"model": "tiny-oss", "prompt": "x", "seed": 2**70}).encode(),
    ]
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        for body in bodies:
            answer = http.post(path, content=body, headers={"content-type": "application/json"})
            if answer.status_code == 200 and path == "/tokenize":
                continue
            assert 400 <= answer.status_code < 500
            assert set(answer.json()) == {"error"}
            assert not CANARIES.search(answer.text)


def test_different_keys_share_no_cached_blocks(locked: RunningServer) -> None:
    salts = []
    with locked.http() as client:
        for key, salt in ((KEY, ""), ("other", ""), (KEY, ""), (KEY, "mine"), ("other", "mine")):
            body = {"model": "tiny-oss", "prompt": "a", "max_tokens": 1} | ({"cache_salt": salt} if salt else {})
            answer = client.post("/v1/completions", json=body, headers={"x-api-key": key})
            assert answer.status_code == 200
            salts.append(locked.engine.submitted[-1].cache_salt)
    assert salts[0] == salts[2]
    assert len(set(salts)) == 4
    assert not any(KEY in salt for salt in salts)


def test_a_cache_key_names_a_conversation_of_one_tenant(locked: RunningServer) -> None:
    conversations = []
    with locked.http() as client:
        for key, name in ((KEY, "a"), (KEY, "a"), (KEY, "b"), ("other", "a"), (KEY, "")):
            body = {"model": "tiny-oss", "prompt": "a", "max_tokens": 1, "prompt_cache_key": name}
            assert client.post("/v1/completions", json=body, headers={"x-api-key": key}).status_code == 200
            conversations.append(locked.engine.submitted[-1].conversation)
    assert conversations[0] == conversations[1]
    assert len(set(conversations)) == 4
    assert conversations[4] == ""
